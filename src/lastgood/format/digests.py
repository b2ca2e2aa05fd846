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
    waiting = list(slots.values())
    whole, each, at, next_ = Sum(kind), Each(kind), 0, 0
    with local.opened(path) as file:
        view = memoryview(bytearray(local.BLOCK))
        while count := fs.system.read_into(file.fileno(), view):
            end = at + count
            whole.update(view[:count])
            while next_ < len(waiting) and waiting[next_].end <= end:
                slot = waiting[next_]
                each.add(view[max(slot.begin - at, 0) : slot.end - at], last=True)
                next_ += 1
            if next_ < len(waiting) and waiting[next_].begin < end:
                each.add(view[max(waiting[next_].begin - at, 0) : count], last=False)
            at = end
    found = zip(slots.items(), each.told, strict=False)  # fewer than there were, if the file was cut short meanwhile
    return whole.entry(), {n: Place(slot, f"{signature(slot.dtype, slot.shape)}:{told}") for (n, slot), told in found}
