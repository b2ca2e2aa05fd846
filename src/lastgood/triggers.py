"""When a checkpoint is due: every so many steps, seconds or epochs, and when somebody asked for it. Pure.

No clock inside: whoever asks says what time it is, in seconds of any clock that doesn't go back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from lastgood.errors import wrong_type
from lastgood.interval import Interval, checked
from lastgood.units import seconds, span


class Triggers(msgspec.Struct, frozen=True, kw_only=True):
    """Each of them alone brings a save; None: never for this reason.

    save_steps: every so many steps, or how their number is chosen (`lastgood.tempo`). save_seconds: so many seconds
    after the last save, or the beginning. save_epochs: every so many epochs; 0.5 is twice in an epoch. time_limit:
    seconds from the start of the process until it will be ended from outside, see `lastgood.deadline`.

    The two times may be given as "90m"; here they are seconds. Raises UsageError.
    """

    save_steps: int | Interval | None = None
    save_seconds: float | None = None
    save_epochs: float | None = None
    time_limit: float | None = None

    @classmethod
    def of(
        cls,
        *,
        save_steps: Any = None,
        save_seconds: float | str | None = None,
        save_epochs: float | None = None,
        time_limit: float | str | None = None,
    ) -> Triggers:
        """With times as people write them."""
        return cls(
            save_steps=checked(save_steps),
            save_seconds=seconds("save_seconds", save_seconds),
            save_epochs=save_epochs,
            time_limit=seconds("time_limit", time_limit),
        )

    def __post_init__(self) -> None:
        checked(self.save_steps)
        epochs = self.save_epochs
        if epochs is not None and not (_is_number(epochs) and 0 < epochs < math.inf):
            raise wrong_type("save_epochs", epochs, "a number above 0, or None")
        if self.save_seconds is not None and not (_is_number(self.save_seconds) and 0 < self.save_seconds < math.inf):
            raise wrong_type("save_seconds", self.save_seconds, "a number of seconds above 0, or None")
        if self.time_limit is not None and not (_is_number(self.time_limit) and self.time_limit > 0):
            raise wrong_type("time_limit", self.time_limit, "a number of seconds above 0 (inf: no limit), or None")

    @property
    def interval(self) -> Interval | None:
        """How the number of steps between saves is chosen, if it is."""
        return self.save_steps if isinstance(self.save_steps, Interval) else None

    @property
    def any(self) -> bool:
        """Whether any of them brings a save by itself."""
        return any(every is not None for every in (self.save_steps, self.save_seconds, self.save_epochs))


class Last(msgspec.Struct, frozen=True):
    """The newest save, or where this process began: its step, epoch and moment (seconds)."""

    step: int
    time: float
    epoch: float = 0.0


def due(
    triggers: Triggers,
    *,
    step: int,
    now: float,
    last: Last,
    epoch: float = 0.0,
    paced: str = "",
    asked: Sequence[str] = (),
) -> tuple[str, ...]:
    """The reasons to save now, after this step; () for none, and where this very step is saved already.

    paced: why by the interval that was chosen (`Tempo.due`). asked: reasons from outside (a signal, `lastgood save`,
    a time limit that is near). A loop that doesn't report every step is served as well: a multiple that was passed
    counts.
    """
    if step <= last.step:
        return ()
    reasons, every = ([paced] if paced else []), triggers.save_steps
    if isinstance(every, int) and step // every > last.step // every:
        reasons.append(f"every {every} steps")
    if triggers.save_epochs is not None and _turns(epoch, triggers) > _turns(last.epoch, triggers):
        turn = f"{triggers.save_epochs:g} epochs" if triggers.save_epochs != 1 else "epoch"
        reasons.append(f"every {turn}")
    if triggers.save_seconds is not None and now - last.time >= triggers.save_seconds:
        reasons.append(f"{span(now - last.time)} since the last save")
    return (*reasons, *asked)


def _turns(epoch: float, triggers: Triggers) -> int:
    # A thousandth of a turn: an epoch that is counted in thirds ends at 0.9999999.
    return math.floor(epoch / (triggers.save_epochs or 1.0) + 1e-3)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
