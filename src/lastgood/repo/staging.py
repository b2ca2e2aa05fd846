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
from pathlib import Path

from lastgood.errors import LastgoodError, NotEnoughSpace, SaveFailed
from lastgood.format import tensors as safetensors
from lastgood.format.manifest import safe_name
from lastgood.model import FileEntry
from lastgood.repo.layout import hidden, new_id, plain
from lastgood.store import local
from lastgood.store.quota import left

FULL = (errno.ENOSPC, errno.EDQUOT)

Content = bytes | memoryview | Callable[[], bytes]
"""Of a file: itself, or a function that makes it when it is written."""


@dataclass(slots=True)
class Staging:
    """path: the directory, for libraries that write files of their own. files and parts: what is registered so far.

    seconds: spent on what: "hash" (digests of tensors), "write" (with the hash of each file), "sync", "copy".
    """

    root: Path
    id: str
    files: dict[str, FileEntry] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

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
        ready: Callable[[str], object] | None = None,
    ) -> tuple[safetensors.Tensor, ...]:
        """Write a safetensors file; returns what is in it. Raises SaveFailed or NotEnoughSpace.

        ready: returns as soon as the bytes of the tensor of that name are there.
        """
        entries = tuple(tensors)
        size, chunks = safetensors.encode(entries, metadata, ready)
        self._write(name, part, lambda path: local.write(path, chunks, size=size, sync=False))
        return entries

    def data(self, name: str, part: str, content: Content) -> None:
        """Write a file with this content. Raises SaveFailed or NotEnoughSpace."""
        started = time.perf_counter()
        made = content() if callable(content) else content
        if callable(content):
            self._spent("hash", started)
        self._write(name, part, lambda path: local.write(path, [made], sync=False))

    def adopt(self, part: str) -> None:
        """Take in what libraries wrote into the directory; links and devices are refused."""
        started = time.perf_counter()
        for name, path in written_by_libraries(self.directory):
            if name not in self.files:
                with explained(path):
                    self._add(name, part, local.adopt(path))
        self._spent("write", started)

    def sync(self) -> None:
        """Make everything in it durable; only then may the manifest be written."""
        with explained(self.directory):
            local.sync_files([self.directory / name for name in self.files])

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

    def _write(self, name: str, part: str, write: Callable[[Path], FileEntry]) -> None:
        path, started = self.directory / name, time.perf_counter()
        with explained(path):
            local.make_parents(path, self.directory)
            entry = write(path)
        self._add(name, part, entry)
        self._spent("write", started)

    def _spent(self, on: str, since: float) -> None:
        self.seconds[on] = self.seconds.get(on, 0.0) + time.perf_counter() - since

    def _add(self, name: str, part: str, entry: FileEntry) -> None:
        if not safe_name(name):
            raise SaveFailed(f"{name!r} can't be the name of a file in a checkpoint", hint="rename what writes it")
        self.files[name] = entry
        self.parts.setdefault(part, []).append(name)


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
