"""The hash of a safetensors file and of each tensor in it, in one pass that keeps nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lastgood.format.tensors import Slot, Tensor, read_header
from lastgood.model import FileEntry
from lastgood.store import checksum, fs, local
from lastgood.store.checksum import NOW, Each, Kind, Sum

FORMAT = 2
"""Of tensors.json, as it is written now."""
FORMATS = (1, 2)
"""Of it and of resume.json, which is still in the first one: what can be read."""


class Place(NamedTuple):
    """Where a tensor is in a file, and the digest of what is there."""

    slot: Slot
    digest: str


def signature(dtype: str, shape: Sequence[int]) -> str:
    """`dtype[shape]`, the first half of a digest."""
    return f"{dtype}{list(shape)}"


def digest(entry: Tensor, kind: Kind = NOW) -> str:
    """`dtype[shape]:hash`, as tensors.json has it."""
    return f"{signature(entry.dtype, entry.shape)}:{checksum.of(entry.data, kind)}"


def told(entries: Iterable[Tensor], hashes: Iterable[str]) -> dict[str, str]:
    """name -> digest, of tensors whose bytes were hashed as they passed."""
    both = zip(entries, hashes, strict=True)
    return {entry.name: f"{signature(entry.dtype, entry.shape)}:{found}" for entry, found in both}


def digests(path: Path, kind: Kind = NOW) -> tuple[FileEntry, dict[str, Place]]:
    """(size and hash of the file, each tensor with its digest as tensors.json has it).

    Raises OSError, CorruptCheckpoint for a header that can't be read.
    """
    return local.tried_again(lambda: _digests(path, kind))


def _digests(path: Path, kind: Kind) -> tuple[FileEntry, dict[str, Place]]:
    slots = read_header(path).slots
    sizes = [slot.end - slot.begin for slot in slots.values()]
    start = min((slot.begin for slot in slots.values()), default=0)
    whole, each = Sum(kind), Each([start, *sizes], kind)
    with local.opened(path) as file:
        view = memoryview(bytearray(local.BLOCK))
        while count := fs.system.read_into(file.fileno(), view):
            whole.update(view[:count])
            if slots:
                each.update(view[:count])
    found = zip(slots.items(), each.told[1:], strict=False)  # fewer than there were, if the file was cut meanwhile
    return whole.entry(), {n: Place(slot, f"{signature(slot.dtype, slot.shape)}:{told}") for (n, slot), told in found}
