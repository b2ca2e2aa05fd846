"""Whether a training is still healthy, by its losses and gradient norms. Pure.

Two things are poison: numbers that are none, and a loss that is back above where the run began and stays there. Both
verdicts are made to be sure rather than early: a false alarm costs recovery points.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import msgspec

PERSISTS = 8
"""Steps in a row for which a spike has to last."""
STRANGE = 20
"""Steps in a row after which a loss that is no number counts although the weights got finite updates: a few come from
data without labels."""
BASE = 30
"""Losses that have to be known before any is called high."""
WINDOW = 200
"""Losses that the running median is over."""
FIRST = 20
"""Losses at the beginning of the run whose median tells where it began."""
TIMES = 10.0
"""So many spreads above the running median is high."""
FLOOR = 0.02
"""The least spread, in units of the loss; and one twentieth of the median. Noise of tiny losses is no spike."""
EVERY = 10
"""The running median is taken anew after so many losses."""


class Sample(msgspec.Struct, frozen=True):
    """One optimizer step. skipped: its gradients were thrown away, as a loss scaler does with infinite ones."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    skipped: bool = False


class Sick(msgspec.Struct, frozen=True):
    """first: the first step whose checkpoint is poisoned. reason: what was seen, with the step where it began.

    spoiled: the weights got an update that is no number. Whoever has them at hand may look: something of the user's own
    may have kept it from them, and then nothing is wrong.
    """

    first: int
    reason: str
    spoiled: bool = False


@dataclass(slots=True)
class Watch:
    """Follows one run, step by step; `sick` is the verdict on the state after the newest one."""

    sick: Sick | None = None
    _strange: int = 0  # steps in a row, up to now
    _begun: Sample | None = None  # the first of them, or the first of them that reached the weights
    _reached: bool = False
    _high: list[Sample] = field(default_factory=list)
    _base: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _begin: list[float] = field(default_factory=list)
    _since: int = 0  # losses since the median was taken
    _median: float = 0.0
    _spread: float = 0.0

    def add(self, samples: Iterable[Sample]) -> Sick | None:
        """Take in the next steps. Returns the verdict after them."""
        for sample in samples:
            self._numbers(sample)
            if sample.loss is not None and math.isfinite(sample.loss):
                self._height(sample)
            self.sick = self._not_numbers() or self._too_high()
        return self.sick

    # ---- numbers that are none -----------------------------------------------------------

    def _numbers(self, sample: Sample) -> None:
        if not _strange(sample.loss) and (sample.skipped or not _strange(sample.grad_norm)):
            self._strange, self._begun, self._reached = 0, None, False
            return
        self._strange += 1
        # A batch without a label has a loss of nan and gradients of zero: the weights are as good as before.
        reached = not sample.skipped and not _finite(sample.grad_norm)
        if self._begun is None or (reached and not self._reached):
            self._begun = sample
        self._reached = self._reached or reached

    def _not_numbers(self) -> Sick | None:
        begin = self._begun
        if begin is None or (not self._reached and self._strange < STRANGE):
            return None
        name, value = ("loss", begin.loss) if _strange(begin.loss) else ("gradient norm", begin.grad_norm)
        return Sick(begin.step, f"{name} is {value} since step {begin.step}", self._strange < STRANGE)

    # ---- a loss that is too high ---------------------------------------------------------

    def _height(self, sample: Sample) -> None:
        loss = sample.loss
        assert loss is not None
        if len(self._begin) < FIRST:
            self._begin.append(loss)
        if self._is_high(loss):
            # Kept out of the median: else a run that has diverged for long enough would count as healthy again.
            self._high.append(sample)
            del self._high[PERSISTS:]
            return
        self._high.clear()
        self._base.append(loss)
        self._since += 1
        if self._since >= EVERY or len(self._base) <= BASE:
            self._since = 0
            self._median = median(self._base)
            self._spread = 1.4826 * median(abs(value - self._median) for value in self._base)

    def _is_high(self, loss: float) -> bool:
        if len(self._base) < BASE:
            return False
        return loss > max(self._median + TIMES * self._least(), median(self._begin))

    def _least(self) -> float:
        return max(self._spread, FLOOR, abs(self._median) / 20)

    def _too_high(self) -> Sick | None:
        if len(self._high) < PERSISTS:
            return None
        first = self._high[0]
        assert first.loss is not None
        times = (first.loss - self._median) / self._least()
        # The loss of a step is that of the weights before it.
        return Sick(
            first.step - 1,
            f"loss {first.loss:.3g} at step {first.step} is {times:.0f} times the spread above its running median"
            f" {self._median:.3g}, above {median(self._begin):.3g} at the beginning, and stays there",
        )


def periods(samples: Iterable[Sample], watch: Watch | None = None) -> list[tuple[int, int, str]]:
    """(first step, last step, reason) of every stretch whose checkpoints are poisoned; the end of the run is far."""
    watch, found = watch or Watch(), list[tuple[int, int, str]]()
    last = 0
    open_: Sick | None = None
    for sample in samples:
        sick = watch.add((sample,))
        if open_ is not None and (sick is None or sick.first != open_.first):
            found.append((open_.first, last, open_.reason))
        open_, last = sick, sample.step
    if open_ is not None:
        found.append((open_.first, 1 << 62, open_.reason))
    return found


def _strange(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
