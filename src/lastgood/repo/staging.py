"""A checkpoint on its way: files are written to `.lastgood/tmp/<id>/`, where no reader looks."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lastgood.errors import LastgoodError, NotEnoughSpace, SaveFailed
from lastgood.format import digests
from lastgood.format import tensors as safetensors
from lastgood.format.manifest import safe_name
from lastgood.model import FileEntry
from lastgood.repo.layout import MANIFEST, hidden, new_id, plain
from lastgood.store import local
from lastgood.store.checksum import Each
from lastgood.store.quota import left
from lastgood.store.together import together

FULL = (errno.ENOSPC, errno.EDQUOT)

WRITERS = 2
"""Files that are written at the same time: while one waits for the disk, the other is copied and hashed."""
APART = 1 << 20
"""Bytes (1 MiB) of all files together from which on a second thread is worth its start."""
CORES = 8
"""From so many cores on also where training goes on meanwhile: with fewer it needs them itself."""

PIECE = 8 << 20
"""Bytes (8 MiB) after which it is asked whether the rest is still to be written."""

Content = bytes | memoryview | Callable[[], bytes]
"""Of a file: itself, or a function that makes it when it is written."""

Ordered = Callable[[str, Iterable[safetensors.Tensor]], list[safetensors.Tensor]]


def as_they_come(name: str, tensors: Iterable[safetensors.Tensor]) -> list[safetensors.Tensor]:
    """Nothing is known of them from the last save."""
    return safetensors.ordered(tensors)


@dataclass(slots=True)
class Staging:
    """Takes what a checkpoint is to hold; `flush` puts it on the disk, and nothing may change before.

    path: the directory, for libraries that write files of their own. parts: the names that were taken so far; files:
    what is written. writers: files at the same time. check: called again and again while tensors are written; what it
    raises ends that. seconds: spent on what: "hash" (making tensors.json of the hashes), "write" (with all hashing),
    "sync", "copy". ordered: the tensors of the file of that name, as they come in it.
    """

    root: Path
    id: str
    files: dict[str, FileEntry] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    writers: int = WRITERS
    check: Callable[[], object] | None = None
    ordered: Ordered = as_they_come
    _waiting: dict[str, tuple[int, Callable[[Path], FileEntry]]] = field(default_factory=dict)  # with their bytes
    _about: dict[str, Callable[[Path], FileEntry]] = field(default_factory=dict)  # what is made when those are written

    @property
    def directory(self) -> Path:
        return hidden(self.root, "tmp", self.id)

    @property
    def path(self) -> str:
        return os.fspath(self.directory)

    def tensors(
        self,
        name: str,
        part: str,
        tensors: Iterable[safetensors.Tensor],
        metadata: Mapping[str, str] | None = None,
        *,
        told: dict[str, str] | None = None,
        ready: Callable[[str], object] | None = None,
    ) -> None:
        """A safetensors file. told: gets name -> digest of what is in it, hashed as it is written. ready: returns as
        soon as the bytes of the tensor of that name are there.

        Raises SaveFailed, and UsageError for what no file can hold.
        """
        entries = self.ordered(name, tensors)
        size, chunks = safetensors.laid_out(entries, metadata, ready)

        def write(path: Path) -> FileEntry:
            sizes = [len(entry.data) for entry in entries]
            each = None if told is None else Each([size - sum(sizes), *sizes])
            pieces = chunks if self.check is None else checked(chunks, self.check)
            written = local.write(path, pieces, size=size, sync=False, each=each)
            if told is not None and each is not None:
                told.update(digests.told(entries, each.told[1:]))  # behind the header
            return written

        self._take(name, part, write, size)

    def data(self, name: str, part: str, content: Content) -> None:
        """A file with this content; a function is called when the others have been written. Raises SaveFailed."""
        if not callable(content):
            self._take(name, part, lambda path: local.write(path, [content], sync=False), len(content))
            return

        def write(path: Path) -> FileEntry:
            started = time.perf_counter()
            made = content()
            self._spent("hash", started)
            return local.write(path, [made], sync=False)

        self._name(name, part)
        self._about[name] = write

    def adopt(self, part: str) -> None:
        """Take in what libraries wrote into the directory; links and devices are refused."""
        started = time.perf_counter()
        for name, path in written_by_libraries(self.directory):
            if name not in self.files:
                with explained(path):
                    self._name(name, part)
                    self.files[name] = local.adopt(path)
        self._spent("write", started)

    def flush(self) -> None:
        """Write all that was taken, some of it at the same time; it isn't durable yet.

        At once, and not as each was taken: only then nobody's code runs any more, which could change it meanwhile.
        Raises SaveFailed or NotEnoughSpace.
        """
        started, made = time.perf_counter(), dict[str, FileEntry]()
        count = self.writers if sum(size for size, _ in self._waiting.values()) >= APART else 1
        large_first = sorted(self._waiting.items(), key=lambda item: -item[1][0])  # the last one keeps all waiting
        todo, about = {name: write for name, (_, write) in large_first}, self._about
        self._waiting, self._about = {}, {}

        def act(name: str, write: Callable[[Path], FileEntry]) -> None:
            path = self.directory / name
            with explained(path):
                local.make_parents(path, self.directory)
                made[name] = write(path)

        try:
            for some in (todo, about):
                together([partial(act, name, write) for name, write in some.items()], limit=count)
        finally:  # also of a save that fails it is good to know how much room it took
            self.files |= {name: made[name] for name in (*todo, *about) if name in made}
            self._spent("write", started)

    def sync(self) -> None:
        """Make everything in it durable, the names as well: all at the same time, so that one commit of the file
        system's journal serves for all."""
        with explained(self.directory):
            local.sync_all([self.directory / name for name in (*self.files, MANIFEST)], self.directories())

    def discard(self) -> None:
        """Remove it; what can't be removed now goes with the next sweep."""
        try:
            local.remove_tree(self.directory)
        except OSError:
            return

    def directories(self) -> list[Path]:
        """Every directory of it, the innermost first."""
        inner = {self.directory.joinpath(*name.split("/")[:-1]) for name in self.files}
        return sorted(inner | {self.directory}, key=lambda path: -len(path.parts))

    def _take(self, name: str, part: str, write: Callable[[Path], FileEntry], size: int) -> None:
        self._name(name, part)
        self._waiting[name] = size, write

    def _spent(self, on: str, since: float) -> None:
        self.seconds[on] = self.seconds.get(on, 0.0) + time.perf_counter() - since

    def _name(self, name: str, part: str) -> None:
        if not safe_name(name):
            raise SaveFailed(f"{name!r} can't be the name of a file in a checkpoint", hint="rename what writes it")
        if name in self.files or name in self._waiting or name in self._about:
            raise SaveFailed(f"two files of a checkpoint are called {name!r}", hint="rename what writes one of them")
        self.parts.setdefault(part, []).append(name)


def checked(
    chunks: Iterable[bytes | memoryview], check: Callable[[], object], piece: int = PIECE
) -> Iterator[memoryview]:
    """The same bytes, piece by piece, with a call of `check` before each: a tensor may have gigabytes."""
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for place in range(0, len(view), piece):
            check()
            yield view[place : place + piece]


def beside_training() -> int:
    """Files that are written at the same time while training goes on."""
    return WRITERS if (os.cpu_count() or 1) >= CORES else 1


def open_staging(root: Path) -> Staging:
    """A new, empty one. Raises SaveFailed or NotEnoughSpace."""
    staging = Staging(root, new_id())
    with explained(staging.directory):
        local.make_dirs(staging.directory.parent)
        local.make_dir(staging.directory, fresh=True)
    return staging


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """OSErrors inside become SaveFailed or NotEnoughSpace, with errno, path and what is left of the disk."""
    try:
        yield
    except SaveFailed:
        raise
    except OSError as error:
        raise failure(path, error) from error


def failure(path: Path, error: OSError) -> SaveFailed:
    """The SaveFailed for an OSError at `path`."""
    kind, path = NotEnoughSpace if error.errno in FULL else SaveFailed, plain(path)
    try:
        space, _ = local.free(path.parent)
        left = f", {space} bytes free"
    except OSError:
        left = ""
    hint = "free space or keep fewer checkpoints" if kind is NotEnoughSpace else "check the disk and its permissions"
    failed = kind(f"{path}: {error.strerror or error} (errno {error.errno}{left})", hint=hint)
    failed.errno = error.errno
    return failed


_TOLD = re.compile(r"No space left on device|Disk quota exceeded|(os error |Errno )(28|122)\b", re.IGNORECASE)


def lacked_room(root: Path, error: BaseException) -> NotEnoughSpace | None:
    """The same error as one that says so, if the disk, the inodes or the quota are used up; None for any other.

    To be asked before what was written is removed: libraries hide the system's reason (torch.save: RuntimeError,
    "unexpected pos"; safetensors: a SafetensorError), so the disk is asked, too.
    """
    if isinstance(error, NotEnoughSpace):
        return error
    if isinstance(error, OSError) and error.errno in FULL:
        lack = failure(hidden(root), error)
        return lack if isinstance(lack, NotEnoughSpace) else None
    if isinstance(error, (LastgoodError, KeyboardInterrupt, SystemExit, GeneratorExit)):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return None
    try:
        used_up = 0 in left(root)
    except OSError:  # the disk itself is gone
        used_up = False
    if not used_up and not _TOLD.search(str(error)):
        return None
    return NotEnoughSpace(
        f"{root}: {type(error).__name__}: {error}; nothing is left of the disk, of its inodes or of the quota",
        hint="free space or keep fewer checkpoints",
    )


def written_by_libraries(directory: Path, prefix: str = "") -> list[tuple[str, Path]]:
    """(name in the checkpoint, path) of every file in a staging directory. Raises SaveFailed for links and devices."""
    found = []
    for name in local.names(directory):
        path = directory / name
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            found += written_by_libraries(path, f"{prefix}{name}/")
        elif stat.S_ISREG(mode):
            found.append((prefix + name, path))
        else:
            raise SaveFailed(f"{path} is neither a file nor a directory", hint="a checkpoint holds plain files alone")
    return found
