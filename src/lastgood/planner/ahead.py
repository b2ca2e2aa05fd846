"""The rest of a run, played through from what is on disk now: how much it takes at most, and where it ends. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from lastgood.model import Head, Record
from lastgood.policy import Keep
from lastgood.simulate import Event, Metrics, Save, moments

LEAST, MOST = 48, 200
"""Saves that are played through, at least and at most; what comes later repeats their last period."""


@dataclass(frozen=True, kw_only=True)
class Coming:
    """The saves that are still to come. steps: evenly apart; what lies beyond `end` is saved at `end`.

    full, weights: bytes of a checkpoint; full is None where the weights alone are saved. evaluated: every so many
    steps a metric arrives, None: never. improving: only what is better than before is saved (save_strategy="best").
    now, pace: seconds since 1970, and between saves; pace 0.0: not known.
    """

    steps: range
    end: int
    full: int | None
    weights: int
    evaluated: int | None = None
    improving: bool = False
    now: float = 0.0
    pace: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of one save."""
        return self.weights if self.full is None else self.full

    def step(self, place: int) -> int:
        """That of the save number `place`, from 0."""
        return min(self.steps[place], self.end)

    def _values(self, keep: Keep, place: int, *, falling: bool) -> Iterator[tuple[str, float]]:
        """Of several metrics each has best ones of its own: that takes the most."""
        count = len(keep.monitors)
        turn = self.step(place) // self.evaluated if self.evaluated and not self.improving else place
        for number, (name, mode) in enumerate(keep.monitors):
            sign = (-1.0 if falling else 1.0) * (-1.0 if mode == "max" else 1.0)
            others = 0 if turn % count == number else (-len(self.steps) if falling else len(self.steps))
            yield name, sign * (1 + place + others)

    def events(self, keep: Keep, *, falling: bool) -> Iterator[Event]:
        """In the order of a managed run. falling: each value is better than the one before, else each is worse."""
        for place in range(len(self.steps)):
            step = self.step(place)
            value = dict(self._values(keep, place, falling=falling))
            known = value if self.improving else {}
            yield Save(step, self.full, self.weights, self.now + (place + 1) * self.pace, known)
            if self.evaluated and value and not self.improving and step % self.evaluated == 0:
                yield Metrics(step, value)


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """peak: most bytes during a save, count: checkpoints at that moment. full_at: the first step whose save finds no
    room, None: all do. sure: whether that holds whatever the metric does."""

    peak: int
    count: int
    full_at: int | None = None
    sure: bool = True


def ahead(coming: Coming, keep: Keep, room: int, *, there: Sequence[Record] = (), head: Head | None = None) -> Ahead:
    """What the saves to come take under `keep`. room: bytes for this run's checkpoints, `there` among them.

    Metrics aren't known: the first ones are taken for the best, for then the best and the newest are different ones
    from early on. Where that doesn't fit, the opposite is tried as well.
    """
    course = _play(coming, keep, there, head, falling=coming.improving)
    place = course.first_above(room)
    step = None if place is None else coming.step(place)
    sure = True
    if place is not None and keep.monitor is not None and coming.evaluated and not coming.improving:
        sure = _play(coming, keep, there, head, falling=True).first_above(room) == place
    return Ahead(peak=course.highest, count=course.most, full_at=step, sure=sure)


@dataclass(frozen=True)
class _Course:
    """peaks, counts: at each save that was played through. After these every `period` saves add the same, up to save
    number `length`: the last, or the one from which on a policy lets go as much as comes."""

    peaks: Sequence[int]
    counts: Sequence[int]
    period: int
    length: int

    def first_above(self, room: int) -> int | None:
        played = len(self.peaks)
        place = next((place for place, peak in enumerate(self.peaks) if peak > room), None)
        if place is not None or self._growth <= 0:
            return place
        later = [
            start + self.period * ((room - self.peaks[start]) // self._growth + 1)
            for start in range(played - self.period, played)
        ]
        place = min(later)
        return place if place < self.length else None

    @property
    def highest(self) -> int:
        return self._most(self.peaks)

    @property
    def most(self) -> int:
        return self._most(self.counts)

    def _most(self, values: Sequence[int]) -> int:
        played = len(values)
        if played >= self.length:
            return max(values, default=0)
        growth = max(0, values[-1] - values[-1 - self.period])
        later = [
            values[start] + growth * ((self.length - 1 - start) // self.period)
            for start in range(played - self.period, played)
        ]
        return max(*values, *later)

    @property
    def _growth(self) -> int:
        return self.peaks[-1] - self.peaks[-1 - self.period] if self.length > len(self.peaks) else 0


def _play(coming: Coming, keep: Keep, there: Sequence[Record], head: Head | None, *, falling: bool) -> _Course:
    gap = max(1, coming.steps.step)
    period = 1 if keep.every is None else math.lcm(keep.every, gap) // gap
    beats = math.lcm(coming.evaluated, gap) // gap if coming.evaluated else 1
    beats *= max(1, len(keep.monitors))
    window = (keep.total or 0) + (keep.last or 0) + (keep.full or 0) + beats * ((keep.best or 0) + 1)
    window += int(keep.within / coming.pace) if keep.within and coming.pace > 0 else 0
    period = min(math.lcm(period, beats), MOST // 2)
    wanted = min(max(LEAST, window + 2 * period + 2), MOST)
    played = list(islice(moments(coming.events(keep, falling=falling), keep, there, head), wanted))
    grows = keep.unlimited or keep.every is not None
    length = len(coming.steps) if grows else min(len(coming.steps), max(window, wanted))
    return _Course([m.peak for m in played], [len(m.before) for m in played], period, length)


def steps_to_come(strategy: str, every: int | None, at: int, end: int) -> range:
    """The saves after step `at`, every so many steps, and one at the end of the run; none for other strategies."""
    if strategy == "no" or not every or every < 1 or at >= end:
        return range(0)
    return range((at // every + 1) * every, end + every, every)
