"""Where the checkpoints of other tools lie in a run directory, and which tool each of them is from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lastgood.layouts import accelerate, dcp, lightning, trainer
from lastgood.layouts.found import Found, folders, is_directory
from lastgood.repo.layout import HIDDEN, step_of
from lastgood.store import local

PLACES = ("checkpoints", "lightning_logs")
"""Folders of a run in which tools put their checkpoints."""

_TOOLS = {"accelerate": accelerate, "dcp": dcp, "lightning": lightning}


def scan(root: Path) -> list[Found]:
    """Those outside of checkpoint-N directories, by step: Lightning's, Accelerate's, torch.distributed's."""
    found = [_look(path) for path in _candidates(root)]
    return sorted(found, key=lambda item: (item.step, item.path.name))


def look(path: Path) -> Found:
    """One checkpoint of whatever tool; a checkpoint-N directory is the Trainer's unless its content says otherwise."""
    if not path.is_symlink() and (path.is_file() or accelerate.recognises(path) or dcp.recognises(path)):
        return _look(path)
    return trainer.look(path)


def recognised(path: Path) -> bool:
    """Whether this path itself is a checkpoint of Lightning, Accelerate or torch.distributed."""
    return lightning.recognises(path) or accelerate.recognises(path) or dcp.recognises(path)


def problems(path: Path, layout: str, *, full: bool) -> tuple[str, ...]:
    """What is wrong with the structure of a checkpoint; () if nothing."""
    tool = _TOOLS.get(layout)
    return trainer.problems(path, full=full) if tool is None else tool.problems(path, full=full)


def holds_any(path: Path) -> bool:
    """Whether a directory holds checkpoints of other tools, outside of checkpoint-N directories."""
    return next(_candidates(path), None) is not None


def _look(path: Path) -> Found:
    if lightning.recognises(path):
        return lightning.look(path)
    return dcp.look(path) if dcp.recognises(path) else accelerate.look(path)


def _candidates(root: Path) -> Iterator[Path]:
    yield from _inside(root)
    for place in PLACES:
        if is_directory(root / place):
            yield from _inside(root / place)
    for version in folders(root / "lightning_logs"):
        if is_directory(version / "checkpoints"):
            yield from _inside(version / "checkpoints")


def _inside(folder: Path) -> Iterator[Path]:
    for name in local.names(folder):
        path = folder / name
        if step_of(name) is not None or name == HIDDEN or name in PLACES:
            continue
        if name.endswith(lightning.SUFFIX):
            if lightning.recognises(path):
                yield path
        elif "." not in name and (dcp.recognises(path) or accelerate.recognises(path)):
            yield path
