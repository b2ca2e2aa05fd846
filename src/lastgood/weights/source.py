"""The tensors of a checkpoint, read from its safetensors files block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lastgood.errors import CorruptCheckpoint, NotSupported
from lastgood.format.tensors import SIZES, Slot, read_header
from lastgood.state.tensors import DTYPE_OF
from lastgood.store import local

BLOCK = 64 << 20
"""Most bytes of a tensor that are read at a time (64 MiB)."""

STEP = 1 << 19
"""Elements per block where float64 is computed: 4 MiB, which stays near the processor."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


_PLAIN_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Weights:
    """slots: name -> (file, place in it), in the order of the files and of their data."""

    slots: dict[str, tuple[Path, Slot]]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> Weights:
        """Reads the headers only. Raises CorruptCheckpoint: a bad header, or a name that two files hold."""
        slots: dict[str, tuple[Path, Slot]] = {}
        for path in map(Path, paths):
            for name, slot in read_header(path).slots.items():
                if name in slots:
                    raise CorruptCheckpoint(f"tensor {name!r} is in {slots[name][0]} and in {path}")
                slots[name] = (path, slot)
        return cls(slots)

    def names(self) -> list[str]:
        return list(self.slots)

    def slot(self, name: str) -> Slot:
        return self.slots[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Raises NotSupported for a dtype that this torch doesn't know."""
        code = self.slot(name).dtype
        if code not in DTYPE_OF:
            raise NotSupported(f"tensor {name!r} has dtype {code}, which this torch does not know")
        return DTYPE_OF[code]

    def elements(self, name: str) -> int:
        return math.prod(self.slot(name).shape)

    def size(self, names: Sequence[str] | None = None) -> int:
        """Bytes of these tensors, or of all."""
        slots = [self.slot(name) for name in (self.slots if names is None else names)]
        return sum(slot.end - slot.begin for slot in slots)

    def is_float(self, name: str) -> bool:
        """True for float16, bfloat16, float32 and float64."""
        return self.slot(name).dtype in _PLAIN_FLOATS

    def is_float8(self, name: str) -> bool:
        """True for the float8 kinds, whose values mean something only together with their scales."""
        return self.slot(name).dtype.startswith("F8")

    def blocks(self, name: str, limit: int = BLOCK) -> Iterator[torch.Tensor]:
        """1-D tensors of consecutive elements, each in its own memory of at most `limit` bytes.

        Raises CorruptCheckpoint if the file can't be read or is shorter than its header says.
        """
        path, slot = self.slots[name]
        dtype = self.dtype(name)
        width = SIZES[slot.dtype]
        step = max(1, limit // width) * width
        try:
            with local.opened(path) as file:
                file.seek(slot.begin)
                for begin in range(slot.begin, slot.end, step):
                    buffer = torch.empty(min(step, slot.end - begin), dtype=torch.uint8)
                    view = buffer.numpy().data.cast("B")
                    while view:
                        count = file.readinto(view)
                        if not count:
                            raise CorruptCheckpoint(f"{path} ends inside tensor {name!r}")
                        view = view[count:]
                    yield buffer.view(dtype)
        except OSError as error:
            raise CorruptCheckpoint(f"{path} can't be read: {error.strerror or error}") from error

    def steps(self, name: str) -> Iterator[torch.Tensor]:
        """Blocks of STEP elements."""
        return self.blocks(name, STEP * SIZES[self.slot(name).dtype])

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor in its shape."""
        slot = self.slot(name)
        blocks = list(self.blocks(name, max(1, slot.end - slot.begin)))
        return blocks[0].reshape(slot.shape) if blocks else torch.empty(slot.shape, dtype=self.dtype(name))
