"""The seam to the operating system: every call on files that lastgood makes goes through `system`.

The real one does what `os` does. Another one can be put in its place, to make calls fail, to stop at one of
them as a crash would, or to write down what a power cut could leave: see `lastgood.testing`.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SEEKING = threading.Lock()
"""Where a system can't read at a place: nobody else moves there in between."""

AnyPath = str | os.PathLike[str]

CLONE = 0x40049409
"""ioctl(2) that shares the blocks of a file with another until one of them changes (FICLONE in linux/fs.h)."""


class FileSystem:
    """What the operating system does, call by call. Each raises OSError as `os` does.

    Methods that change the disk are called by `lastgood.store.local` alone: one name here is one thing that can fail.
    """

    workers = 4
    """Calls that may be under way at the same time."""

    # ---- changing ------------------------------------------------------------------------

    def open(self, path: AnyPath, flags: int, mode: int = 0o666) -> int:
        """A descriptor; with O_CREAT it changes the disk, else it only looks."""
        return os.open(path, flags, mode)

    def write(self, handle: int, data: bytes | memoryview) -> int:
        """Bytes written: maybe fewer than there are."""
        return os.write(handle, data)

    def sync(self, handle: int) -> None:
        """Make a file's content, or a directory's names, durable."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Some file systems report here that a write failed."""
        os.close(handle)

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        """Windows refuses a target that is there, the others replace it."""
        os.rename(source, target)

    def replace(self, source: AnyPath, target: AnyPath) -> None:
        """A target that is there is replaced, everywhere."""
        os.replace(source, target)

    def unlink(self, path: AnyPath) -> None:
        """Remove a file or a link."""
        os.unlink(path)

    def mkdir(self, path: AnyPath) -> None:
        """Raises FileExistsError too."""
        os.mkdir(path)

    def rmdir(self, path: AnyPath) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def chmod(self, path: AnyPath, mode: int) -> None:
        """Give a file its mode."""
        os.chmod(path, mode)

    def touch(self, path: AnyPath) -> None:
        """Give it the time of now."""
        os.utime(path)

    def clone(self, source: int, target: int) -> None:
        """Share the blocks of one open file with another (Linux, some file systems)."""
        import fcntl

        fcntl.ioctl(target, CLONE, source)

    def unbuffered(self, handle: int, on: bool) -> None:
        """Whether writes go past the page cache from now on (O_DIRECT). A file system that can't refuses."""
        import fcntl

        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def allocate(self, handle: int, size: int) -> None:
        """Give an empty file this length, all zeroes, and the blocks for it (fallocate(2), Linux).

        Not posix_fallocate: where a file system can't, glibc writes a byte to each block, which takes for ever over
        a network.
        """
        import ctypes

        if sys.maxsize < 1 << 32:  # there its numbers are of another size
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        call = ctypes.CDLL(None, use_errno=True).fallocate
        call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        while call(handle, 0, 0, size):
            if (number := ctypes.get_errno()) != errno.EINTR:
                raise OSError(number, os.strerror(number))

    def truncate(self, handle: int, size: int) -> None:
        """Cut an open file off behind so many bytes."""
        os.ftruncate(handle, size)

    # ---- looking -------------------------------------------------------------------------

    def read(self, handle: int, count: int) -> bytes:
        """At most `count` bytes."""
        return os.read(handle, count)

    def read_into(self, handle: int, buffer: memoryview) -> int:
        """Bytes read into the beginning of `buffer`; 0 at the end of the file."""
        return os.readv(handle, [buffer]) if hasattr(os, "readv") else _read_into(handle, buffer)

    def read_at(self, handle: int, buffer: memoryview, at: int) -> int:
        """The same from byte `at` on, wherever others read: several threads may share the handle."""
        if hasattr(os, "preadv"):
            return os.preadv(handle, [buffer], at)
        with _SEEKING:
            os.lseek(handle, at, os.SEEK_SET)
            return self.read_into(handle, buffer)

    def cached(self, handle: int, buffer: memoryview, at: int) -> int | None:
        """As `read_at`, but nothing that the disk would have to be asked for: 0 if the first byte is not in memory.

        None where the system can't say (preadv2(2), RWF_NOWAIT, Linux).
        """
        if not hasattr(os, "RWF_NOWAIT"):
            return None
        try:
            return os.preadv(handle, [buffer], at, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def status(self, path: AnyPath) -> os.stat_result:
        """Of the link itself, if it is one."""
        return os.lstat(path)

    def names(self, path: AnyPath) -> list[str]:
        """In a directory, in any order."""
        return os.listdir(path)

    def free(self, path: AnyPath) -> tuple[int, int]:
        """(bytes, inodes) that we may still use; inodes is -1 where the file system doesn't count them."""
        if not hasattr(os, "statvfs"):
            import shutil

            return shutil.disk_usage(path).free, -1
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize, status.f_favail if status.f_files else -1

    def alone(self, handle: int) -> bool:
        """Whether nobody else has this file open, or mapped, on this machine; False where the system doesn't say.

        By asking for a lease on it (fcntl(2), F_SETLEASE, Linux) and giving it back at once.
        """
        if sys.platform != "linux":
            return False
        import fcntl
        import signal

        try:
            # Who opens it in between makes the system tell us, by a signal that ends no process.
            fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        return True

    def token(self, count: int) -> str:
        """Hex digits for a name that nobody else has, two for each of `count` bytes."""
        return os.urandom(count).hex()


_HERE = os.getpid()


def forked() -> bool:
    """Whether this process was forked since: then the threads that libraries keep for their work stayed behind.

    Whoever asks them for something there waits for ever.
    """
    return os.getpid() != _HERE


system = FileSystem()
"""The one in use, in this process."""


@contextmanager
def using(other: FileSystem) -> Iterator[None]:
    """Put another in its place, for all threads of this process. Not for training: for what tests training."""
    global system  # noqa: PLW0603
    before, system = system, other
    try:
        yield
    finally:
        system = before


def _read_into(handle: int, buffer: memoryview) -> int:
    data = os.read(handle, len(buffer))
    buffer[: len(data)] = data
    return len(data)
