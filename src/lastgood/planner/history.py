"""The saves and evaluations of a run that hasn't begun: when they happen, and what the metric may look like. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from lastgood.errors import UsageError, wrong_type
from lastgood.model import finite
from lastgood.ranking import Mode, known_mode
from lastgood.schedule import absolute_steps, save_points
from lastgood.simulate import Event, Metrics, Retain, Save

SHAPES = ("falling", "overfit", "flat", "noisy", "none")
"""Courses of a loss: better at every evaluation; best at one step and worse again; always the same; falling with
noise of 5 %; not evaluated at all."""

STRATEGIES = ("steps", "epoch", "best", "no")

MOST = 100_000
"""Saves, or evaluations, that a plan reckons with: more are a mistake, and would take all memory."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """When a run saves and evaluates; names and meanings are those of TrainingArguments.

    save_steps, eval_steps: a number of steps, or a share of the run below 1. eval_steps None: at every save, if
    anything needs a metric. metrics: one of SHAPES, "overfit@1500" (the best is at that step), or step -> value.
    monitor, mode: the metric's name and whether a lower ("min") or a higher value is better. seed: of the noise.
    """

    max_steps: int
    save_strategy: str = "steps"
    save_steps: float = 500
    steps_per_epoch: int | None = None
    eval_steps: float | None = None
    metrics: str | Mapping[int, float] | None = None
    monitor: str | None = None
    mode: Mode | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise wrong_type("max_steps", self.max_steps, "a whole number of at least 1")
        if self.save_strategy not in STRATEGIES:
            raise wrong_type("save_strategy", self.save_strategy, " or ".join(map(repr, STRATEGIES)))
        if self.save_strategy == "epoch" and not self.steps_per_epoch:
            raise UsageError("save_strategy='epoch' needs steps_per_epoch: how many optimizer steps are an epoch?")
        for option in ("save_steps", "eval_steps"):
            value = getattr(self, option)
            if value is not None and not ((number := finite(value)) is not None and number > 0):
                raise wrong_type(option, value, "a number of steps above 0, or a share of the run below 1")
            if value is not None and value > 1 and value != int(value):
                raise wrong_type(option, value, "a whole number of steps, or a share of the run below 1")
        for option in ("save_steps", "eval_steps"):
            value = getattr(self, option)
            if value is not None and self.max_steps // max(1, absolute_steps(value, self.max_steps)) > MOST:
                raise UsageError(f"{option}={value:g} of {self.max_steps} steps: more than {MOST} times in one run")
        if isinstance(self.metrics, str) and self.metrics.partition("@")[0] not in SHAPES:
            raise UsageError(
                f"metrics={self.metrics!r} is no known course of a metric",
                hint=f"{', '.join(SHAPES)}, overfit@1500, or values by step",
            )

    @property
    def evaluated(self) -> bool:
        """Whether there is a metric at all."""
        return self.monitor is not None and self.metrics != "none"

    def saves(self) -> tuple[int, ...]:
        """The steps that are saved whatever the metric."""
        return tuple(
            save_points(
                self.save_strategy, self.save_steps, max_steps=self.max_steps, steps_per_epoch=self.steps_per_epoch
            )
        )

    def evaluations(self) -> tuple[int, ...]:
        """The steps that are evaluated, in order."""
        if not self.evaluated:
            return ()
        every = None if self.eval_steps is None else save_points("steps", self.eval_steps, max_steps=self.max_steps)
        if isinstance(self.metrics, Mapping):  # what was measured in between, eval_steps won't see
            steps = self.metrics if every is None else self.metrics.keys() & set(every)
            return tuple(sorted(step for step in steps if 0 < step <= self.max_steps))
        if every is None:
            return self.saves() or tuple(save_points("steps", self.save_steps, max_steps=self.max_steps))
        return tuple(every)

    def values(self) -> dict[int, float]:
        """step -> value of the metric at its evaluation. Raises UsageError for an overfit@STEP that isn't evaluated."""
        steps = self.evaluations()
        if isinstance(self.metrics, Mapping):
            return {step: float(self.metrics[step]) for step in steps}
        course = _course(str(self.metrics or "falling"), steps, self.max_steps, self.seed)
        higher = self.monitor is not None and (self.mode or known_mode(self.monitor)) == "max"
        return {step: 1 / value if higher else value for step, value in zip(steps, course, strict=True)}


def _course(shape: str, steps: Sequence[int], length: int, seed: int) -> list[float]:
    """A loss at these steps, above 0."""
    kind, _, where = shape.partition("@")
    if kind == "flat":
        return [1.3 for _ in steps]
    if kind == "overfit":
        return _overfit(where, steps)
    falling = [1.2 + 1.8 * math.exp(-4 * step / length) for step in steps]
    if kind == "noisy":
        noise = random.Random(seed)
        return [value * math.exp(noise.gauss(0, 0.05)) for value in falling]
    return falling


def _overfit(where: str, steps: Sequence[int]) -> list[float]:
    if not steps:
        return []
    if where and not (where.isdigit() and int(where) in steps):
        near = min(steps, key=lambda step: abs(step - int(where))) if where.isdigit() else steps[len(steps) // 2]
        raise UsageError(f"overfit@{where}: no evaluation is at step {where}", hint=f"metrics='overfit@{near}'")
    best = int(where) if where else steps[(len(steps) - 1) * 3 // 5]
    return [1.2 + (0.35 if step < best else 0.12) * math.log(step / best) ** 2 for step in steps]


def events(schedule: Schedule, full: int, weights: int, *, step_time: float = 1.0) -> Iterator[Event]:
    """What happens to a managed run, in order. full, weights: bytes of one checkpoint. step_time: seconds.

    A managed Trainer saves before the evaluation of the same step (the stock one after it), so a value counts from
    the next save on; with save_strategy="best" the evaluation decides whether to save and comes first.
    """
    values, saves = schedule.values(), set(schedule.saves())
    name, best = schedule.monitor or "", None
    sign = -1.0 if name and (schedule.mode or known_mode(name)) == "max" else 1.0
    for step in sorted(saves | values.keys()):
        known = {name: values[step]} if step in values else {}
        if schedule.save_strategy == "best":
            value = finite(values[step])
            if value is not None and (best is None or sign * value < best):
                best = sign * value
                yield Save(step, full, weights, step * step_time, known)
            continue
        if step in saves:
            yield Save(step, full, weights, step * step_time)
        if known:
            yield Metrics(step, known)
    yield Retain()


def until(history: Sequence[Event], step: int, *, inclusive: bool = True) -> list[Event]:
    """The part of a history before a step (inclusive: and at it); the end of the training isn't reached."""
    return [e for e in history if isinstance(e, (Save, Metrics)) and (e.step < step or (inclusive and e.step == step))]


def as_values(found: Mapping[Any, Any]) -> dict[int, float]:
    """Steps and values that came from outside, as numbers. Raises UsageError."""
    values: dict[int, float] = {}
    for step, value in found.items():
        try:
            values[int(step)] = float(value)
        except (TypeError, ValueError):
            raise wrong_type("metrics", {step: value}, "a number for each step") from None
    return values
