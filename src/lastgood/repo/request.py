"""A save that somebody asks for from outside: `lastgood save`, or a file that any tool may touch in `.lastgood`.

    .lastgood/save-now        save at the next step and go on
    .lastgood/save-and-stop   save at the next step and leave with status 75

The run that is training removes the file when it takes the request.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lastgood.repo import journal
from lastgood.repo.layout import hidden, own
from lastgood.store import fs, local

SAVE, STOP = "save-now", "save-and-stop"
PAUSE = 1.0
"""Seconds between two looks: a step may take a millisecond."""


def ask(root: Path, *, stop: bool) -> None:
    """Leave the request there; one that is there already is the same. Raises OSError."""
    own(root)
    with suppress(FileExistsError):
        local.write(hidden(root, STOP if stop else SAVE), [], sync=False)


def withdraw(root: Path, *, stop: bool) -> bool:
    """Take it back; False if it was taken by the run meanwhile."""
    try:
        fs.system.unlink(hidden(root, STOP if stop else SAVE))
    except OSError:
        return False
    return True


def drop_stale(root: Path) -> tuple[str, ...]:
    """Remove what was asked for before this launch, when nobody was training; the names of what there was."""
    return tuple(name for name in (SAVE, STOP) if _take(root, name))


@dataclass(slots=True)
class Inbox:
    """Where the run that is training looks for requests. Cheap enough to be asked after every step."""

    root: Path
    looked: float = float("-inf")

    def look(self, now: float, step: int) -> str:
        """The request that is there, save-now or save-and-stop, which is taken; "" for none. now: monotonic seconds."""
        if now - self.looked < PAUSE:
            return ""
        self.looked = now
        # Both may be there: who asked for a save gets it from the one that stops as well.
        found = [name for name in (STOP, SAVE) if _take(self.root, name)]
        if not found:
            return ""
        journal.append(self.root, "asked", step=step, request=found[0])
        return found[0]


def _take(root: Path, name: str) -> bool:
    """Whether it was there; a request that can't be removed isn't one, or it would be met again and again."""
    try:
        fs.system.unlink(hidden(root, name))
    except OSError:
        return False
    return True
