"""`records`: the one definition of "this checkpoint exists".

Resume, retention, latest, best and every listing call it; nobody looks at directories on
their own. It opens nothing but manifests and metrics, changes nothing, and whatever is in
one directory can't hide the others.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from lastgood.errors import CorruptCheckpoint, Unreadable
from lastgood.format import manifest as codec
from lastgood.model import Manifest, Record, placed
from lastgood.repo import metrics, pins, poison
from lastgood.repo.layout import step_of
from lastgood.repo.run import read_head, read_run
from lastgood.store import local

LAST_WRITTEN = "trainer_state.json"
"""What a stock Trainer writes at the end of a save."""


def records(root: Path, *, outline: bool = False, sure: bool = False) -> tuple[Record, ...]:
    """Every directory that is named like a checkpoint, by (step, number). () for a run that isn't there.

    outline: leave out arguments and environment, for listings; never write such a manifest back. sure: raise Unreadable
    if something couldn't be looked at just now. Whoever resumes or deletes needs that: with too many files open a good
    checkpoint looks like a damaged one, and the run would go on from an older one.
    """
    try:
        run, held, base = identify(root, sure=sure), held_by(root), os.fspath(root)
        marked = poison.marks(root, sure=sure)
        decode = codec.outline if outline else codec.decode
        found = [
            _record(root, f"{base}/{name}", name, step, run, held, marked, decode, sure)
            for name in local.folders(root)
            if (step := step_of(name)) is not None
        ]
        return placed(found, read_head(root, run, sure=sure))
    except OSError as error:
        if sure and local.passing(error):
            raise unreadable(error.filename or root, error) from error
        raise


def unreadable(what: object, error: OSError) -> Unreadable:
    """The Unreadable for this error."""
    failed = Unreadable(
        f"{what} can't be read: {error.strerror or error}; nothing was decided or changed",
        hint="see to the cause (open files, permissions, the file server) and start again",
    )
    failed.errno = error.errno
    return failed


def identify(root: Path, *, sure: bool = False) -> str | None:
    """The id of the run in this directory. A lost run.json doesn't make its checkpoints foreign: they name it too.

    sure: see `records`.
    """
    run = read_run(root, sure=sure)
    if run is not None:
        return run
    told = set()
    for name in local.names(root):
        if step_of(name) is not None:
            try:
                told.add(codec.outline(local.read(root / name / codec.NAME, codec.LIMIT), codec.NAME).run)
            except OSError as error:
                if sure and local.passing(error):
                    raise
            except CorruptCheckpoint:
                continue
    return told.pop() if len(told) == 1 else None


def _record(
    root: Path,
    directory: str,
    name: str,
    step: int,
    run: str | None,
    held: Mapping[str, tuple[str, ...]],
    marked: Mapping[str, str],
    decode: Callable[[bytes, str], Manifest],
    sure: bool,
) -> Record:
    try:
        data = local.read(f"{directory}/{codec.NAME}", codec.LIMIT)
    except FileNotFoundError:
        return Record(name=name, step=step, state="stock")
    except OSError as error:
        if sure and local.passing(error):
            raise unreadable(f"{directory}/{codec.NAME}", error) from error
        return Record(name=name, step=step, state="incomplete", problem=f"{codec.NAME}: {error.strerror or error}")
    try:
        manifest = decode(data, codec.NAME)
    except codec.NewerFormat as error:
        return Record(name=name, step=step, state="foreign", problem=error.message)
    except CorruptCheckpoint as error:
        return Record(name=name, step=step, state="incomplete", problem=error.message)
    if manifest.run != run:
        return Record(name=name, step=step, state="foreign", manifest=manifest, problem="belongs to another run")
    if manifest.layout and rewritten(directory, manifest):
        return Record(name=name, step=step, state="stock")
    problem = missing(directory, manifest, sure=sure)
    if problem:
        names = held.get(manifest.id, ())  # what is held stays held when it loses a file
        return Record(name=name, step=step, state="incomplete", manifest=manifest, problem=problem, pinned=names)
    return Record(
        name=name,
        step=manifest.step,
        state="full" if manifest.full else "weights",
        manifest=manifest,
        metrics=metrics.read(root, manifest.id, sure=sure),
        pinned=held.get(manifest.id, ()),
        poisoned=poison.reason(manifest, marked),
        layout=manifest.layout,
    )


def whole(root: Path, record: Record) -> Manifest | None:
    """The manifest with all its fields: listings read an outline of it. None if it can't be read any more."""
    try:
        return codec.decode(local.read(root / record.name / codec.NAME, codec.LIMIT), codec.NAME)
    except (OSError, CorruptCheckpoint):
        return None


def id_at(path: Path) -> str | None:
    """The id of the checkpoint in a directory; None where there is none, or none that can be read."""
    with suppress(OSError, CorruptCheckpoint):
        return codec.outline(local.read(path / codec.NAME, codec.LIMIT), codec.NAME).id
    return None


def missing(directory: Path | str, manifest: Manifest, *, sure: bool = False) -> str:
    """The first files that aren't there with the recorded size, in words; "" if all are. sure: see `records`."""
    faults = []
    # Strings, and the system call itself: a run of ten thousand checkpoints is listed in a second.
    base, regular, lstat = os.fspath(directory), stat.S_ISREG, os.lstat
    for name, entry in manifest.files.items():
        try:
            status = lstat(f"{base}/{name}")
            size = status.st_size if regular(status.st_mode) else None
        except OSError as error:
            if sure and local.passing(error):
                raise
            size = None
        except ValueError:
            size = None
        if size == entry.size and ("/" not in name or _reached_directly(base, name, sure)):
            continue
        if size is None or size == entry.size:
            faults.append(f"{name} is missing" if size is None else f"{name} is behind a link")
        else:
            faults.append(f"{name} has {size} bytes, expected {entry.size}")
    return "; ".join(faults[:3])


def newer(directory: Path | str, names: Iterable[str]) -> list[str]:
    """Those of the files that were written after the manifest: by a Trainer, or because they were copied so."""
    base = os.fspath(directory)
    try:
        since = os.lstat(f"{base}/{codec.NAME}").st_mtime_ns
        return [name for name in names if os.lstat(f"{base}/{name}").st_mtime_ns > since]
    except (OSError, ValueError):
        return []


def rewritten(directory: Path | str, manifest: Manifest) -> bool:
    """Whether a Trainer saved again into an adopted checkpoint: its manifest tells of bytes that are gone.

    What a Trainer writes last is looked at; times alone decide nothing, for copies have new ones.
    """
    entry = manifest.files.get(LAST_WRITTEN)
    if entry is None or not newer(directory, [LAST_WRITTEN]):
        return False
    try:
        if not entry.hash:  # an outline has none
            data = local.read(f"{os.fspath(directory)}/{codec.NAME}", codec.LIMIT)
            entry = codec.decode(data, codec.NAME).files[LAST_WRITTEN]
        return local.digest(Path(directory, LAST_WRITTEN), entry.kind) != entry
    except (OSError, CorruptCheckpoint):
        return False


def _reached_directly(at: str, name: str, sure: bool) -> bool:
    for part in name.split("/")[:-1]:
        at = f"{at}/{part}"
        try:
            if not stat.S_ISDIR(os.lstat(at).st_mode):
                return False
        except OSError as error:
            if sure and local.passing(error):
                raise
            return False
    return True


def held_by(root: Path) -> Mapping[str, tuple[str, ...]]:
    """checkpoint id -> the names that hold it."""
    name = pins.NAME
    try:
        found = pins.read(root)
        name = poison.NAME
        poison.read(root)
    except (OSError, ValueError):
        # Unreadable pins must not unpin anything: every checkpoint counts as held. Where nobody knows which ones are
        # poisoned all count as such, and the healthy ones among them must not go as if they were.
        return _Everything(name)
    return found


class _Everything(dict[str, tuple[str, ...]]):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def get(self, key: str, default: object = ()) -> tuple[str, ...]:
        return (f"unreadable {self.name}",)
