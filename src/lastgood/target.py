"""What the value of `resume_from_checkpoint` means: the checkpoint to continue from, or a fresh start."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lastgood.errors import CorruptCheckpoint, NoCheckpoint, NotSupported, UsageError, wrong_type
from lastgood.layouts import scan
from lastgood.layouts import trainer as stock
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.repo import verify
from lastgood.repo.held import Held
from lastgood.repo.layout import HIDDEN, step_of
from lastgood.repo.read import records
from lastgood.talk import warn

SUPPORTED = "True, 'auto', 'last', 'best', a step, a path of a checkpoint, False or None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """path: the checkpoint's directory. record: what is known of it; None for one that a stock Trainer wrote.

    own: it belongs to the run in this output_dir, which therefore goes on; otherwise a new run begins with its state.
    held: what its verification has read already.
    """

    path: Path
    record: Record | None
    own: bool
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    held: Held = field(default_factory=Held)


@dataclass(frozen=True, slots=True)
class Fresh:
    """No checkpoint to continue from; `why` is said aloud."""

    why: str


def resolve(
    manager: Manager,
    value: Any,
    *,
    full: bool = True,
    option: str = "resume_from_checkpoint",
    stock_too: bool = True,
) -> Target | Fresh:
    """Raises NoCheckpoint where something was asked for that isn't there, and never picks what wasn't verified.

    option: what its user calls `value`. stock_too: whether "auto" may mean what a stock Trainer left there.
    """
    if value is None or value is False:
        return Fresh(_why_fresh(manager, value, option))
    if value is True or value == "auto":
        return _auto(manager, option, stock_too)
    if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
        return _own(manager, int(value), full=full)
    if value in ("last", "best"):
        return _own(manager, value, full=full)
    if isinstance(value, (str, os.PathLike)):
        return _path(manager, Path(value), option)
    raise wrong_type(option, value, SUPPORTED)


def _why_fresh(manager: Manager, value: Any, option: str) -> str:
    there = [record.name for record in manager.records() if record.ours]
    if not there:
        return ""
    return (
        f"starting a new run although {manager.root} holds {len(there)} checkpoints of an earlier one"
        f" ({', '.join(there[-3:])}): they stay as they are; {option}='auto' continues from them"
        + ("" if value is False else ", False says that this is meant")
    )


def _auto(manager: Manager, option: str, stock_too: bool) -> Target | Fresh:
    everything = manager.records()
    own = [record for record in everything if record.state in ("full", "weights", "incomplete")]
    if any(record.ours for record in own):
        return _own(manager, "last")
    old = [stock.inspect(manager.root / record.name) for record in everything if record.state == "stock"]
    if old and stock_too:
        return _stock_auto(manager, old)
    if own:
        listing = "".join(f"\n  {record.name}: {record.problem}" for record in own)
        raise NoCheckpoint(
            f"no checkpoint in {manager.root} is good{listing}",
            hint=f"{option}=False starts afresh and leaves these as they are",
        )
    foreign = [record.name for record in everything if record.state == "foreign"]
    beside = f"; {', '.join(foreign[:3])} belong to another run and are left alone" if foreign else ""
    return Fresh(f"no checkpoint in {manager.root} yet: starting at step 0{beside}")


def _own(manager: Manager, what: Any, *, full: bool = True) -> Target:
    held = Held()
    found = manager.find(what, full=full, held=held)
    manager.quarantine(found.damaged)
    path = manager.root / found.record.name
    if not found.record.layout:
        notes = _loudly(found.record)
        return Target(path=path, record=found.record, own=True, skipped=found.skipped, notes=notes, held=held)
    lost = stock.lacking(path)
    if found.record.layout != "trainer" or lost:
        raise NotSupported(
            f"{path} was written by {found.record.layout} and adopted; a managed Trainer can't resume from it"
            + (f": {lost}" if lost else ""),
            hint="resume it with the set-up that wrote it, or name another checkpoint",
        )
    return Target(
        path=path, record=found.record, own=True, skipped=found.skipped, notes=(_ADOPTED_NOTE, *_loudly(found.record))
    )


def _loudly(record: Record) -> tuple[str, ...]:
    """Who names a poisoned checkpoint gets it, and is told."""
    if not record.poisoned:
        return ()
    warn(f"{record.name} is POISONED ({record.poisoned}); it is resumed from because it was named")
    return (f"POISONED: {record.poisoned}",)


def _stock_auto(manager: Manager, old: list[stock.Stock]) -> Target:
    newest, skipped = stock.choose(manager.root, old)
    return Target(path=newest.path, record=None, own=False, skipped=skipped, notes=(_STOCK_NOTE,))


_STOCK_NOTE = "written by a stock Trainer: read with weights_only=True, no hashes to check it against"
_LOAD = {"accelerate": "a first launch may begin with accelerator.load_state(path)"}
_ADOPTED_NOTE = "written by a stock Trainer and adopted: read with weights_only=True"


def _path(manager: Manager, path: Path, option: str) -> Target:
    if not path.is_dir():
        near = ", ".join(record.name for record in manager.records()[-3:]) or "none"
        raise NoCheckpoint(f"{path} is not a directory; checkpoints in {manager.root}: {near}")
    if (path / HIDDEN).is_dir() or (
        step_of(path.name) is None and any(step_of(p.name) is not None for p in path.iterdir())
    ):
        raise UsageError(
            f"{path} is a run, not a checkpoint",
            hint="name one of its checkpoints"
            + ("" if option == "init" else f", or use {option}='auto' in the run itself"),
        )
    if not (path / "lastgood.json").exists():
        return _stock_path(path)
    same_run = path.resolve().parent == manager.root.resolve()
    record = next((r for r in records(path.parent) if r.name == path.name), None)
    if record is None or record.manifest is None or (record.problem and record.state == "incomplete"):
        reason = "not a checkpoint directory" if record is None else record.problem
        raise CorruptCheckpoint(f"{path} can't be resumed from: {reason}", hint=f"{option}='auto'")
    held = Held(state=option != "init")
    faults = verify.problems(path.parent, record, full=manager.verify == "full", sure=True, held=held)
    if faults:
        raise CorruptCheckpoint(f"{path} is damaged: {'; '.join(faults[:3])}", hint=f"{option}='auto'")
    return Target(path=path, record=record, own=same_run and record.ours, notes=_loudly(record), held=held)


def _stock_path(path: Path) -> Target:
    if scan.recognised(path):
        tool = scan.look(path).layout
        raise NotSupported(
            f"{path} was written by another tool ({tool})",
            hint=_LOAD.get(tool, "load it with that tool in a first launch without a checkpoint")
            + ", or take its weights: `lastgood import` makes a checkpoint of it",
        )
    item = stock.inspect(path)
    if item.problems:
        raise CorruptCheckpoint(f"{path} is damaged: {'; '.join(item.problems)}", hint="choose another checkpoint")
    return Target(path=path, record=None, own=False, notes=(_STOCK_NOTE,))
