"""Every file operation of lastgood, written once.

Durable means: written to a file nobody sees yet, length checked, fsynced, renamed, and
the directory fsynced. Files are opened without following links. Errors of fsync and
close are never swallowed and never retried: after one, nothing is known about the data.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from lastgood.model import FileEntry

BLOCK = 1 << 17
"""Bytes read at a time when a file is hashed (128 KiB): they stay in the cache of the processor."""

# Each of these exists on some systems only; O_BINARY keeps Windows from translating line ends.
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE
# O_NONBLOCK: a FIFO in the place of a file must not hang the reader.
_READ = os.O_RDONLY | _SAFE | getattr(os, "O_NONBLOCK", 0)

Buffer = bytes | bytearray | memoryview


def write(path: Path, chunks: Iterable[Buffer], *, sync: bool = True) -> FileEntry:
    """Create `path` with these bytes; on an error it doesn't exist.

    sync: durable when this returns, but for its directory entry; otherwise `sync_files` has to follow.
    """
    hasher, total = blake3(), 0
    handle = os.open(path, _NEW, 0o666)
    try:
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                hasher.update(view)
                total += len(view)
                while view:
                    view = view[os.write(handle, view) :]
            if os.fstat(handle).st_size != total:
                raise OSError(5, "the file has another length than was written", os.fspath(path))
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException:
        os.unlink(path)
        raise
    return FileEntry(size=total, blake3=hasher.hexdigest())


def replace(path: Path, data: bytes) -> None:
    """Put `data` in the place of `path`, all or nothing, durably."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    write(temporary, [data])
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_dir(path.parent)


def torn(name: str, of: Collection[str]) -> bool:
    """Whether this is the temporary file of a `replace` of one of these names: what a crash in it leaves."""
    return name[:1] == "." and name[1:-9] in of and re.fullmatch(r"\.[0-9a-f]{8}", name[-9:]) is not None


def append(path: Path, data: bytes, *, sync: bool) -> None:
    """Add lines to the end in one write; a line before them that a crash tore doesn't spoil the first one."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _SAFE, 0o666)
    try:
        end = os.fstat(handle).st_size
        if end:
            os.lseek(handle, end - 1, os.SEEK_SET)
            if os.read(handle, 1) != b"\n":
                data = b"\n" + data
        written = os.write(handle, data)
        if written != len(data):
            raise OSError(28, f"{written} of {len(data)} bytes written", os.fspath(path))
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def touch(path: Path) -> None:
    """Give a directory the time of now."""
    os.utime(path)


def adopt(path: Path) -> FileEntry:
    """Size and hash of a file that a library wrote, which gets the mode that our own files have."""
    os.chmod(path, 0o666 & ~_umask())
    return digest(path)


def sync_files(paths: Sequence[Path]) -> None:
    """Make the content of files durable. At the same time: a journaling file system then commits them together."""

    def sync(path: Path) -> None:
        handle = os.open(path, os.O_RDWR | _SAFE)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    from concurrent.futures import ThreadPoolExecutor  # what only looks starts faster without

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(sync, paths))


def sync_dir(path: Path) -> None:
    """Make the names in a directory durable. Windows has no such call: there it rests on the file system."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path, files: Sequence[str]) -> None:
    """Make files (relative names) in a directory, their names and the directory's own name durable."""
    sync_files([directory / name for name in files])
    folders = {(directory / name).parent for name in files} | {directory, directory.parent}
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        sync_dir(folder)


def make_dirs(path: Path) -> None:
    """The directory and its parents; new names are durable in their parents."""
    missing = []
    at = path
    while not at.is_dir():
        if at.name == "..":  # whatever it led through is gone, and isn't ours to bring back
            raise FileNotFoundError(2, os.strerror(2), os.fspath(path))
        missing.append(at)
        at = at.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        sync_dir(directory.parent)


def rename(source: Path, target: Path) -> None:
    """Move to a name that must be free; the new name is durable when this returns. Raises FileExistsError."""
    if os.path.lexists(target):
        raise FileExistsError(17, "already exists", os.fspath(target))
    os.rename(source, target)
    sync_dir(target.parent)


def vanish(source: Path, grave: Path) -> None:
    """Move what is to be deleted out of sight. After a power cut it may be back as a whole, which harms nobody."""
    os.rename(source, grave)


def names(path: Path) -> list[str]:
    """Names in a directory, sorted; [] if it isn't there."""
    try:
        return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def folders(path: Path) -> list[str]:
    """Names of the directories in a directory, sorted, links to directories left out; [] if it isn't there."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read(path: Path | str, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; OSError otherwise."""
    handle = os.open(path, _READ)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(22, "not a regular file", os.fspath(path))
        if status.st_size > limit:
            raise OSError(27, f"{status.st_size} bytes, more than the {limit} expected", os.fspath(path))
        data = os.read(handle, status.st_size + 1)
        while len(data) < status.st_size and (more := os.read(handle, status.st_size - len(data))):
            data += more  # one call reads at most 2 GiB
        return data
    finally:
        os.close(handle)


def content(path: Path) -> tuple[bytearray, FileEntry]:
    """All bytes of a regular file, writable, with the hash of just these bytes."""
    hasher, at = blake3(), 0
    handle = os.open(path, _READ)
    with os.fdopen(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(22, "not a regular file", os.fspath(path))
        buffer = bytearray(status.st_size)
        view = memoryview(buffer)
        while at < len(buffer) and (count := file.readinto(view[at : at + BLOCK])):
            hasher.update(view[at : at + count])
            at += count
    if at != len(buffer):
        raise OSError(5, f"only {at} of {len(buffer)} bytes could be read", os.fspath(path))
    return buffer, FileEntry(size=at, blake3=hasher.hexdigest())


def size(path: Path | str) -> int | None:
    """Bytes of a regular file; None for anything else, a link included."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def digest(path: Path) -> FileEntry:
    """Size and hash of a regular file as it is on disk now."""
    hasher, total = blake3(), 0
    handle = os.open(path, _READ)
    with os.fdopen(handle, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(22, "not a regular file", os.fspath(path))
        buffer = bytearray(min(BLOCK, max(1, os.fstat(handle).st_size)))
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            hasher.update(view[:count])
            total += count
    return FileEntry(size=total, blake3=hasher.hexdigest())


_FICLONE = 0x40049409
"""ioctl(2) that shares the blocks of a file with another until one of them changes (linux/fs.h)."""


def clone(source: Path, target: Path) -> FileEntry:
    """An independent copy of a regular file, sharing blocks where the file system can; size and hash of the copy."""
    mode = os.lstat(source).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(22, "not a regular file", os.fspath(source))
    if _reflink(source, target):
        return digest(target)
    with open(os.open(source, _READ), "rb", buffering=0) as file:
        return write(target, iter(lambda: file.read(BLOCK), b""), sync=False)


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    with open(os.open(source, _READ), "rb") as old, open(os.open(target, _NEW, 0o666), "wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return True
        except OSError:
            pass
    os.unlink(target)
    return False


def unlink(path: Path) -> None:
    """Remove a file if it is there."""
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it; links are removed, not followed."""
    with os.scandir(path) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(Path(entry.path))
            else:
                os.unlink(entry.path)
    os.rmdir(path)


def remove(path: Path) -> None:
    """Remove whatever is there under this name; a link itself, never what it points to."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        unlink(path)


def free(path: Path) -> tuple[int, int]:
    """(bytes, inodes) that we may still use; inodes is -1 where the file system doesn't count them."""
    if not hasattr(os, "statvfs"):
        import shutil

        return shutil.disk_usage(path).free, -1
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize, status.f_favail if status.f_files else -1


def _umask() -> int:
    # The only portable way to read it is to set it. Worker threads of ours never create files meanwhile.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
