"""`lastgood.plan(...)`: the whole of a run's checkpoints before it starts. Pure, but for the model's shapes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from lastgood.errors import UsageError
from lastgood.planner import compared, live, managed
from lastgood.planner.history import Schedule, events
from lastgood.planner.machine import Frequency, Machine, how_often
from lastgood.planner.options import KEEP, Asked, asked
from lastgood.planner.outcome import Outcome
from lastgood.planner.shapes import Model, model_of
from lastgood.planner.sizes import Sizes, Training, sizes
from lastgood.planner.suggest import Suggestion, suggest
from lastgood.policy import Keep
from lastgood.schedule import absolute_steps


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """outcomes: lastgood first, then what it is compared with. suggestions: policies that fit, if this one doesn't.

    Sizes are in bytes, times in seconds. `msgspec.json.encode` takes it as it is.
    """

    model: str
    source: str
    training: Training
    schedule: Schedule
    machine: Machine
    keep: Keep
    sizes: Sizes
    outcomes: tuple[Outcome, ...]
    frequency: Frequency
    suggestions: tuple[Suggestion, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def lastgood(self) -> Outcome:
        """The run with lastgood."""
        return self.outcomes[0]

    @property
    def fits(self) -> bool | None:
        """Whether every save finds room; None without a disk."""
        return None if self.machine.disk is None else self.lastgood.full_at is None


def plan(model: str | os.PathLike[str] | Mapping[str, Any] | Any, keep: Keep | None = None, **options: Any) -> Plan:
    """What a run will put onto the disk, what a crash would find there, and how often to save.

    model: a size ("13B"), a well-known name, a directory, a config.json, a config, a torch module, or a Trainer: its
    schedule, optimizer, policy and disk then count for what isn't given. keep: the policy; or, flat, keep_last,
    keep_best, keep_every, keep_full, keep_within, or save_total_limit. Further options by name:
    training: train ("full", "lora"), optim, dtype, master, lora_r, ...; schedule: max_steps, save_strategy,
    save_steps, eval_steps, metrics, monitor, mode; machine: disk and used (bytes), bandwidth (bytes/s), step_time,
    mtbf and restart (s), price (of a GB-month); load_best_model_at_end, crash_at (step), compare ("stock").
    Raises UsageError.
    """
    if live.is_trainer(model):
        shapes, (keep, options) = live.model_of_trainer(model), _filled(live.options(model), keep, options)
    else:
        shapes = model_of(model)
    wanted = asked(keep, options)
    taken = sizes(shapes, wanted.training)
    schedule, machine = wanted.schedule, wanted.machine
    history = tuple(events(schedule, taken.full, taken.weights, step_time=machine.step_time or 1.0))
    outcome = managed.outcome(history, wanted.keep, machine, crash_at=wanted.crash_at)
    others, refused = _stock(wanted, shapes) if wanted.compare is not None else ((), ())
    short = machine.disk is not None and outcome.full_at is not None
    return Plan(
        model=shapes.name, source=shapes.source, training=wanted.training, schedule=schedule, machine=machine,
        keep=wanted.keep, sizes=taken, outcomes=(outcome, *others),
        frequency=how_often(machine, schedule.max_steps, _interval(schedule, outcome), taken.full),
        suggestions=suggest(history, wanted.keep, (machine.disk or 0) - machine.used) if short else (),
        notes=(*wanted.notes, *refused),
    )  # fmt: skip


def _filled(
    theirs: Mapping[str, Any], keep: Keep | None, options: Mapping[str, Any]
) -> tuple[Keep | None, dict[str, Any]]:
    """What was asked for, and a Trainer's own settings for the rest; a policy is taken as a whole."""
    chosen = keep is not None or not options.keys().isdisjoint(KEEP)
    rest = {name: value for name, value in theirs.items() if not (chosen and name in ("keep", *KEEP))}
    policy = rest.pop("keep", None)
    return keep if chosen else policy, {**rest, **options}


def _stock(wanted: Asked, shapes: Model) -> tuple[tuple[Outcome, ...], tuple[str, ...]]:
    """The stock Trainer with and without load_best_model_at_end; (outcomes, why one of them can't be)."""
    taken = sizes(shapes, wanted.training, writer="trainer")
    values, found, notes = wanted.schedule.values(), [], []
    for load_best in (False, True) if wanted.load_best is None else (wanted.load_best,):
        if load_best and not values and wanted.load_best is None:
            continue
        try:
            args = compared.arguments(wanted.schedule, wanted.limit, load_best=load_best)
        except UsageError as error:
            if wanted.load_best is not None:
                raise
            notes.append(error.message)
            continue
        crash_at = wanted.crash_at
        found.append(compared.outcome(args, values, wanted.machine, taken.full, taken.weights, crash_at=crash_at))
    return tuple(found), tuple(notes)


def _interval(schedule: Schedule, outcome: Outcome) -> float:
    """Steps between saves."""
    if schedule.save_strategy == "steps":
        return min(absolute_steps(schedule.save_steps, schedule.max_steps), schedule.max_steps)
    if schedule.save_strategy == "epoch" and schedule.steps_per_epoch:
        return schedule.steps_per_epoch
    return schedule.max_steps / max(1, len(outcome.lives))
