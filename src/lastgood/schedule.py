"""When a Trainer with given settings will save. Pure; the rules are those of transformers' DefaultFlowCallback."""

from __future__ import annotations

import math
from collections.abc import Iterator


def absolute_steps(steps: float, max_steps: int) -> int:
    """save_steps as a number of steps: a value below 1 is a share of the whole run, rounded up."""
    return math.ceil(max_steps * steps) if steps < 1 else int(steps)


def total_steps(max_steps: int, num_train_epochs: float, steps_per_epoch: int | None) -> int | None:
    """Length of the run in optimizer steps; None if the data has no length and max_steps isn't given."""
    if max_steps > 0:
        return max_steps
    return None if steps_per_epoch is None else math.ceil(num_train_epochs * steps_per_epoch)


def save_points(
    strategy: str, save_steps: float, *, max_steps: int, steps_per_epoch: int | None = None
) -> Iterator[int]:
    """The steps at which a run of `max_steps` saves, in order. "best" depends on metrics: none can be told."""
    if strategy == "steps":
        every = absolute_steps(save_steps, max_steps)
        if every > 0:
            yield from range(every, max_steps, every)
        yield max_steps  # the stock Trainer saves at the last step as well
    elif strategy == "epoch" and steps_per_epoch is not None:
        yield from range(steps_per_epoch, max_steps, steps_per_epoch)
        yield max_steps
