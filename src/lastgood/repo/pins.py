"""Names that hold a checkpoint, and notes on it: what is pinned or tagged is never deleted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lastgood.errors import CorruptCheckpoint, RunLocked, UsageError
from lastgood.repo import sealed
from lastgood.repo.layout import hidden, own, plain
from lastgood.store import local

NAME, NOTES = "pins.json", "notes.json"
PIN = "pinned"
"""The name that a pin without a name of its own has."""

RESERVED = re.compile(r"latest|best|last|HEAD|pinned|step|\d+|checkpoint-.*|[0-9a-f]{4,16}", re.IGNORECASE)
_BAD = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|(^|/)\.|\.lock(/|$)|\.$|^/|/$|^-|^@$")


def check_name(name: str) -> str:
    """The tag, if it is valid by git's rules for refs (git-check-ref-format) and no revision already means it."""
    if (
        not name
        or len(name) > 200
        or len(name.encode(errors="replace")) > 200
        or _BAD.search(name)
        or not name.isprintable()
    ):
        raise UsageError(
            f"{name[:100]!r} can't be a tag",
            hint="as in git: no spaces, no '..', none of ~^:?*[\\, no '.' or '.lock' at an end",
        )
    if RESERVED.fullmatch(name):
        raise UsageError(f"{name!r} already names a checkpoint in another way", hint="choose a word of your own")
    return name


def read(root: Path) -> dict[str, tuple[str, ...]]:
    """checkpoint id -> its names. Raises ValueError for a file that isn't readable: pins must not vanish silently."""
    return {id: tuple(str(name) for name in names) for id, names in table(root, NAME, list).items()}


def table(root: Path, file: str, kind: type[Any]) -> dict[str, Any]:
    """checkpoint id -> a value of this kind, from a file in `.lastgood`; {} if there is none.

    Raises ValueError or OSError for one that isn't readable: what somebody said of a checkpoint must not be forgotten.
    """
    path = hidden(root, file)
    try:
        value = json.loads(local.read(path, 16 << 20))
    except FileNotFoundError:
        return {}
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(value, dict) or not all(isinstance(entry, kind) for entry in value.values()):
        raise ValueError(f"{path} isn't valid")
    return sealed.unseal(value)


def readable(root: Path) -> dict[str, tuple[str, ...]]:
    """The same; CorruptCheckpoint instead of ValueError."""
    try:
        return read(root)
    except ValueError as error:
        raise CorruptCheckpoint(
            f"{NAME} can't be read ({error}): every checkpoint counts as held, and no name is added or taken away",
            hint=f"repair {hidden(root, NAME)}, or delete it to let go of all pins and tags",
        ) from error


def write(root: Path, pins: Mapping[str, tuple[str, ...]]) -> None:
    """Replace all of them, durably."""
    held = sealed.seal({id: list(names) for id, names in pins.items() if names})
    text = json.dumps({**held, sealed.KEY: [held[sealed.KEY]]}, indent=1)  # a list, as all other values are
    local.replace(hidden(root, NAME), f"{text}\n".encode())


def add(root: Path, id: str, name: str) -> str | None:
    """Give a checkpoint one more name; returns the id that had it before, from which it is taken."""
    with alone(root):
        pins = readable(root)
        before = next((other for other, names in pins.items() if name in names), None) if name != PIN else None
        if before is not None:
            pins[before] = tuple(n for n in pins[before] if n != name)
        pins[id] = (*(n for n in pins.get(id, ()) if n != name), name)
        write(root, pins)
        return before if before != id else None


def remove(root: Path, id: str, name: str) -> bool:
    """Take a name away; False if the checkpoint didn't have it."""
    with alone(root):
        pins = readable(root)
        names = pins.get(id, ())
        if name not in names:
            return False
        write(root, {**pins, id: tuple(n for n in names if n != name)})
        return True


def read_notes(root: Path) -> dict[str, str]:
    """checkpoint id -> what somebody wrote about it; {} if that can't be read."""
    try:
        value = json.loads(local.read(hidden(root, NOTES), 16 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(id): str(text) for id, text in value.items()} if isinstance(value, dict) else {}


def write_note(root: Path, id: str, text: str) -> None:
    """Replace the note of a checkpoint; an empty one removes it.

    Raises CorruptCheckpoint where the notes there are can't be read: adding to them would lose them.
    """
    with alone(root):
        try:
            notes = {**table(root, NOTES, str), id: text}
        except ValueError as error:
            raise CorruptCheckpoint(
                f"{NOTES} can't be read ({error}): no note is added or taken away",
                hint=f"repair {hidden(root, NOTES)}, or delete it to let go of all notes",
            ) from error
        content = json.dumps({key: value for key, value in notes.items() if value}, indent=1)
        local.replace(hidden(root, NOTES), f"{content}\n".encode())


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Two people who tag at the same moment must not lose one of the tags. Not the run's lock: training goes on."""
    from filelock import FileLock, Timeout  # reading needs none of it

    own(plain(root))
    lock = FileLock(hidden(plain(root), "pins.lock"), timeout=10)
    try:
        with lock:
            yield
    except Timeout:
        raise RunLocked(
            f"somebody else is changing the names or marks in {root}", hint="try again in a moment"
        ) from None
