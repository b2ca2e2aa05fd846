"""Writing a safetensors file whose tensors come in blocks, in the layout of `format.tensors.encode`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from lastgood.errors import SaveFailed, UsageError
from lastgood.format.tensors import SIZES, header_bytes, place
from lastgood.state.tensors import to_bytes
from lastgood.store import local

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Entry(NamedTuple):
    """A tensor to be written; dtype is a code of the format."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def encode_slots(
    entries: Iterable[Entry],
    blocks: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[int, Iterator[bytes | memoryview]]:
    """(bytes in total, the chunks of the file). `blocks` gives the elements of a tensor in pieces, when it is its turn.

    Raises UsageError for a name that comes twice, and when `blocks` gives something else than was announced.
    """
    ordered = sorted(entries, key=lambda entry: place(_size(entry), SIZES[entry.dtype], entry.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in ordered:
        if entry.name in header or entry.name == "__metadata__":
            raise UsageError(f"two tensors are called {entry.name!r}")
        end = offset + _size(entry)
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    start = header_bytes(header)

    def chunks() -> Iterator[bytes | memoryview]:
        yield start
        for entry in ordered:
            total = 0
            for block in blocks(entry.name):
                data = to_bytes(entry.name, block)
                total += len(data.data)
                if data.dtype != entry.dtype or total > _size(entry):
                    break
                yield data.data
            if total != _size(entry):
                raise UsageError(f"tensor {entry.name!r} isn't the {entry.dtype}{list(entry.shape)} that was announced")

    return len(start) + offset, chunks()


def write(
    path: Path,
    entries: Iterable[Entry],
    blocks: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Create the file, durably; on an error it doesn't exist. The metadata says format "pt" unless it is given.

    Raises UsageError if `path` exists, SaveFailed if it can't be written.
    """
    size, chunks = encode_slots(entries, blocks, {"format": "pt"} if metadata is None else metadata)
    try:
        local.write(path, chunks, size=size)
        local.sync_dir(path.parent)
    except FileExistsError as error:
        raise UsageError(f"{path} exists already", hint="choose a new name, or move the file away") from error
    except OSError as error:
        raise SaveFailed(f"{path} can't be written: {error.strerror or error}") from error


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values in `dtype`, to the nearest with ties to even.

    torch goes through float32, which rounds twice and now and then wrongly. Rounding to odd on the way (the last
    bit says whether anything was cut off) makes the second rounding the only one that counts.
    """
    if values.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    single = values.float()
    back = single.double()
    bits = single.view(torch.int32)
    too_far = back.abs() > values.abs()
    inexact = (back != values) & ~values.isnan()
    return ((bits - too_far.int()) | inexact.int()).view(torch.float32).to(dtype)


def bits(block: torch.Tensor) -> torch.Tensor:
    """A view as integers of the same width: equal exactly if the bits are."""
    return block.view(_INTEGER[block.element_size()])


def _size(entry: Entry) -> int:
    return SIZES[entry.dtype] * math.prod(entry.shape)
