"""What was removed and can be brought back: `.lastgood/undo/<number>/`, one directory per operation.

Each holds `plan.json` and what the operation removed: whole checkpoints, and of stripped ones the
old manifest and the files that went. Emptied by command, and by a save that needs the room.
"""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from lastgood.errors import CorruptCheckpoint, NoCheckpoint, Refused
from lastgood.format import guard
from lastgood.format import manifest as codec
from lastgood.model import Manifest
from lastgood.repo import journal, reserve
from lastgood.repo.layout import HIDDEN, hidden, new_id, step_of
from lastgood.store import local

PLAN = "plan.json"
GRAVE = f"{HIDDEN}.grave."
"""How a directory that is being deleted is called where a full disk leaves no room for a trash directory."""
_NUMBER = re.compile(r"[0-9]{8,12}")


def begin(root: Path, what: str) -> str:
    """The number of a new operation, which is the newest from now on. Raises OSError."""
    reserve.spend(root, lambda: local.make_dirs(hidden(root, "undo")))
    taken = [int(name) for name in local.names(hidden(root, "undo")) if _NUMBER.fullmatch(name)]  # a link as well
    number = f"{max([0, *taken]) + 1:08d}"
    place = hidden(root, "undo", number)
    reserve.spend(root, lambda: local.make_dirs(place))
    reserve.spend(root, lambda: local.replace(place / PLAN, f"{json.dumps({'what': what})}\n".encode()))
    return number


def operations(root: Path) -> list[str]:
    """Numbers of what can be undone, the newest last."""
    place = hidden(root, "undo")
    found = [name for name in local.names(place) if _NUMBER.fullmatch(name)]
    return [name for name in found if (place / name).is_dir() and not (place / name).is_symlink()]


def put(root: Path, number: str, name: str) -> None:
    """Move a checkpoint, or a file of one (NAME/FILE), out of the run."""
    target = hidden(root, "undo", number, name if "/" not in name else f"{_strip_place(name)}")
    _move(root, root / name, target)


def _move(root: Path, source: Path, target: Path) -> None:
    """A rename into a directory that may have to be made; a full disk is no reason not to undo or prune."""
    reserve.spend(root, lambda: local.make_dirs(target.parent))
    reserve.spend(root, lambda: local.rename(source, target))


def put_manifest(root: Path, number: str, name: str) -> None:
    """Remember the manifest of a checkpoint that is about to be stripped."""
    target = hidden(root, "undo", number, _strip_place(f"{name}/{codec.NAME}"))
    content = local.read(root / name / codec.NAME, codec.LIMIT)
    reserve.spend(root, lambda: local.make_dirs(target.parent))
    reserve.spend(root, lambda: local.replace(target, content))


def _strip_place(name: str) -> str:
    checkpoint, _, file = name.partition("/")
    return f"{checkpoint}.stripped/{file}"


def held_back(root: Path) -> dict[str, Path]:
    """id of a stripped checkpoint -> where its old manifest and files are kept."""
    places = {}
    for number in operations(root):
        for name in local.names(hidden(root, "undo", number)):
            place = hidden(root, "undo", number, name)
            if name.endswith(".stripped") and not place.is_symlink():
                places[_id(place)] = place
    return places


def rescue(directory: Path, light: Manifest, place: Path) -> None:
    """What a strip or an undo that was cut short left in a weights-only checkpoint goes to where `undo` looks for it.

    Raises OSError.
    """
    old = _manifest(place)
    for name in () if old is None else sorted(old.files.keys() - light.files.keys()):
        if not _straight(directory, name) or not _straight(place, name):
            continue
        if local.size(directory / name) is not None and not os.path.lexists(place / name):
            local.make_dirs((place / name).parent)
            local.rename(directory / name, place / name)


def files(root: Path) -> int:
    """Files and directories that emptying would free."""
    return sum(1 + len(names) for _, _, names in os.walk(hidden(root, "undo"))) if operations(root) else 0


def size(root: Path) -> int:
    """Bytes that emptying would free."""
    total = 0
    for folder, _, files in os.walk(hidden(root, "undo")):
        total += sum(local.size(Path(folder) / name) or 0 for name in files)
    return total


def undo(root: Path) -> list[str]:
    """Bring back what the newest operation removed; what was done, in words.

    Raises NoCheckpoint if there is none, Refused where links lead out of the run.
    """
    numbers = operations(root)
    if not numbers:
        raise NoCheckpoint(
            "there is nothing to undo", hint="space that was freed at once (prune --now), or for a save, is gone"
        )
    place, done = hidden(root, "undo", numbers[-1]), []
    if linked := next((name for name in local.names(place) if (place / name).is_symlink()), None):
        raise Refused(f"{place / linked} is a link: what is behind it isn't ours to bring back; nothing was changed")
    for name in local.names(place):
        if name.endswith(".stripped"):
            done.append(_unstrip(root, place / name, name.removesuffix(".stripped")))
        elif step_of(name) is not None:
            done.append(_bring_back(root, place / name, name))
    local.remove(place)
    return done or ["nothing was left of the last operation; again for the one before"]


def _bring_back(root: Path, source: Path, name: str) -> str:
    target = root / name
    if os.path.lexists(target):  # saved again in the meantime: both stay
        target = root / f"{name.partition('.')[0]}.{_id(source)[:8]}"
        while os.path.lexists(target):
            target = root / f"{name.partition('.')[0]}.{new_id()[:8]}"
    _move(root, source, target)
    journal.append(root, "restored", name=target.name, id=_id(target))
    return f"{target.name} is back"


def _unstrip(root: Path, source: Path, name: str) -> str:
    old = _manifest(source)
    # By its id: another one may have its name by now, because the same step was saved again.
    named = [name, *(other for other in local.names(root) if step_of(other) is not None)]
    found = next((other for other in named if old is not None and _id(root / other) == old.id), None)
    if old is None or found is None:
        return f"{name} isn't there any more; its files were dropped"
    name, directory = found, root / found
    there = {file: (source / file, directory / file) for file in old.files}
    lost = [
        file
        for file, at in there.items()
        if old.files[file].size not in map(local.size, at) or not all(_straight(at, file) for at in (source, directory))
    ]
    if lost:  # stripped again in the meantime: the old manifest would make it an incomplete one
        return f"{name} stays as it is: {', '.join(lost[:3])} can't be brought back"
    for file, (kept, target) in there.items():
        if local.size(kept) is not None:
            if file in guard.NAMES:
                local.unlink(target)
            _move(root, kept, target)
    # The manifest last: the checkpoint is full again when all of its files are there.
    content = local.read(source / codec.NAME, codec.LIMIT)
    reserve.spend(root, lambda: local.replace(directory / codec.NAME, content))
    journal.append(root, "restored", name=name, id=_id(directory))
    return f"{name} is full again"


def empty(root: Path) -> int:
    """Free the space; returns the bytes."""
    total = size(root)
    for number in operations(root):
        hole = grave(root)
        local.vanish(hidden(root, "undo", number), hole)
        local.remove(hole)
    return total


def _straight(directory: Path, name: str) -> bool:
    """Whether no directory on the way to this file is a link: what is behind one isn't ours to move."""
    return not any((directory / folder).is_symlink() for folder in Path(name).parents)


def grave(root: Path) -> Path:
    """Where what is being deleted is moved out of sight."""
    try:
        local.make_dirs(hidden(root, "trash"))
        return hidden(root, "trash", new_id())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A new directory takes a block, a new name in a directory that is there mostly doesn't.
        return root / f"{GRAVE}{new_id()}"


def _manifest(directory: Path) -> Manifest | None:
    try:
        return codec.decode(local.read(directory / codec.NAME, codec.LIMIT), codec.NAME)
    except (OSError, CorruptCheckpoint):
        return None


def _id(directory: Path) -> str:
    try:
        value: Any = json.loads(local.read(directory / codec.NAME, codec.LIMIT))
    except (OSError, ValueError, RecursionError):
        return new_id()
    return str(value.get("id")) if isinstance(value, dict) else new_id()
