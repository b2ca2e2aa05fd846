"""Every file operation of lastgood, written once, on top of the calls in `fs`.

Durable means: written to a file nobody sees yet, length checked, fsynced, renamed, and
the directory fsynced. Files are opened without following links. Errors of fsync and
close are never swallowed and never retried: after one, nothing is known about the data.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from lastgood.model import FileEntry
from lastgood.store import direct, fs
from lastgood.store.checksum import NOW, Each, Kind, Sum
from lastgood.store.together import together

BLOCK = 1 << 20
"""Bytes read at a time when a file is hashed (1 MiB): they stay in the cache of the processor, and the interpreter,
whose lock is given back for each of them, isn't asked too often."""

SYNCS = 16
"""Files that are made durable at the same time: a commit of the file system's journal serves all that ask by then."""

# Each of these exists on some systems only; O_BINARY keeps Windows from translating line ends.
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE
# O_NONBLOCK: a FIFO in the place of a file must not hang the reader.
_READ = os.O_RDONLY | _SAFE | getattr(os, "O_NONBLOCK", 0)

_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES", "EPERM", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "EINTR", "EBUSY", "ESTALE", "ETIMEDOUT", "ENOTCONN",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ECONNREFUSED", "ECONNRESET", "EKEYEXPIRED",
    )
    if hasattr(errno, name)
)  # fmt: skip

S = TypeVar("S")
T = TypeVar("T")

Buffer = bytes | bytearray | memoryview


def write(
    path: Path, chunks: Iterable[Buffer], *, size: int | None = None, sync: bool = True, each: Each | None = None
) -> FileEntry:
    """Create `path` with these bytes; on an error it doesn't exist.

    size: how many there are, if that is known: a large file goes past the page cache then, where that is possible.
    sync: durable when this returns, but for its directory entry; otherwise `sync_all` has to follow.
    each: hashes the bytes as they are written.
    """
    handle = fs.system.open(path, _NEW)
    try:
        try:
            if size is not None and size >= direct.LARGE and direct.begin(handle, size):
                entry = direct.write(handle, chunks, size, each)
            else:
                entry = _fill(handle, chunks, each)
            if os.fstat(handle).st_size != entry.size:
                raise OSError(5, "the file has another length than was written", os.fspath(path))
            if sync:
                fs.system.sync(handle)
        finally:
            if handle not in direct.busy:
                fs.system.close(handle)
    except BaseException:
        fs.system.unlink(path)
        raise
    return entry


def _fill(handle: int, chunks: Iterable[Buffer], each: Each | None) -> FileEntry:
    whole = Sum()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        whole.update(view)
        if each is not None:
            each.update(view)
        while view:
            view = view[fs.system.write(handle, view) :]
    return whole.entry()


def replace(path: Path, data: bytes) -> None:
    """Put `data` in the place of `path`, all or nothing, durably."""
    temporary = path.with_name(f".{path.name}.{fs.system.token(4)}")
    write(temporary, [data])
    try:
        fs.system.replace(temporary, path)
    except BaseException:
        fs.system.unlink(temporary)
        raise
    sync_dir(path.parent)


def torn(name: str, of: Collection[str]) -> bool:
    """Whether this is the temporary file of a `replace` of one of these names: what a crash in it leaves."""
    return name[:1] == "." and name[1:-9] in of and re.fullmatch(r"\.[0-9a-f]{8}", name[-9:]) is not None


def append(path: Path, data: bytes, *, sync: bool) -> None:
    """Add lines to the end in one write; a line before them that a crash tore doesn't spoil the first one."""
    handle = fs.system.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _SAFE)
    try:
        end = os.fstat(handle).st_size
        if end:
            os.lseek(handle, end - 1, os.SEEK_SET)
            if fs.system.read(handle, 1) != b"\n":
                data = b"\n" + data
        written = fs.system.write(handle, data)
        if written != len(data):
            raise OSError(28, f"{written} of {len(data)} bytes written", os.fspath(path))
        if sync:
            fs.system.sync(handle)
    finally:
        fs.system.close(handle)


def touch(path: Path) -> None:
    """Give a directory the time of now."""
    fs.system.touch(path)


def adopt(path: Path) -> FileEntry:
    """Size and hash of a file that a library wrote, which gets the mode that our own files have."""
    fs.system.chmod(path, 0o666 & ~_umask())
    return digest(path)


def sync_all(files: Sequence[Path], folders: Sequence[Path]) -> None:
    """Make the content of files and the names in directories durable, all at the same time."""
    acts = [*(partial(_sync_file, path) for path in files), *(partial(sync_dir, path) for path in folders)]
    together(acts, limit=SYNCS)


def reopened(path: Path) -> int:
    """A descriptor of a file that is there, to change or to sync it; whoever asks closes it."""
    return fs.system.open(path, os.O_RDWR | _SAFE)


def _sync_file(path: Path) -> None:
    handle = reopened(path)
    try:
        fs.system.sync(handle)
    finally:
        fs.system.close(handle)


def at_once(act: Callable[[S], T], items: Iterable[S], *, limit: int = 4) -> list[T]:
    """`act` of each, in their order, as many at the same time as the system is to be asked, and at most `limit`."""
    every = list(items)
    found: dict[int, T] = {}

    def one(number: int) -> None:
        found[number] = act(every[number])

    together([partial(one, number) for number in range(len(every))], limit=min(fs.system.workers, limit))
    return [found[number] for number in range(len(every))]


def sync_dir(path: Path) -> None:
    """Make the names in a directory durable. Windows has no such call: there it rests on the file system."""
    if os.name == "nt":
        return
    handle = fs.system.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        fs.system.sync(handle)
    finally:
        fs.system.close(handle)


def sync_tree(directory: Path, files: Sequence[str]) -> None:
    """Make files (relative names) in a directory, their names and the directory's own name durable."""
    folders = {(directory / name).parent for name in files} | {directory, directory.parent}
    sync_all([directory / name for name in files], sorted(folders, key=lambda path: -len(path.parts)))


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
        make_dir(directory)
        sync_dir(directory.parent)


def make_dir(path: Path, *, fresh: bool = False) -> None:
    """One directory, whose name isn't durable yet. fresh: raises FileExistsError if it is there."""
    try:
        fs.system.mkdir(path)
    except FileExistsError:
        if fresh or not path.is_dir():
            raise


def make_parents(path: Path, within: Path) -> None:
    """The directories between one that is there and a file in it; their names aren't durable yet."""
    for folder in reversed(path.parents[: len(path.relative_to(within).parts) - 1]):
        make_dir(folder)


def rename(source: Path, target: Path) -> None:
    """Move to a name that must be free; the new name is durable when this returns. Raises FileExistsError."""
    if os.path.lexists(target):
        raise FileExistsError(17, "already exists", os.fspath(target))
    fs.system.rename(source, target)
    sync_dir(target.parent)


def vanish(source: Path, grave: Path) -> None:
    """Move what is to be deleted out of sight. After a power cut it may be back as a whole, which harms nobody."""
    fs.system.rename(source, grave)


def passing(error: OSError) -> bool:
    """Whether a read failed for a reason that says nothing about the file: a limit, a right, a server that is away.

    What can't be read for such a reason may be good, so nothing must be decided as if it were damaged or missing.
    """
    return error.errno in _PASSING


def names(path: Path) -> list[str]:
    """Names in a directory, sorted; [] if it isn't there."""
    try:
        return sorted(fs.system.names(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def folders(path: Path) -> list[str]:
    """Names of the directories in a directory, sorted, links to directories left out; [] if it isn't there."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def tried_again(act: Callable[[], T]) -> T:
    """File servers report a connection that was lost for a moment as EIO: a broken disk fails twice."""
    try:
        return act()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return act()


def read(path: Path | str, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; OSError otherwise."""
    return tried_again(lambda: _read(path, limit))


def _read(path: Path | str, limit: int) -> bytes:
    handle = fs.system.open(path, _READ)
    try:
        size = _regular(handle, path)
        if size > limit:
            raise OSError(27, f"{size} bytes, more than the {limit} expected", os.fspath(path))
        data = fs.system.read(handle, size + 1)
        while len(data) < size and (more := fs.system.read(handle, size - len(data))):
            data += more  # one call reads at most 2 GiB
        return data
    finally:
        fs.system.close(handle)


def opened(path: Path | str) -> io.FileIO:
    """A regular file to read from, unbuffered, without following a link or waiting for whoever writes to a FIFO."""
    handle = fs.system.open(path, _READ)
    try:
        _regular(handle, path)
        return io.FileIO(handle, "rb")
    except BaseException:
        fs.system.close(handle)
        raise


def _regular(handle: int, path: Path | str) -> int:
    """Bytes of an open file. Raises OSError if it is anything else."""
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(22, "not a regular file", os.fspath(path))
    return status.st_size


def size(path: Path | str) -> int | None:
    """Bytes of a regular file; None for anything else, a link included."""
    try:
        status = fs.system.status(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def digest(path: Path, kind: Kind = NOW) -> FileEntry:
    """Size and hash of a regular file as it is on disk now. kind: of the entry that it is compared with."""
    return tried_again(lambda: _digest(path, kind))


def _digest(path: Path, kind: Kind) -> FileEntry:
    whole = Sum(kind)
    handle = fs.system.open(path, _READ)
    try:
        view = memoryview(bytearray(min(BLOCK, max(1, _regular(handle, path)))))
        while count := fs.system.read_into(handle, view):
            whole.update(view[:count])
    finally:
        fs.system.close(handle)
    return whole.entry()


def clone(source: Path, target: Path, kind: Kind = NOW) -> FileEntry:
    """An independent copy of a regular file, sharing blocks where the file system can; size and hash of the copy.

    kind: as `digest`.
    """
    if not stat.S_ISREG(fs.system.status(source).st_mode):
        raise OSError(22, "not a regular file", os.fspath(source))
    if _shared(source, target):
        return digest(target, kind)
    with opened(source) as file:
        copied = write(target, iter(lambda: file.read(BLOCK), b""), sync=False)
    return copied if kind == NOW else digest(target, kind)


def _shared(source: Path, target: Path) -> bool:
    """Whether the blocks could be shared; if not, there is no target."""
    old = fs.system.open(source, _READ)
    try:
        new = fs.system.open(target, _NEW)
        try:
            fs.system.clone(old, new)
            return True
        except (OSError, ImportError):
            pass
        finally:
            fs.system.close(new)
    finally:
        fs.system.close(old)
    fs.system.unlink(target)
    return False


def unlink(path: Path) -> None:
    """Remove a file if it is there."""
    with suppress(FileNotFoundError):
        fs.system.unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it; links are removed, not followed."""
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(Path(entry.path))
            else:
                fs.system.unlink(entry.path)
    fs.system.rmdir(path)


def remove(path: Path) -> None:
    """Remove whatever is there under this name; a link itself, never what it points to."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        unlink(path)


def free(path: Path) -> tuple[int, int]:
    """(bytes, inodes) that we may still use; inodes is -1 where the file system doesn't count them."""
    return fs.system.free(path)


def _umask() -> int:
    # The only portable way to read it is to set it. Worker threads of ours never create files meanwhile.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
