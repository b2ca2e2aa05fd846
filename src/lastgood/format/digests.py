"""The hash of a safetensors file and of each tensor in it, in one pass that keeps nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from lastgood.format.tensors import Slot, read_header
from lastgood.model import FileEntry
from lastgood.store import fs, local

LENGTH = 16
"""Bytes of a tensor's hash: enough that nobody finds two tensors with the same one, half of what a file has."""


LARGE = 1 << 20
"""Bytes (1 MiB) from which on several threads hash a buffer faster than one."""


class Place(NamedTuple):
    """Where a tensor is in a file, and the digest of what is there."""

    slot: Slot
    digest: str


def signature(dtype: str, shape: Sequence[int]) -> str:
    """`dtype[shape]`, the first half of a digest."""
    return f"{dtype}{list(shape)}"


def of(data: memoryview, *, threads: int | None = None) -> str:
    """The hash of a tensor's bytes. threads: at most so many; None: all cores.

    One alone in a forked process (`fs.forked`).
    """
    many = len(data) > LARGE and not fs.forked()
    hasher = blake3(data, max_threads=(blake3.AUTO if threads is None else threads) if many else 1)
    return hasher.hexdigest(length=LENGTH)


def digests(path: Path) -> tuple[FileEntry, dict[str, Place]]:
    """(size and hash of the file, each tensor with its digest as tensors.json has it).

    Raises OSError, CorruptCheckpoint for a header that can't be read.
    """
    return local.tried_again(lambda: _digests(path))


def _digests(path: Path) -> tuple[FileEntry, dict[str, Place]]:
    slots = read_header(path).slots
    found: dict[str, Place] = {}
    whole, at = blake3(), 0
    waiting = iter(slots.items())
    name, slot, hasher = _next(waiting)
    with local.opened(path) as file:
        view = memoryview(bytearray(local.BLOCK))
        while count := fs.system.read_into(file.fileno(), view):
            block, end = view[:count], at + count
            whole.update(block)
            while slot is not None and slot.end <= end:
                hasher.update(block[max(slot.begin, at) - at : slot.end - at])
                found[name] = Place(slot, _told(slot, hasher))
                name, slot, hasher = _next(waiting)
            if slot is not None and slot.begin < end:
                hasher.update(block[max(slot.begin, at) - at :])
            at = end
    return FileEntry(size=at, blake3=whole.hexdigest()), found


def _next(waiting: Iterator[tuple[str, Slot]]) -> tuple[str, Slot | None, blake3]:
    name, slot = next(waiting, ("", None))
    return name, slot, blake3()


def _told(slot: Slot, hasher: blake3) -> str:
    return f"{signature(slot.dtype, slot.shape)}:{hasher.hexdigest(length=LENGTH)}"
