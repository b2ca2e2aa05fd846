"""Another policy on a run that exists: what it would have left. Reads the run, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

import msgspec

from lastgood.errors import NoCheckpoint, UsageError
from lastgood.layouts.progress import STATE
from lastgood.model import TRAINERS, Record, State, finite, stripped
from lastgood.planner.measured import read as read_metrics
from lastgood.policy import Keep
from lastgood.ranking import metric_of, needs
from lastgood.repo import journal, metrics
from lastgood.schedule import save_points
from lastgood.simulate import Event, Metrics, Moment, Pin, Resume, Retain, Save, simulate
from lastgood.view import View


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint that the run ever saved. now: what it is; then: what it would be; sizes in bytes (0: gone).

    reasons: why, under the other policy. value: of the metric.
    """

    step: int
    id: str | None
    value: float | None
    now: State | str
    then: State | str
    size_now: int
    size_then: int
    reasons: tuple[str, ...]

    @property
    def changed(self) -> bool:
        return self.now != self.then


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """rows: oldest save first. bytes_now, bytes_then: on disk now, and then. peak: at most during a save, then."""

    keep: Keep
    policy: str
    was: str | None
    rows: tuple[Row, ...]
    bytes_now: int
    bytes_then: int
    peak: int
    notes: tuple[str, ...] = ()


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A save of the past: with the record, if it is still there."""

    step: int
    id: str
    created: float
    full: int | None
    weights: int
    record: Record | None = None


def replay(view: View, keep: Keep) -> Replay:
    """What would be on disk if the run had had this policy. Raises UsageError for a run without a history."""
    managed = any(record.id and record.ours for record in view.records)
    saves, events, notes = _managed(view) if managed else _stock(view, keep)
    if not saves:
        raise UsageError(f"{view.root} has no saves to replay", hint="a run of lastgood or of transformers' Trainer")
    moments, went = _simulated(events, keep)
    left = {(r.step, _created(r)): r for r in moments[-1].records}
    gone = _gone(moments)
    why = {(d.record.step, _created(d.record)): d.reasons for d in moments[-1].decisions}
    rows, (monitor, _) = [], keep.primary
    for saved in saves:
        key = (saved.step, saved.created)
        record, now = left.get(key), saved.record
        known = record if record is not None else now
        rows.append(
            Row(
                step=saved.step,
                id=saved.id or None,
                value=None if monitor is None or known is None else metric_of(known, monitor),
                now="deleted" if now is None else now.state,
                then="deleted" if record is None else record.state,
                size_now=0 if now is None else now.size,
                size_then=0 if record is None else record.size,
                reasons=gone.get(key, ()) if record is None else why.get(key, ()),
            )
        )
    return Replay(
        keep=keep, policy=keep.describe(), was=None if view.keep is None else view.keep.describe(), rows=tuple(rows),
        bytes_now=sum(row.size_now for row in rows), bytes_then=sum(row.size_then for row in rows),
        peak=max(moment.peak for moment in moments), notes=(*notes, *went),
    )  # fmt: skip


def _simulated(events: list[Event], keep: Keep) -> tuple[tuple[Moment, ...], tuple[str, ...]]:
    """The moments. Where the run went back to what this policy had deleted, it goes back to the newest before it."""
    notes: list[str] = []
    while True:
        done: list[Event] = []
        try:
            return simulate(_noted(events, done), keep), tuple(notes)
        except NoCheckpoint:
            failed = len(done) - 1
        event = events[failed]
        found = simulate([*events[:failed], Retain()], keep)[-1].records
        full = [r for r in found if r.state == "full" and r.current and r.step < event.step]  # type: ignore[union-attr]
        if isinstance(event, Resume) and full:
            nearest = max(full, key=lambda record: record.seq).step
            notes.append(f"the run went back to step {event.step}; under this policy it could only go to {nearest}")
            events = [*events[:failed], Resume(nearest), *events[failed + 1 :]]
        else:
            step = getattr(event, "step", 0)
            if isinstance(event, Resume):
                notes.append(
                    f"the run went back to step {step}, which this policy doesn't leave: replayed as if it went on"
                )
            else:
                notes.append(f"step {step} is pinned, and can't be under this policy")
            events = [*events[:failed], *events[failed + 1 :]]


def _noted(events: Iterable[Event], done: list[Event]) -> Iterable[Event]:
    for event in events:
        done.append(event)
        yield event


def _gone(moments: Sequence[Moment]) -> dict[tuple[int, float], tuple[str, ...]]:
    return {
        (decision.record.step, _created(decision.record)): decision.reasons
        for moment in moments
        if moment.before is not moment.records
        for decision in moment.decisions
        if decision.action == "delete"
    }


def _created(record: Record) -> float:
    return record.manifest.created if record.manifest is not None else 0.0


def _managed(view: View) -> tuple[list[_Saved], list[Event], tuple[str, ...]]:
    """From the journal: what was saved, with what it took, and where the run went back."""
    lines = journal.read(view.root)
    begin = max((place for place, line in enumerate(lines) if line.get("event") == "started"), default=0)
    lines = [line for line in lines[begin:] if isinstance(line.get("id", ""), str)]
    there = {record.id: record for record in view.records if record.id and record.ours}
    freed = {line["id"]: line.get("bytes") for line in lines if line.get("event") == "stripped"}
    alone = any(r.state == "weights" and r.id not in freed for r in there.values())
    shares = [stripped(r.manifest).size / r.size for r in there.values() if r.state == "full" and r.manifest and r.size]
    share = median_low(shares) if shares else None
    saves: dict[str, _Saved] = {}
    events: list[Event] = []
    for line in lines:
        kind, id, step = line.get("event"), line.get("id", ""), line.get("step")
        if kind == "finished":
            events.append(Retain())
        if not id or not isinstance(step, int):
            continue
        if kind in ("saved", "adopted") and id not in saves:
            saves[id] = _saved(line, there.get(id), freed.get(id), share, alone=alone)
            events += _save(view, saves[id], metrics.read(view.root, id))
        elif kind == "resumed":
            events.append(Resume(step))
    unknown = [record for id, record in there.items() if id not in saves]
    notes = (f"{len(unknown)} checkpoints aren't in the journal and are left out",) if unknown else ()
    return list(saves.values()), events, notes


def _saved(line: dict[str, Any], record: Record | None, freed: object, share: float | None, *, alone: bool) -> _Saved:
    total = int(finite(line.get("bytes")) or 0)
    created = finite(line.get("time")) or 0.0
    if record is not None and record.manifest is not None:
        created = record.manifest.created
        weights = stripped(record.manifest).size
        full: int | None = record.size if record.state == "full" else None if alone else total
    else:
        known = total - int(freed) if isinstance(freed, int) else None
        weights = known if known is not None else int(total * share) if share is not None else total
        full = None if alone else total
    return _Saved(step=line["step"], id=line["id"], created=created, full=full, weights=weights, record=record)


def _save(view: View, saved: _Saved, values: dict[str, float]) -> list[Event]:
    """The save with what came after it. A value counts from the next save on, as in the live run."""
    record = saved.record
    events: list[Event] = []
    first = record is not None and view.arguments(record).get("save_strategy") == "best"
    events.append(Save(saved.step, saved.full, saved.weights, saved.created, values if first else {}))
    if values and not first:
        events.append(Metrics(saved.step, values))
    return events + [Pin(saved.step, name) for name in (record.pinned if record is not None else ())]


def _stock(view: View, keep: Keep) -> tuple[list[_Saved], list[Event], tuple[str, ...]]:
    """From what is there, and what the newest one's arguments and log say of those that are gone."""
    there = {r.step: r for r in view.records if r.layout in TRAINERS and r.ours and r.step > 0}
    if not there:
        return [], [], ()
    newest = there[max(there)]
    arguments = view.arguments(newest)
    strategy, every = arguments.get("save_strategy"), finite(arguments.get("save_steps"))
    strategy = getattr(strategy, "value", strategy)
    told = save_points("steps", every, max_steps=newest.step) if strategy == "steps" and every and every >= 1 else ()
    steps = sorted({*there, *told})
    wanted = dict.fromkeys(metric for name, _ in keep.monitors for metric in needs(name))
    values = {name: _log(view.root / newest.name, name) for name in wanted}
    saves, events = [], list[Event]()
    for place, step in enumerate(steps):
        record = there.get(step)
        like = record or newest
        model = like.manifest.parts.get("model", ()) if like.manifest is not None else ()
        weights = sum(like.manifest.files[name].size for name in model) if like.manifest is not None else like.size
        full = like.size if like.state == "full" else None
        saves.append(
            _Saved(step=step, id="", created=float(place), full=full, weights=weights, record=record),
        )
        events.append(Save(step, full, weights, float(place)))
        known = {name: by_step[step] for name, by_step in values.items() if step in by_step}
        if known:
            events.append(Metrics(step, known))
    gone = len(steps) - len(there)
    notes = (f"{gone} saves that are gone are told by save_steps={every:g}",) if gone and every else ()
    return saves, [*events, Retain()], notes


def _log(path: Path, monitor: str) -> dict[int, float]:
    try:
        return read_metrics(path / STATE, monitor)[1]
    except UsageError:
        return {}
