"""Lightning's .ckpt files: one torch.save archive each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lastgood.errors import CorruptCheckpoint
from lastgood.format import archive
from lastgood.layouts.found import Found, modified
from lastgood.model import finite
from lastgood.store import local

SUFFIX = ".ckpt"


def recognises(path: Path) -> bool:
    """Whether the name and the first bytes are those of one."""
    return path.name.endswith(SUFFIX) and local.size(path) is not None


def look(path: Path) -> Found:
    """What its pickle says, which is looked at and not executed."""
    files = {path.name: local.size(path) or 0}
    problem, tree = "", {}
    try:
        tree = content(path)
    except CorruptCheckpoint as error:
        problem = error.message
    step = tree.get("global_step")
    return Found(
        path=path,
        layout="lightning",
        step=step if type(step) is int and 0 <= step < 10**18 else -1,
        state="incomplete" if problem else "full" if tree.get("optimizer_states") else "weights",
        parts={"state": tuple(files)},
        files=files,
        problem=problem,
        metrics=_metrics(tree),
        created=modified(path),
    )


def content(path: Path) -> dict[str, Any]:
    """The dictionary in it, with `Ref`s for tensors. Raises CorruptCheckpoint."""
    tree = archive.load(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("state_dict"), dict):
        raise CorruptCheckpoint(f"{path.name} isn't a checkpoint of Lightning: it has no state_dict")
    return tree


def problems(path: Path, *, full: bool) -> tuple[str, ...]:
    """The archive is whole (full: its checksums are right) and holds a state_dict."""
    fault = archive.check(path, full=full)
    if fault:
        return (fault,)
    try:
        content(path)
    except CorruptCheckpoint as error:
        return (error.message,)
    return ()


def _metrics(tree: dict[str, Any]) -> dict[str, float]:
    """What each ModelCheckpoint callback monitored when it wrote this."""
    callbacks = tree.get("callbacks")
    found: dict[str, float] = {}
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if not isinstance(state, dict) or not isinstance(state.get("monitor"), str):
            continue
        try:
            value = finite(archive.number(state.get("current_score")))
        except (OSError, ValueError, OverflowError):
            value = None
        if value is not None:
            found[state["monitor"]] = value
    return found
