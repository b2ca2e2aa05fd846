"""The path that a log speaks of, found on this machine, and what is really there."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.errors import LastgoodError
from lastgood.format import manifest
from lastgood.layouts import scan, trainer
from lastgood.layouts.found import is_directory
from lastgood.layouts.progress import STATE
from lastgood.model import TRAINERS
from lastgood.repo.layout import step_of
from lastgood.store import local

Kind = Literal[
    "absent", "file", "empty", "run", "model", "cut off", "no weights", "adapters", "other tool", "damaged", "whole"
]
LIMIT = 2000
"""Files of a directory that are looked at."""
SHOWN = 12
"""Names that a listing in the evidence has at most."""
SENTINEL = "checkpoint-is-incomplete.txt"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
TAKEN = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", *ADAPTERS,
)  # fmt: skip
"""What a Trainer that resumes looks for (Trainer._load_from_checkpoint)."""


class Place(msgspec.Struct, frozen=True):
    """said: as the log has it. path: where that is here. disk: the run that it belongs to, if there is one."""

    said: str
    path: Path
    disk: Disk | None


def locate(case: Case, said: str) -> Place:
    """What a log of this machine, or of another, means by a path."""
    path = Path(said)
    root = case.disk.root if case.disk is not None else None
    if _there(path):
        if case.disk is not None and root is not None and _inside(path, root):
            return Place(said, path, case.disk)
        return Place(said, path, _run_at(path) or _run_at(path.parent) or case.disk)
    if case.disk is not None and root is not None:
        for record in case.disk.records:
            if Path(record.name).name == path.name:
                return Place(said, case.disk.path(record), case.disk)
        if path.name and path.name in (root.name, root.absolute().name):
            return Place(said, root, case.disk)
    return Place(said, path, case.disk or _run_at(path.parent))


def _there(path: Path) -> bool:
    try:
        return bool(str(path)) and path.exists()
    except (OSError, ValueError):
        return False


def _inside(path: Path, root: Path) -> bool:
    with suppress(OSError, RuntimeError, ValueError):
        return path.resolve().is_relative_to(root.resolve())
    return False


def _run_at(path: Path) -> Disk | None:
    """The run in a directory that the log names; None if there are no checkpoints in it."""
    try:
        if holds(path):
            return Disk(path)
    except (OSError, ValueError, LastgoodError):
        pass
    return None


def holds(path: Path) -> bool:
    """Whether this directory is a run: there are checkpoints of any tool in it."""
    try:
        return is_directory(path) and (
            any(step_of(name) is not None for name in local.folders(path)) or scan.holds_any(path)
        )
    except (OSError, ValueError):
        return False


def _files(path: Path) -> dict[str, int]:
    """Relative name -> bytes, two levels deep and so many at most: a log may name the root of a disk."""
    found: dict[str, int] = {}
    for folder in ("", *(f"{name}/" for name in _folders(path)[:LIMIT])):
        try:
            with os.scandir(path / folder) as entries:
                for entry in itertools.islice(entries, LIMIT):
                    if entry.is_file(follow_symlinks=False):
                        found[folder + entry.name] = entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
        if len(found) > LIMIT:
            break
    return dict(sorted(found.items()))


def _folders(path: Path) -> list[str]:
    try:
        return local.folders(path)
    except OSError:
        return []


def judge(path: Path) -> tuple[Kind, str]:
    """(what a path is to somebody who wants to resume from it, the same in words). Names and sizes are looked at."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "absent", f"there is no {path} on this machine"
    if not stat.S_ISDIR(mode):
        return "file", f"{path.name} is a file, and a directory is wanted"
    files = _files(path)
    if step_of(path.name) is None and holds(path):
        return "run", f"{path} is the run directory, its checkpoints lie in it"
    if not files:
        return "empty", f"{path.name} is empty: the save was interrupted as it began"
    if scan.recognised(path):
        return "other tool", f"{path.name} was written by {scan.look(path).layout}, not by a Trainer"
    there = f"there: {listing(files)}"
    if local.size(path / manifest.NAME) is not None:
        return "whole", f"{path.name} is managed by lastgood; {there}"
    state = STATE in files
    weights = any(name in TAKEN or _sharded(name) for name in files)
    folders = sorted({Path(name).parts[0] for name in files if "/" in name and Path(name).name in ADAPTERS})
    if folders and not weights:
        return "adapters", f"the adapters lie in folders of their own: {', '.join(folders)}; {there}"
    if not weights:
        shards = any(Path(name).match(pattern) for name in files for pattern in trainer.WEIGHTS)
        why = "no index of its shards (*.index.json)" if shards else "no file with weights"
        return "no weights", f"{why} in {path.name}; {there}"
    parts = trainer.parts_of(files)
    lost = [name for part, name in _WANTED if not parts.get(part)]
    gone = f"not there: {', '.join([*lost, *([] if state else [STATE])])}" if lost or not state else ""
    if not state and not parts.get("optimizer") and SENTINEL not in files:
        return "model", f"{there}; {gone}"
    if not state:
        return "cut off", f"{there}; {gone}"
    hurt = [f"{name} is empty" for name, size in files.items() if not size and name.endswith(_DATA)]
    return ("damaged", "; ".join([*hurt, there])) if hurt else ("whole", f"{there}{'; ' + gone if gone else ''}")


_WANTED = (("optimizer", "optimizer.pt"), ("scheduler", "scheduler.pt"), ("rng", "rng_state.pth"))
_DATA = (".safetensors", ".bin", ".pt", ".pth", ".json")


def _sharded(name: str) -> bool:
    return name.endswith("model_states.pt") or name.startswith("pytorch_model_fsdp")


def listing(files: dict[str, int]) -> str:
    """Names and sizes, a few of them."""
    shown = [f"{name} ({size} bytes)" for name, size in list(files.items())[:SHOWN]]
    more = len(files) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def instead(disk: Disk | None) -> tuple[str, ...]:
    """What to resume from: the newest checkpoint that is intact by sizes and headers, in the words of its tool."""
    if disk is None:
        return ("lastgood -C RUN resume --check  # which checkpoint of the run is good",)
    root = shlex.quote(str(disk.root))
    check = f"lastgood -C {root} resume --check"
    if disk.good is None:
        return (f"{check}  # why no checkpoint of the run can be resumed from",)
    return (resumes(disk, disk.good.name), check)


def resumes(disk: Disk, name: str) -> str:
    """The code that resumes from this checkpoint."""
    path = str(disk.root / name)
    layout = next((record.layout for record in disk.records if record.name == name), "")
    if layout == "lightning":
        return f"trainer.fit(model, ckpt_path={path!r})"
    if layout == "accelerate":
        return f"accelerator.load_state({path!r})"
    if layout and layout not in TRAINERS:
        return f"torch.distributed.checkpoint.load(state, checkpoint_id={path!r})"
    return f"trainer.train(resume_from_checkpoint={path!r})"


def offered(disk: Disk | None) -> tuple[str, ...]:
    """Evidence: the newest good checkpoint of a run, and how many there are."""
    if disk is None or not disk.records:
        return ()
    count = f"{len(disk.records)} checkpoint{'s' if len(disk.records) > 1 else ''} in {disk.root}"
    if disk.good is not None:
        return (f"{count}; the newest good one is {disk.good.name}",)
    return (f"{count}, and none of them can be resumed from as it is",)


def around(path: Path, limit: int = 3) -> list[Disk]:
    """Runs near a directory that has no checkpoints: in it, beside it, or further up."""
    found: list[Disk] = []
    for folder in (path, path.parent, path.parent.parent):
        with suppress(OSError, ValueError):
            names = [folder, *(folder / name for name in local.folders(folder)[:200])]
            found += filter(None, (_run_at(item) for item in names if item != path))
        if found:
            break
    return sorted(found, key=lambda disk: -max((r.manifest.created for r in disk.records if r.manifest), default=0))[
        :limit
    ]


_NAMED = re.compile(r"checkpoint-\d{1,18}(?![\w-])")
_ENDS = " \t\n'\"`,()[]="
LINE = 1000
"""Characters before a checkpoint's name among which its path is looked for."""


def spoken_of(case: Case) -> Sequence[Place]:
    """Checkpoints that the log names, the last one first: what was loaded when it went wrong."""
    if case.log is None:
        return ()
    text, names = case.log.text[-200_000:], dict[str, None]()
    for match in reversed(list(_NAMED.finditer(text))[-100:]):
        before = text[max(0, match.start() - LINE) : match.start()]
        start = max((before.rfind(mark) for mark in _ENDS), default=-1) + 1
        names[before[start:] + match.group()] = None
    return [locate(case, name) for name in list(names)[:5]]
