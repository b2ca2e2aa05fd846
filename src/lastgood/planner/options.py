"""The flat keywords of `lastgood.plan`, each brought to the part that it belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from lastgood.errors import UsageError, wrong_type
from lastgood.model import finite
from lastgood.planner.history import Schedule, as_values
from lastgood.planner.machine import Machine
from lastgood.planner.sizes import Training
from lastgood.policy import Keep
from lastgood.ranking import known_mode

KEEP = {
    "keep_last": "last",
    "keep_best": "best",
    "keep_every": "every",
    "keep_within": "within",
    "keep_full": "full",
    "save_total_limit": "total",
}
"""Flat option -> option of Keep."""

OWN = ("load_best_model_at_end", "crash_at", "compare")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a plan starts from. load_best: for the stock Trainer; None compares with and without."""

    training: Training
    schedule: Schedule
    machine: Machine
    keep: Keep
    limit: int | None
    load_best: bool | None = None
    crash_at: int | None = None
    compare: Literal["stock"] | None = None
    notes: tuple[str, ...] = ()


def asked(keep: Keep | None, options: Mapping[str, Any]) -> Asked:
    """Raises UsageError for an option that doesn't exist (and says which one is near), or has a wrong value."""
    parts: dict[str, tuple[str, ...]] = {
        kind.__name__: kind.__struct_fields__ for kind in (Training, Schedule, Machine)
    }
    known = [*(name for names in parts.values() for name in names), *KEEP, *OWN]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"options: {', '.join(known)}"
            raise UsageError(f"plan has no option {name!r}", hint=hint)
    given = {part: {n: options[n] for n in names if n in options} for part, names in parts.items()}
    rules = {KEEP[name]: value for name, value in options.items() if name in KEEP and value is not None}
    if keep is not None and rules:
        raise UsageError("keep and keep_... (or save_total_limit) both say what to keep", hint="leave one of them out")
    schedule, policy, notes = _metric(given["Schedule"], keep, rules)
    crash_at, compare = options.get("crash_at"), options.get("compare")
    if crash_at is not None and not (isinstance(crash_at, int) and 0 < crash_at <= schedule.max_steps):
        raise wrong_type("crash_at", crash_at, f"a step from 1 to {schedule.max_steps}")
    if compare not in (None, "stock"):
        raise wrong_type("compare", compare, "'stock' or None")
    if schedule.metrics is None and schedule.evaluated:
        schedule = msgspec.structs.replace(schedule, metrics=_course(schedule, crash_at))
        notes += (f"{schedule.monitor} is assumed: {schedule.metrics}; --metrics gives another course or real values",)
    notes += tuple(_without_effect(options))
    return Asked(
        training=Training(**given["Training"]), schedule=schedule, machine=Machine(**given["Machine"]), keep=policy,
        limit=policy.total if policy.total is not None else (policy.last or 0) + (policy.best or 0) or None,
        load_best=options.get("load_best_model_at_end"), crash_at=crash_at, compare=compare, notes=notes,
    )  # fmt: skip


def _without_effect(options: Mapping[str, Any]) -> Iterator[str]:
    """What was asked for and decides nothing: said, lest its numbers are taken for those of the run."""
    lora, ranks = options.get("train") == "lora", options.get("world_size", 1)
    idle = {
        "lora_r": (not lora, "--train lora"),
        "lora_targets": (not lora, "--train lora"),
        "dtype": (lora, "--train full"),
        "shard": (ranks == 1 and options.get("shard") != "none", "a --world-size above 1"),
        "load_best_model_at_end": (options.get("compare") is None, "--compare stock"),
        "used": ("disk" not in options, "--disk"),
        "mtbf": ("step_time" not in options, "--step-time"),
        "restart": ("step_time" not in options or not options.keys() & {"mtbf", "crash_at"}, "--mtbf, --step-time"),
    }
    for name, (without, unless) in idle.items():
        if name in options and without:
            option = "load-best" if name.startswith("load_best") else name.replace("_", "-")
            yield f"--{option} changes nothing without {unless}"


def _metric(
    given: Mapping[str, Any], keep: Keep | None, rules: Mapping[str, Any]
) -> tuple[Schedule, Keep, tuple[str, ...]]:
    """One metric for the schedule and the policy; eval_loss where something ranks and no name is given."""
    values = given.get("metrics")
    metrics = as_values(values) if isinstance(values, Mapping) else values
    monitor, mode = given.get("monitor"), given.get("mode")
    if keep is not None and keep.monitor is not None:
        first, way = keep.primary
        monitor, mode = monitor or first, mode or way
    ranks = "best" in rules or given.get("eval_steps") is not None or metrics not in (None, "none")
    ranks = ranks or given.get("save_strategy") == "best"
    notes: tuple[str, ...] = ()
    if keep is not None and len(keep.monitors) > 1:
        notes += (f"only {monitor} has a course here: what is best by the other metrics is kept besides",)
    if monitor is None and ranks and metrics != "none":
        monitor = "eval_loss"
    if monitor is not None and mode is None:
        mode = known_mode(str(monitor))
    named = {} if monitor is None else {"monitor": monitor, "mode": mode}
    if keep is None:
        keep = Keep(**rules, **named)
        if mode is None and monitor is not None:
            named["mode"] = keep.mode
    elif keep.monitor is None and monitor is not None:
        keep = msgspec.structs.replace(keep, **named)
    if "max_steps" not in given:
        raise UsageError("how long is the run?", hint="max_steps=10000 (--max-steps 10000)")
    return Schedule(**{**given, "metrics": metrics, **named}), keep, notes


def _course(schedule: Schedule, crash_at: int | None) -> str:
    """An overfitting run, as there the newest isn't the best: before a crash, if there is one, best half-way to it."""
    steps = msgspec.structs.replace(schedule, metrics="flat").evaluations()
    before = [step for step in steps if crash_at is None or step <= crash_at]
    place = (len(steps) - 1) * 3 // 5 if crash_at is None else (len(before) - 1) // 2
    return f"overfit@{steps[max(0, place)]}" if steps and finite(place) is not None else "falling"
