"""Large files written past the page cache: the disk reads our buffers itself (O_DIRECT of open(2), Linux).

A buffered write copies every byte into the page cache, page by page, and whoever makes it durable waits for all of it
once more. Here one thread fills and hashes a buffer while another one has the disk take the buffer before it. What a
file holds is durable no sooner than before: the sync that follows is what makes it so.
"""

from __future__ import annotations

import errno
import mmap
import sys
import threading
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any

from lastgood.model import FileEntry
from lastgood.store import fs, pages
from lastgood.store.checksum import Each, Sum

LARGE = 4 << 20
"""Bytes from which a file is written in this way. Below, the buffered way is no slower, and takes fewer calls."""

BUFFER = 8 << 20
"""Bytes of a buffer: the disk is asked so much at a time."""

STEP = 1 << 20
STEPS = 16
"""Of a smaller file the disk is asked for a sixteenth at a time, and for at least 1 MiB: otherwise it has nothing to do
while the first buffer is filled, and whoever fills them has nothing to do while it takes the last one."""

BUFFERS = 3
"""One that is filled, one that is written, one in between."""

PIECE = 1 << 19
"""Bytes that are copied and then hashed, while they are in the cache of the processor."""

ALIGNED = 4096
"""What addresses, lengths and places in the file are multiples of; a disk that wants more refuses."""

REFUSED = frozenset(
    getattr(errno, name) for name in ("EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM") if hasattr(errno, name)
)
"""What a file system says that takes none of it."""

busy: set[int] = set()
"""Files that a thread may be writing to: also after `write` was left, if its wait for the thread was interrupted. They
must stay open then, or the number would soon be that of another file, and that one be written to."""

_idle: list[list[memoryview]] = []
_KEPT = 2
"""Sets of buffers that stay for the next file (24 MiB each)."""


def ready(size: int) -> None:
    """Have the buffers that are kept, and of their memory what a file of so many bytes needs, before it needs them.

    Not where no file is written in this way.
    """
    if sys.platform == "linux":
        _idle.extend(_fresh(_step(size)) for _ in range(_KEPT - len(_idle)))


def begin(handle: int, size: int) -> bool:
    """Prepare a new, empty file for `write`; False where its file system knows no such way: nothing was changed then.

    Raises OSError where there is no room for so many bytes.
    """
    if sys.platform != "linux":
        return False
    try:
        fs.system.unbuffered(handle, True)
    except OSError:
        return False
    try:
        # The blocks at once and the length with them: neither has to be found, nor made durable, at every write.
        fs.system.allocate(handle, size)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
    return True


def write(handle: int, chunks: Iterable[Any], size: int, each: Each | None = None) -> FileEntry:
    """Write these bytes to a file that `begin` prepared, from its start; their number and hash. Raises OSError.

    size: about how many there are. each: is given every byte, too.

    Nothing is being written any more then, unless `busy` says so.
    """
    whole, step = Sum(), _step(size)
    buffers = _buffers()
    out = _Out(handle, buffers)
    try:
        buffer, filled, hashed = out.free(), 0, 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while view:
                piece = view[: min(PIECE, step - filled)]
                buffer[filled : filled + len(piece)] = piece
                filled, view = filled + len(piece), view[len(piece) :]
                # What is hashed is what is written, even if somebody changes the tensor meanwhile.
                if each is not None:
                    each.update(buffer[filled - len(piece) : filled])
                if filled - hashed >= PIECE or filled == step:
                    whole.update(buffer[hashed:filled])
                    hashed = filled
                if filled == step:
                    out.put(buffer, filled)
                    buffer, filled, hashed = out.free(), 0, 0
        whole.update(buffer[hashed:filled])
        blocks = filled - filled % ALIGNED
        out.put(buffer, blocks)
        out.end()
    except BaseException:
        out.stop()
        raise
    out.tail(buffer[blocks:filled])
    if len(_idle) < _KEPT:
        _idle.append(buffers)
    return whole.entry()


class _Out:
    """What goes to the disk, in a thread of its own; in the caller's where the system has no more threads."""

    def __init__(self, handle: int, buffers: list[memoryview]) -> None:
        self._handle = handle
        self._direct = True
        self._error: BaseException | None = None
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._full: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        for buffer in buffers:
            self._free.put(buffer)
        # A daemon: no program has to wait for it to end, or hang there, whatever interrupts the line after this one.
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="lastgood-write", daemon=True)
        busy.add(handle)
        try:
            self._thread.start()
        except RuntimeError:  # a limit of the container, or the interpreter is about to end
            self._thread = None
            busy.discard(handle)

    def free(self) -> memoryview:
        """A buffer to fill. Raises what went wrong with those before it."""
        buffer = self._free.get()
        if self._error is not None:
            raise self._error
        return buffer

    def put(self, buffer: memoryview, count: int) -> None:
        """Have its first bytes written behind what was put before; the buffer is free again then."""
        if self._thread is None:
            self._write(buffer[:count])
            self._free.put(buffer)
        else:
            self._full.put((buffer, count))

    def end(self) -> None:
        """Wait until all is written. Raises what went wrong."""
        self._join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Leave out what isn't written yet, and wait for the one that is."""
        if self._error is None:
            self._error = InterruptedError()
        self._join()

    def tail(self, rest: memoryview) -> None:
        """What is less than a block goes through the page cache."""
        if rest and self._direct:
            self._buffered()
        self._write(rest)

    def _join(self) -> None:
        self._full.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (job := self._full.get()) is not None:
            buffer, count = job
            try:
                if self._error is None:
                    self._write(buffer[:count])
            except BaseException as error:
                self._error = error
            self._free.put(buffer)
        busy.discard(self._handle)

    def _write(self, view: memoryview) -> None:
        while view:
            try:
                view = view[fs.system.write(self._handle, view) :]
            except OSError as error:
                if not self._direct or error.errno not in REFUSED:
                    raise
                self._buffered()  # it took the flag and not the write: other alignments, or a layer in between
                continue
            if view and self._direct:
                self._buffered()  # after a short write the rest isn't aligned

    def _buffered(self) -> None:
        fs.system.unbuffered(self._handle, False)
        self._direct = False


def _buffers() -> list[memoryview]:
    try:
        return _idle.pop()  # in one step: another thread may be writing a file as well
    except IndexError:
        return _fresh()


def _fresh(there: int = 0) -> list[memoryview]:
    """there: so many bytes of each are faulted in."""
    found = [pages.mapped(BUFFER, large=True) for _ in range(BUFFERS)]
    for memory in found if there else ():
        if not pages.fault_in(memory, 0, there):  # Linux before 5.14
            for place in range(0, there, mmap.PAGESIZE):
                memory[place] = 0
    return [memoryview(memory) for memory in found]


def _step(size: int) -> int:
    """Bytes that the disk is asked for at a time, for a file of so many."""
    return min(BUFFER, max(STEP, size // STEPS // STEP * STEP))
