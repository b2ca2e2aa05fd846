"""Where a resume is repeated: a directory beside the run that goes when it is done, or with the next proof."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lastgood.errors import NotEnoughSpace, Refused
from lastgood.model import Record
from lastgood.repo.layout import new_id
from lastgood.store import local

LOCK = "lock"


@contextmanager
def place_for(root: Path, record: Record, keep: Path | None) -> Iterator[Path]:
    """A new directory with room for the checkpoint. keep: this one, which stays.

    Otherwise it is beside the run, where a copy may share its blocks, or else among the temporary files. What a doctor
    that was killed had left there is removed. Raises Refused, NotEnoughSpace, OSError.
    """
    if keep is not None:
        yield _kept(keep, record)
        return
    beside, prefix = root.resolve().parent, f".{root.resolve().name}.prove-"
    places = [directory / f"{prefix}{new_id()[:8]}" for directory in (beside, Path(tempfile.gettempdir()))]
    for place in places:
        _tidy(place.parent, prefix)
    place = _new(places, record, root)
    lock = FileLock(place / LOCK, timeout=0)
    try:
        lock.acquire()
        yield place
    finally:
        lock.release()
        local.remove(place)


def _kept(keep: Path, record: Record) -> Path:
    if local.names(keep):
        raise Refused(f"{keep} is not empty", hint="name a directory that doesn't exist yet")
    place = keep.resolve()
    local.make_dirs(place)
    if local.free(place)[0] < record.size:
        raise NotEnoughSpace(f"a copy of {record.name} needs {record.size} bytes, which is more than is free in {keep}")
    return place


def _new(places: list[Path], record: Record, root: Path) -> Path:
    for place in places:
        try:
            local.make_dirs(place)
        except OSError:
            if place == places[-1]:
                raise
            continue
        if local.free(place)[0] >= record.size:
            return place
        local.remove(place)
    raise NotEnoughSpace(
        f"a copy of {record.name} needs {record.size} bytes, which is more than is free beside {root}",
        hint="free some space first: `lastgood df` and `lastgood prune`",
    )


def _tidy(directory: Path, prefix: str) -> None:
    """Remove those that nobody holds any more: a checkpoint's size each."""
    for name in local.folders(directory):
        if not name.startswith(prefix) or local.size(directory / name / LOCK) is None:
            continue
        lock = FileLock(directory / name / LOCK, timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            continue
        try:
            local.remove(directory / name)
        except OSError:  # another user's: theirs to remove
            pass
        finally:
            lock.release()
