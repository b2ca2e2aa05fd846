"""A checkpoint -> a loop's parts: all of them are looked at before the first one is changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lastgood.errors import CorruptCheckpoint, Incompatible, IncompleteRestore, NotSupported
from lastgood.integrations.torch import writing
from lastgood.integrations.torch.exchange import STANDARD, Part, Reading, Ready
from lastgood.integrations.torch.module import Model
from lastgood.model import Record
from lastgood.repo import journal
from lastgood.report import Change, Report
from lastgood.state import facts, rng
from lastgood.state.match import Match
from lastgood.state.saved import Saved
from lastgood.state.stream import Once
from lastgood.target import Target, resolve

if TYPE_CHECKING:
    from lastgood.integrations.torch.manager import CheckpointManager


def restore(manager: CheckpointManager, target: Target, match: Match) -> tuple[Report, int]:
    """Put everything back; returns the report and the number of steps that are complete."""
    record = target.record
    if record is None or record.layout:
        raise NotSupported(
            f"{target.path} was written by another tool: a loop can't go on from it",
            hint="begin a new run with its weights: load them into the model before CheckpointManager is made",
        )
    saved = Saved(target.path, record, target.held)
    resume, allow = saved.resume, manager.options.allow_missing
    step = record.step
    if resume and resume["progress"].get("front") != "loop":
        raise NotSupported(
            f"{target.path} was written by a {resume['progress'].get('front', 'Trainer')}, whose loop this isn't",
            hint=f"begin a new run with its weights: CheckpointManager(another_place, init={str(target.path)!r}, ...)",
        )
    states = rng.decode(resume["rng"]) if resume else None
    if states is None and "rng" not in allow:
        raise IncompleteRestore(
            f"{record.name} holds no rng (only its weights were kept)",
            hint="restore a full checkpoint; a new run may begin with these weights: CheckpointManager(init=path)",
        )
    source = Reading(saved, writing.live(manager.parts), allow, match)
    if states is not None:
        source.once = manager._once = Once(states)
    _nothing_left_over(manager, saved)
    ready = [(part, _prepared(part, source)) for part in manager.parts]
    restored: list[tuple[str, str]] = []
    if target.own:
        manager._run.begin_from(record)
        manager._run.saved[record.step] = record
    else:
        manager._run.begin_fresh()
        journal.append(manager._run.door, "continued", source=target.path.name, step=step)
    for part, apply in ready:
        if apply is not None:
            restored.append((part.name, _applied(part.name, apply, record)))
    if states is not None:
        problems = rng.restore(states)
        restored.append(("rng", "; ".join(["python, numpy, torch", *problems])))
    saved.done()
    manifest = record.manifest
    assert manifest is not None
    if "init" in manifest.facts:  # the run still has what it began with
        manager._facts["init"] = manifest.facts["init"]
    report = Report(
        source=target.path.name,
        step=step,
        restored=tuple(restored),
        missing=tuple(source.missing),
        skipped=target.skipped,
        changed=(
            *source.changed,
            *_arguments(manifest.arguments, manager._arguments),
            *facts.fact_changes(manifest.facts, manager._facts),
            *facts.version_changes(manifest.environment, facts.environment()),
        ),
        notes=(*target.notes, *(() if target.own else ("another run's checkpoint: its state goes on as a new run",))),
    )
    return report, step


def _prepared(part: Part, source: Reading) -> Ready | None:
    """What doesn't fit begins afresh where it may be missing."""
    try:
        return part.prepare(source)
    except Incompatible:
        if part.name not in source.allow:
            raise
        source.missing.append(part.name)
        return None


def _applied(name: str, apply: Any, record: Record) -> str:
    try:
        return str(apply())
    except Exception as error:
        raise IncompleteRestore(
            f"{name} could not be put back from {record.name}: {type(error).__name__}: {error}",
            hint="parts before it are restored already, so don't train on; mend the cause and launch again",
        ) from error


def _nothing_left_over(manager: CheckpointManager, saved: Saved) -> None:
    """A part that was saved and that this run doesn't have would be lost at the next save."""
    here = {part.name for part in manager.parts}
    keys = {key: name for name, key in STANDARD.items()}
    there = {keys[key] for key in keys if saved.resume.get(key) is not None} | set(saved.resume.get("parts", {}))
    there |= set(saved.digests.get("modules", {}))
    if saved.digests.get("tensors"):
        there.add("model")
    lost = sorted(there - here - set(manager.options.allow_missing))
    if lost:
        raise IncompleteRestore(
            f"{saved.record.name} holds {', '.join(lost)}, which this run doesn't have",
            hint=f"hand it over as before, or allow_missing={lost} to go on without; nothing was changed",
        )


def _arguments(saved: Any, now: Any) -> list[Change]:
    missing = object()
    return [
        Change(what=key, saved=saved[key], now=now[key], effect="this run's value applies")
        for key in now
        if saved.get(key, missing) is not missing and saved[key] != now[key]
    ]


def weights(manager: CheckpointManager, saved: Saved, match: Match | None = None) -> list[str]:
    """Put the models back and nothing else; returns a line for each."""
    path, record = saved.path, saved.record
    source = Reading(saved, {}, manager.options.allow_missing, match or Match())
    models = [part for part in manager.parts if isinstance(part, Model)]
    ready = [(part, part.prepare(source)) for part in models]
    told = [f"{part.name}: {_applied(part.name, apply, record)}" for part, apply in ready if apply is not None]
    if not told:
        raise CorruptCheckpoint(f"{path} holds none of this run's models")
    return told


def init(manager: CheckpointManager, path: Path, match: Match) -> tuple[str, str]:
    """A new run's models with another run's weights; where they came from goes into every manifest of the new run."""
    target = resolve(manager._run, path, option="init", stock_too=False)
    if not isinstance(target, Target) or target.record is None:
        raise NotSupported(
            f"{path} has no manifest, so nothing says what its weights should be",
            hint="`lastgood adopt` gives a stock Trainer's checkpoint one; or load the weights yourself",
        )
    told = weights(manager, Saved(target.path, target.record, target.held), match)
    record = target.record
    manager._facts["init"] = {
        "run": record.manifest.run if record.manifest is not None else "",
        "id": record.id,
        "step": record.step,
        "name": record.name,
    }
    return record.id, "; ".join(told)
