"""A plan as people read it: the answer first, then tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lastgood import units
from lastgood.cli import text
from lastgood.cli.table import Column, Style, lines, terminal_width
from lastgood.planner.outcome import Crash, Outcome
from lastgood.planner.plan import Plan


def show(plan: Plan, style: Style) -> list[str]:
    """The lines of a plan."""
    out = [*_wrapped([*_answer(plan, style), *_about(plan, style)]), ""]
    out += lines(_columns(plan, style), [_row(o) for o in plan.outcomes], style, columns_wide=terminal_width())
    if plan.lastgood.crash is not None:
        out += ["", *_crashes(plan, style)]
    out += ["", *_wrapped(_often(plan))]
    if plan.suggestions:
        out += ["", "policies that fit:"]
        columns = [
            Column("words", "POLICY", str, shrink=True),
            Column("count", "STAY", str, right=True),
            Column("full", "RESUMABLE", str, right=True),
            Column("steady", "ON DISK", style.size, right=True),
            Column("peak", "PEAK", style.size, right=True),
        ]
        rows = [{name: getattr(s, name) for name in s.__struct_fields__} for s in plan.suggestions]
        out += lines(columns, rows, style, columns_wide=terminal_width())
    elif plan.fits is False:
        least = plan.lastgood.full * 2
        out += ["", f"no policy fits: a new checkpoint is written before the old one goes, {style.size(least)} for two"]
    return [*out, *_wrapped([f"note: {text.plain(note)}" for note in plan.notes])]


def _wrapped(said: Sequence[str]) -> list[str]:
    return [line for sentence in said for line in text.wrapped(sentence, terminal_width())]


def _answer(plan: Plan, style: Style) -> list[str]:
    best, machine, out = plan.lastgood, plan.machine, []
    if machine.disk is not None:
        room = style.size(max(0, machine.disk - machine.used))
        if best.full_at is None:
            out.append(f"fits: at most {style.size(best.peak)} of {room}")
        else:
            out.append(f"doesn't fit: the disk is full at step {best.full_at}; {style.size(best.peak)} of {room}")
    if best.crash is not None:
        crash = best.crash
        steps = ", ".join(str(there.step) for there in crash.there) or "none"
        resume = "start afresh" if crash.resume is None else f"resume from {crash.resume}"
        deploy = "" if crash.best is None else f", deploy {crash.best}"
        count = len(crash.there)
        out.append(f"after a crash at step {crash.step}: {count} on disk ({steps}), {resume}{deploy}")
    if not out:
        left = best.uses[-1].count if best.uses else 0
        many = f"{left} checkpoint{'' if left == 1 else 's'}"
        out.append(f"at most {style.size(best.peak)} on disk, {style.size(best.end)} in {many} at the end")
    return out


def _about(plan: Plan, style: Style) -> list[str]:
    training, sizes = plan.training, plan.sizes
    kind = f"{training.train}, {training.optim}, {training.dtype}"
    kind += f" with {training.master} master weights" if training.master else ""
    known = sorted(sizes.parts.items(), key=lambda item: -item[1])
    large = [f"{name} {style.size(count)}" for name, count in known if count * 1000 > sizes.full]
    ranks = training.world_size
    each = f"; a rank of {ranks} writes up to {style.size(sizes.per_rank)}" if ranks > 1 else ""
    alone = f"its weights alone {style.size(sizes.weights)}{each}"
    return [
        f"{text.plain(plan.model)}, from {text.plain(plan.source)}; {kind}",
        "; ".join([plan.lastgood.policy, *(f"Trainer: {o.policy}" for o in plan.outcomes[1:2])]),
        text.plain("; ".join(sizes.notes)),
        f"a checkpoint has {style.size(sizes.full)}: {', '.join(large)}; {alone}",
    ]


def _columns(plan: Plan, style: Style) -> list[Column]:
    columns = [
        Column("name", "SYSTEM", str),
        Column("saves", "SAVES", str, right=True),
        Column("steady", "ON DISK", style.size, right=True),
        Column("peak", "PEAK", style.size, right=True),
        Column("peak_at", "AT STEP", str, right=True),
        Column("end", "AT THE END", style.size, right=True),
    ]
    if plan.machine.disk is not None:
        columns.append(Column("full_at", "DISK FULL AT", lambda step: str(step or "never"), right=True))
    if plan.machine.price is not None:
        columns.append(Column("monthly", "A MONTH", lambda price: f"{price:,.2f}", right=True))
    return columns


def _row(outcome: Outcome) -> dict[str, Any]:
    row = {name: getattr(outcome, name) for name in outcome.__struct_fields__}
    return {**row, "saves": len(outcome.lives), "full_at": outcome.full_at or 0}


def _crashes(plan: Plan, style: Style) -> list[str]:
    monitor, _ = plan.keep.primary
    columns = [
        Column("name", "SYSTEM", str),
        Column("step", "STEP", str, right=True),
        Column("value", (monitor or "metric").upper(), lambda value: value, right=True),
        Column("state", "STATE", str),
        Column("bytes", "SIZE", style.size, right=True),
        Column("why", "WHY IT IS THERE", str, shrink=True),
    ]
    crash = plan.lastgood.crash
    assert crash is not None
    out = lines(
        columns, [row for o in plan.outcomes for row in _there(o, o.crash)], style, columns_wide=terminal_width()
    )
    out += ["", f"after step {crash.step}:", *_verdicts(plan.outcomes, [o.crash for o in plan.outcomes])]
    if crash.best is not None and crash.resume is not None and crash.best < crash.resume:
        lost = crash.resume - crash.best
        out.append(f"  resuming from the best instead would do {lost} more steps again: it is for deploying")
    if plan.lastgood.crash_in_save is not None:
        out.append(f"in the save of step {plan.lastgood.crash_in_save.step}:")
        out += _verdicts(plan.outcomes, [o.crash_in_save for o in plan.outcomes])
    return out


def _there(outcome: Outcome, crash: Crash | None) -> list[dict[str, Any]]:
    there = () if crash is None else crash.there
    best = None if crash is None else crash.best
    return [
        {
            "name": outcome.name if place == 0 else "",
            "step": item.step,
            "value": None if item.value is None else text.number(item.value) + ("*" if item.step == best else " "),
            "state": item.state,
            "bytes": item.bytes,
            "why": " · ".join(text.plain(reason) for reason in item.reasons),
        }
        for place, item in enumerate(reversed(there))
    ]


def _verdicts(outcomes: Sequence[Outcome], crashes: Sequence[Crash | None]) -> list[str]:
    """What each system goes on from, and what there is to deploy: two sentences each."""
    out, gap = [], 2 + max(len(outcome.name) for outcome in outcomes) + 2
    wide = terminal_width()
    for outcome, crash in zip(outcomes, crashes, strict=True):
        if crash is None:
            continue
        again = f"{crash.lost_steps} steps again" if crash.lost_steps else "nothing is done again"
        if crash.lost_seconds:
            again += f", {units.span(crash.lost_seconds)}"
        none = "start afresh" if outcome.system == "lastgood" else "resume FAILS"
        where = none if crash.resume is None else f"resume {crash.resume}"
        said = [f"{where} ({again}): {crash.why_resume}"]
        said.append(f"deploy {crash.best or '?'}: {crash.why_best}")
        name = f"  {outcome.name}".ljust(gap)
        for sentence in said:
            for line in text.wrapped(text.plain(sentence), None if wide is None else max(20, wide - gap)):
                out.append(name + line)
                name = " " * gap
    return out


def _often(plan: Plan) -> list[str]:
    found = plan.frequency
    out = [f"a save every {_steps(found.interval)}: a failure costs {_steps(found.redone)} on average"]
    if found.failures is not None and found.lost is not None:
        out[0] += f"; {_few(found.failures)} failures expected, {units.span(found.lost)} done again"
    if found.cost is not None:
        share = "" if found.overhead is None else f", {100 * found.overhead:.1f} % of the time"
        out.append(f"a save takes {units.span(found.cost)}{share}")
    if found.young is not None and found.daly is not None:
        waste = "" if found.waste is None else f"; with failures {100 * found.waste:.1f} % of the time is lost"
        best = _steps(round(max(1, found.daly)))
        out.append(f"best interval: {best} (Daly; Young: {max(1, found.young):.0f}){waste}")
    return out


def _steps(count: float) -> str:
    return f"{count:.10g} step{'' if count == 1 else 's'}"


def _few(count: float) -> str:
    return f"{count:,.1f}" if count >= 0.95 else f"{count:.1g}"
