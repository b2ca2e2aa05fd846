"""Memory that nobody has touched yet, private to this process: a bytearray would be filled with zeros first."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

POPULATE_WRITE = 23
"""madvise(2), MADV_POPULATE_WRITE: since Linux 5.14, and without a name in Python."""

# A shared mapping would show a forked child what its parent writes, and the other way round.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


def mapped(size: int, *, large: bool = False) -> mmap.mmap:
    """So many bytes, at least one. Raises OSError, ValueError, OverflowError or MemoryError where there aren't.

    large: in large pages, where the system has some to give. Small ones lie about in the machine's memory: each is
    cleared by a fault of its own, and a disk that is to read them itself takes fewer at a time.
    """
    memory = mmap.mmap(-1, size, **_PRIVATE)
    if large:
        advise(memory, "MADV_HUGEPAGE")
    return memory


def advise(memory: mmap.mmap, what: str) -> None:
    """Tell the system what it is for, if it wants to know (madvise(2))."""
    with suppress(OSError, AttributeError):
        memory.madvise(getattr(mmap, what))


def fault_in(memory: mmap.mmap, begin: int, count: int) -> bool:
    """Have these bytes of what was `mapped` there before they are needed.

    False where the system does that only as they are touched. The interpreter is free meanwhile, unlike in a call of
    `madvise` of Python's: a virtual machine may get its memory at half a gigabyte a second, and training would stand
    still for that.
    """
    if sys.platform != "linux":
        return False
    import ctypes  # what only looks starts faster without

    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory, begin))
    return bool(call(place, count, POPULATE_WRITE) == 0)
