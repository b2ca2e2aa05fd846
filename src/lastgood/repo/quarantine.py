"""Out of the way, but there: what can't be used moves to .lastgood/quarantine under a name of its own."""

from __future__ import annotations

from pathlib import Path

from lastgood.format import manifest as codec
from lastgood.repo import journal
from lastgood.repo.layout import hidden, new_id
from lastgood.store import local


def quarantine(root: Path, name: str) -> str:
    """Move a checkpoint or a leftover of the run there; returns its new place, relative to the run.

    The caller holds the run's lock. Raises OSError; then it is where it was.
    """
    target = hidden(root, "quarantine", f"{name.replace('/', '.')}.{new_id()[:8]}")
    local.make_dirs(target.parent)
    local.rename(root / name, target)
    place = target.relative_to(root).as_posix()
    journal.append(root, "quarantined", name=name, to=place)
    return place


def carries(path: Path, run: str) -> bool:
    """Whether a damaged checkpoint is provably of this run: its manifest, readable or not, has the run's id."""
    try:
        return run.encode() in local.read(path / codec.NAME, codec.LIMIT)
    except OSError:
        return False
