"""Whole files read into memory, by several threads, and hashed in the same pass."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lastgood.model import FileEntry
from lastgood.store import fs, local
from lastgood.store.checksum import NOW, Kind, Sum

if TYPE_CHECKING:
    from concurrent.futures import Future

AHEAD = 4 << 20
"""Bytes that one call reads (4 MiB): few calls, and the block is still near the processor when it is hashed."""


def content(path: Path, kind: Kind = NOW) -> tuple[memoryview, FileEntry]:
    """All bytes of a regular file, writable, with the hash of just these bytes. Raises OSError."""
    return local.tried_again(lambda: _content(path, kind))


def _content(path: Path, kind: Kind) -> tuple[memoryview, FileEntry]:
    whole = Sum(kind)
    with local.opened(path) as file:
        view = _room(os.fstat(file.fileno()).st_size)
        for block in _arriving(file.fileno(), view):
            whole.update(block)
    return view, whole.entry()


def fill(handle: int, view: memoryview, at: int) -> None:
    """Read exactly these bytes of an open file. Raises OSError where it ends before."""
    while view:
        count = fs.system.read_at(handle, view, at)
        if not count:
            raise OSError(5, f"the file ends at byte {at}")
        view, at = view[count:], at + count


def _room(size: int) -> memoryview:
    """Memory that nobody has touched yet: a bytearray is filled with zeros first, which costs more than the reading.

    Private, for a shared mapping would show a forked child what its parent trains on.
    """
    if size == 0:
        return memoryview(bytearray())
    if hasattr(mmap, "MAP_PRIVATE"):
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return memoryview(mmap.mmap(-1, size))


def _arriving(handle: int, view: memoryview) -> Iterator[memoryview]:
    """The blocks of a file in their order, while those behind them are being read."""
    blocks = [(view[at : at + AHEAD], at) for at in range(0, len(view), AHEAD)]
    workers = min(fs.system.workers, os.cpu_count() or 1)
    if workers == 1 or len(blocks) == 1:
        for block, at in blocks:
            fill(handle, block, at)
            yield block
        return

    from concurrent.futures import ThreadPoolExecutor  # what only looks starts faster without

    with ThreadPoolExecutor(max_workers=workers) as pool:
        under_way: deque[tuple[Future[None], memoryview]] = deque()
        for block, at in blocks:
            if len(under_way) > 2 * workers:  # not the whole file at once: what is hashed should still be near
                yield _ready(*under_way.popleft())
            under_way.append((pool.submit(fill, handle, block, at), block))
        while under_way:
            yield _ready(*under_way.popleft())


def _ready(reading: Future[None], block: memoryview) -> memoryview:
    reading.result()
    return block
