"""Names: inside a run directory, and of this start of the machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lastgood.errors import Refused
from lastgood.store import fs

HIDDEN = ".lastgood"
MANIFEST = "lastgood.json"
_NAME = re.compile(r"checkpoint-([0-9]{1,18})(?:\.[0-9a-f]{8})?")
_FENCE = re.compile(r"writer\.[0-9a-f]{16}")


def step_of(name: str) -> int | None:
    """The step in a checkpoint's directory name; None for any other name (checkpoint-best, old-checkpoint-5)."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_checkpoint(path: Path) -> bool:
    """Whether this directory is a checkpoint of ours."""
    return step_of(path.name) is not None and (path / MANIFEST).is_file()


def new_id() -> str:
    """16 hex digits that nobody else has."""
    return fs.system.token(8)


def hidden(root: Path, *names: str) -> Path:
    """A path inside the run's own directory."""
    return root.joinpath(HIDDEN, *names)


def own(root: Path) -> None:
    """What comes before every change: nothing that we keep in `.lastgood` is a link, which would lead us elsewhere.

    Files are opened without following links anyway; this is for directories on the way to them. Raises Refused.
    """
    folder = hidden(root)
    try:
        with os.scandir(folder) as entries:
            linked = [entry.path for entry in entries if entry.is_symlink()]
    except (FileNotFoundError, NotADirectoryError):
        linked = []
    if folder.is_symlink() or linked:
        link = folder if folder.is_symlink() else min(linked)
        raise Refused(
            f"{link} is a link: what is behind it isn't ours to change or delete",
            hint="put back what was there, or remove the link; nothing was changed",
        )


def fence(root: Path, nonce: str) -> Path:
    """The directory that is there as long as the writer with this name may write."""
    return hidden(root, f"writer.{nonce}")


def is_fence(name: str) -> bool:
    return _FENCE.fullmatch(name) is not None


def through(fence: Path) -> Path:
    """The run's directory, spelt through a writer's fence: where that is gone, every call with such a path fails.

    To ask "is it still ours?" and then to act leaves a moment between the two, in which a process may be stopped for
    hours. So the system is asked by the same call that acts.
    """
    return fence / ".." / ".."


def plain(path: Path) -> Path:
    """The same path without a detour through a fence: for people, and for what makes missing directories."""
    parts = path.parts
    for at, part in enumerate(parts):
        if is_fence(part) and parts[at - 1] == HIDDEN and parts[at + 1 : at + 3] == ("..", ".."):
            return Path(*parts[: at - 1], *parts[at + 3 :])
    return path


def boot() -> str | None:
    """What tells one start of this machine from the next; None where the system has no such thing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
