"""Metrics that a loop records: of the step it is at, or of an earlier one whose checkpoint is still there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lastgood import policy, ranking
from lastgood.manager import Manager
from lastgood.model import Record, finite
from lastgood.talk import warn


class Metrics:
    """waiting: those of a step that isn't saved yet, and may be saved still."""

    def __init__(self, run: Manager) -> None:
        self._run = run
        self._step = -1
        self._waiting: dict[str, Any] = {}

    def note(self, step: int, values: Mapping[str, Any], *, now: int) -> None:
        """Attach them to the checkpoint of `step`; `now` is the step that the loop is at."""
        plain = {name: number(value) for name, value in values.items()}
        if step not in self._run.saved and step != now:
            found = policy.at_step(self._run.seen(), step)
            if not found:
                warn(f"record({step}): there is no checkpoint of step {step}; its metrics count for nothing")
                return
            self._run.saved[step] = found[0]
        if step in self._run.saved:
            self._run.record(step, plain)
        else:
            self._waiting = {**(self._waiting if self._step == step else {}), **plain}
            self._step = step

    def saved(self, step: int) -> None:
        """There is a checkpoint of this step now."""
        if self._step == step:
            self._run.record(step, self._waiting)
            self._step, self._waiting = -1, {}

    def best(self, values: Mapping[str, Any]) -> bool:
        """Whether they are better than those of every checkpoint, by any of the policy's metrics."""
        plain = {name: finite(number(value)) for name, value in values.items()}
        mine = Record(name="", step=-1, state="full", metrics={k: v for k, v in plain.items() if v is not None})
        others = self._run.seen()
        return any(self._beats(mine, others, monitor, mode) for monitor, mode in self._run.keep.monitors)

    def _beats(self, mine: Record, others: Sequence[Record], monitor: str, mode: ranking.Mode) -> bool:
        value, leader = ranking.metric_of(mine, monitor), ranking.best(others, monitor, mode)
        known = None if leader is None else ranking.metric_of(leader, monitor)
        if value is None or known is None:
            return value is not None
        return value < known if mode == "min" else value > known


def number(value: Any) -> Any:
    """A tensor of one element as a number; anything else as it is."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
