"""Whole files read into memory, by several threads, and hashed in the same pass.

A large file of which the system has nothing in memory is read past that (O_DIRECT of open(2), Linux), straight to where
it stays: otherwise the system takes as much memory again for it, and copies it from there.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lastgood.model import FileEntry
from lastgood.store import direct, fs, local, pages
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
        read = _past if _cold(file.fileno(), view) else fill
        for block in _arriving(file.fileno(), view, read):
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
    """Not in large pages: where memory is in pieces, to find gigabytes of those takes longer than the reading."""
    return memoryview(pages.mapped(size)) if size else memoryview(bytearray())


def _cold(handle: int, view: memoryview) -> bool:
    """Whether it is a large file of which nothing seems to be in memory; then it is open for `_past` from here on."""
    size = len(view)
    if size < direct.LARGE:
        return False
    for place in (0, size // 3, size * 2 // 3):  # not the end: whoever wrote the rest past it wrote that through it
        at = place - place % direct.ALIGNED
        if fs.system.cached(handle, view[at : at + direct.ALIGNED], at) != 0:
            return False
    try:
        fs.system.unbuffered(handle, True)
    except OSError:  # a file system that can't
        return False
    return True


def _past(handle: int, view: memoryview, at: int) -> None:
    """`fill` past the system's memory; view, at: begin where pages do."""
    whole = len(view) - len(view) % direct.ALIGNED
    try:
        fill(handle, view[:whole], at)
        if whole < len(view):  # so much can't be asked for, but the page that it is in
            page = _room(direct.ALIGNED)
            count = fs.system.read_at(handle, page, at + whole)
            view[whole : whole + count] = page[: min(count, len(view) - whole)]
            if count < len(view) - whole:
                raise OSError(5, f"the file ends at byte {at + whole + count}")
    except OSError as error:
        if error.errno not in direct.REFUSED:
            raise
        fs.system.unbuffered(handle, False)  # it took the flag and not the read
        fill(handle, view, at)


def _arriving(handle: int, view: memoryview, read: Callable[[int, memoryview, int], None]) -> Iterator[memoryview]:
    """The blocks of a file in their order, while those behind them are being read."""
    blocks = [(view[at : at + AHEAD], at) for at in range(0, len(view), AHEAD)]
    workers = min(fs.system.workers, os.cpu_count() or 1)
    if workers == 1 or len(blocks) == 1:
        for block, at in blocks:
            read(handle, block, at)
            yield block
        return

    from concurrent.futures import ThreadPoolExecutor  # what only looks starts faster without

    with ThreadPoolExecutor(max_workers=workers) as pool:
        under_way: deque[tuple[Future[None], memoryview]] = deque()
        for block, at in blocks:
            if len(under_way) > 2 * workers:  # not the whole file at once: what is hashed should still be near
                yield _ready(*under_way.popleft())
            under_way.append((pool.submit(read, handle, block, at), block))
        while under_way:
            yield _ready(*under_way.popleft())


def _ready(reading: Future[None], block: memoryview) -> memoryview:
    reading.result()
    return block
