"""The same run with the stock Trainer, by its own rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lastgood.model import finite
from lastgood.planner.history import Schedule
from lastgood.planner.machine import Machine
from lastgood.planner.outcome import Crash, Life, Outcome, There, Use, seconds_lost, sums
from lastgood.planner.stock import Stock, StockMoment, stock_history, stock_resumes_from


def arguments(schedule: Schedule, limit: int | None, *, load_best: bool) -> Stock:
    """What the Trainer would be told. Raises UsageError where it would refuse to start."""
    evaluates = bool(schedule.evaluations())
    return Stock(
        max_steps=schedule.max_steps,
        save_strategy=schedule.save_strategy,
        save_steps=schedule.save_steps,
        steps_per_epoch=schedule.steps_per_epoch,
        eval_strategy="steps" if evaluates and schedule.save_strategy != "epoch" else schedule.save_strategy,
        eval_steps=(schedule.eval_steps or schedule.save_steps) if evaluates else None,
        save_total_limit=limit,
        load_best_model_at_end=load_best,
        metric_for_best_model=schedule.monitor if load_best or schedule.save_strategy == "best" else None,
        greater_is_better=None if schedule.mode is None else schedule.mode == "max",
    )


def outcome(
    args: Stock, values: Mapping[int, float], machine: Machine, full: int, weights: int, *, crash_at: int | None = None
) -> Outcome:
    """full, weights: bytes of one checkpoint; the Trainer keeps no weights alone. values: step -> metric."""
    moments = stock_history(args, values)
    uses = [Use(m.step, len(m.during) * full, len(m.kept) * full, len(m.kept)) for m in moments]
    told = [f"save_total_limit={args.save_total_limit}"] if args.limit is not None else ["no save_total_limit"]
    if args.load_best_model_at_end:
        told.append("load_best_model_at_end")
    after = within = None
    if crash_at is not None:
        done = [moment for moment in moments if moment.step <= crash_at and not moment.end]
        after = _crash(args, values, machine, full, done, crash_at, in_save=False)
        if done:
            within = _crash(args, values, machine, full, done, done[-1].step, in_save=True)
    return Outcome(
        system="trainer", name="Trainer, load_best" if args.load_best_model_at_end else "Trainer",
        policy=", ".join(told), full=full, weights=weights, lives=_lives(moments), crash=after, crash_in_save=within,
        **sums(uses, machine),  # type: ignore[arg-type]
    )  # fmt: skip


def _lives(moments: Sequence[StockMoment]) -> tuple[Life, ...]:
    gone = {step: moment.step for moment in moments for step, _ in moment.removed}
    return tuple(Life(step=m.step, until=gone.get(m.step)) for m in moments if not m.end)


def _crash(
    args: Stock,
    values: Mapping[int, float],
    machine: Machine,
    full: int,
    done: Sequence[StockMoment],
    step: int,
    *,
    in_save: bool,
) -> Crash:
    last = done[-1] if done else None
    on_disk = () if last is None else last.during if in_save else last.kept
    cut = step if in_save else None
    reasons = {} if last is None else dict((done[-2].reasons if len(done) > 1 else {}) if in_save else last.reasons)
    there = tuple(
        There(
            step=s,
            state="incomplete" if s == cut else "full",
            bytes=full,
            value=values.get(s),
            reasons=("the save was cut off",) if s == cut else (reasons.get(s, ""),),
        )
        for s in on_disk
    )
    usable = [s for s in on_disk if s != cut]
    resume, why = stock_resumes_from(usable, cut, save_only_model=args.save_only_model)
    lost = step - max(usable, default=0)
    best, why_best = _best(args, values, usable, step, done[-2] if in_save and len(done) > 1 else last)
    return Crash(
        step=step, in_save=in_save, there=there, resume=resume, why_resume=why, best=best, why_best=why_best,
        lost_steps=lost, lost_seconds=seconds_lost(machine, lost),
    )  # fmt: skip


def _best(
    args: Stock, values: Mapping[int, float], usable: Sequence[int], step: int, moment: StockMoment | None
) -> tuple[int | None, str]:
    """What there is to deploy. Without load_best_model_at_end nothing keeps the best: the log alone tells of it."""
    sign = -1.0 if _higher(args) else 1.0
    ranked = sorted((sign * values[s], s) for s in usable if finite(values.get(s)) is not None)
    if moment is not None and moment.best in usable:
        return moment.best, f"best_model_checkpoint, {moment.why_best}"
    if not ranked:
        return None, "no metric says which is the best"
    best = ranked[0][1]
    seen = min((sign * v, s) for s, v in values.items() if s <= step and finite(v) is not None)
    why = f"the best that is left, {values[best]:.6g}; nothing but the log tells"
    if seen < ranked[0]:
        why += f", and step {seen[1]} with {values[seen[1]]:.6g} is gone"
    return best, why


def _higher(args: Stock) -> bool:
    return bool(args.greater_is_better)
