"""The run with lastgood: its own policy and its own retention, in virtual time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lastgood import policy, ranking
from lastgood.model import Record
from lastgood.planner.history import until
from lastgood.planner.machine import Machine
from lastgood.planner.outcome import Crash, Life, Outcome, There, Use, seconds_lost, sums
from lastgood.policy import Keep
from lastgood.ranking import metric_of
from lastgood.simulate import Event, Metrics, Moment, Save, simulate


def outcome(history: Sequence[Event], keep: Keep, machine: Machine, *, crash_at: int | None = None) -> Outcome:
    """What is on disk over these events, under this policy. crash_at: the last step that is done before a crash."""
    moments = simulate(history, keep)
    sizes = next(((e.full_bytes or 0, e.weights_bytes) for e in history if isinstance(e, Save)), (0, 0))
    found: dict[str, Any] = sums([Use(m.step, m.peak, m.bytes, len(m.records)) for m in moments], machine)
    after = within = None
    if crash_at is not None:
        after = crash(history, keep, machine, crash_at)
        saved = max((e.step for e in history if isinstance(e, Save) and e.step <= crash_at), default=None)
        within = None if saved is None else crash(history, keep, machine, saved, in_save=True)
    return Outcome(
        system="lastgood", name="lastgood", policy=keep.describe(), full=sizes[0], weights=sizes[1],
        lives=lives(moments), crash=after, crash_in_save=within, **found,
    )  # fmt: skip


def lives(moments: Sequence[Moment]) -> tuple[Life, ...]:
    """From when to when each checkpoint is on disk, in the order of the saves."""
    found: dict[str, Life] = {}
    for moment in moments:
        for record in moment.before[-1:]:  # the one that was just saved
            found.setdefault(record.id, Life(step=record.step))
        if moment.before is moment.records:
            continue
        left = {record.id: record for record in moment.records}
        for record in moment.before:
            if record.id not in left:
                found[record.id] = msgspec.structs.replace(found[record.id], until=moment.step)
            elif record.state != left[record.id].state:
                found[record.id] = msgspec.structs.replace(found[record.id], weights_from=moment.step)
    return tuple(found.values())


def at(history: Sequence[Event], keep: Keep, step: int, *, in_save: bool = False) -> tuple[policy.Decision, ...]:
    """Each checkpoint that is there after `step` (or in the middle of its save), with why it stayed.

    The reasons are those of the last retention; the values those that are known by now.
    """
    known = until(history, step, inclusive=not in_save)
    moments = simulate(known, keep)
    if not moments:
        return ()
    values = _values(known)
    decided = {decision.record.id: decision for decision in moments[-1].decisions}
    return tuple(
        msgspec.structs.replace(decided[record.id], record=_with(record, values.get(record.step, {})))
        for record in moments[-1].records
    )


def crash(history: Sequence[Event], keep: Keep, machine: Machine, step: int, *, in_save: bool = False) -> Crash:
    """What a crash after `step` finds: the same functions as a live resume choose what to go on from."""
    decisions = at(history, keep, step, in_save=in_save)
    records = [decision.record for decision in decisions]
    monitor, mode = keep.primary
    there = tuple(
        There(
            step=d.record.step,
            state=d.record.state,
            bytes=d.record.size,
            value=None if monitor is None else metric_of(d.record, monitor),
            reasons=d.reasons,
        )
        for d in decisions
    )
    newest = policy.latest(records)
    best = ranking.best(records, monitor, mode) if monitor is not None and mode is not None else None
    lost = step if newest is None else step - newest.step
    if newest is None:
        why = "no checkpoint is complete"
    elif in_save:
        why = f"the newest full one; checkpoint-{step} was never committed and is passed over"
    else:
        why = "the newest full one, verified"
    return Crash(
        step=step, in_save=in_save, there=there,
        resume=None if newest is None else newest.step, why_resume=why,
        best=None if best is None else best.step, why_best=_why_best(best, keep),
        lost_steps=lost, lost_seconds=seconds_lost(machine, lost),
    )  # fmt: skip


def _why_best(best: Record | None, keep: Keep) -> str:
    monitor, mode = keep.primary
    if monitor is None:
        return "no metric says which is the best"
    if best is None:
        return f"no {monitor} was recorded for what is there"
    word = "lowest" if mode == "min" else "highest"
    return f"{word} {monitor} of all that were saved: {metric_of(best, monitor):.6g}"


def _values(known: Sequence[Event]) -> dict[int, Mapping[str, float]]:
    return {event.step: event.values for event in known if isinstance(event, Metrics)}


def _with(record: Record, values: Mapping[str, float]) -> Record:
    return msgspec.structs.replace(record, metrics={**record.metrics, **values}) if values else record
