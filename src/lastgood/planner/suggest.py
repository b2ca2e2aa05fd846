"""Policies that fit on a disk where the one that was asked for doesn't. Pure; each is tried by the simulation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from lastgood.policy import Keep
from lastgood.simulate import Event, Moment, moments

MOST = 3
"""Suggestions at most."""


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    """A policy that fits. peak, steady: bytes at most during a save and between saves. count, full: checkpoints that
    are there at the end, and how many of them can be resumed from."""

    keep: Keep
    words: str
    peak: int
    steady: int
    count: int
    full: int


def suggest(history: Sequence[Event], asked: Keep, room: int) -> tuple[Suggestion, ...]:
    """Up to three policies that never need more than `room` bytes, the one that keeps most first; () if none does.

    They differ in how many checkpoints keep their full state, as that is what takes the space.
    """
    found = []
    for full in dict.fromkeys((asked.full, 3, 2, 1)):
        tried = (_tried(history, keep, room) for keep in candidates(asked, full))
        fits = next((suggestion for suggestion in tried if suggestion is not None), None)
        if fits is not None and fits.full == min(fits.count, full or fits.count):
            found.append(fits)
    found.sort(key=lambda s: (-s.count, -s.full, -s.peak))
    different = {(s.count, s.full, s.peak): s for s in reversed(found)}
    return tuple(reversed(different.values()))[:MOST]


def candidates(asked: Keep, full: int | None) -> Iterator[Keep]:
    """Policies like the one that was asked for, each keeping no more than the one before."""
    common: dict[str, Any] = {"full": full, "monitor": asked.monitor, "mode": asked.mode}
    everies = dict.fromkeys((asked.every, None))
    if asked.total is not None:
        for total in range(min(asked.total, 10), 0, -1):
            for every in everies:
                yield Keep(total=total, every=every, **common)
        return
    lasts = range(1, min(asked.last or 3, 5) + 1)
    bests = range(min(asked.best or 3, 5) + 1) if asked.monitor is not None else range(1)
    pairs = sorted(((last, best) for last in lasts for best in bests), key=lambda pair: (-sum(pair), -pair[1]))
    for last, best in pairs:
        for every in everies:
            yield Keep(last=last, best=best or None, every=every, **common)


def _tried(history: Sequence[Event], keep: Keep, room: int) -> Suggestion | None:
    """The policy with what it needs; None as soon as a save doesn't fit."""
    peak = steady = 0
    last: Moment | None = None
    for last in moments(history, keep):
        if last.peak > room:
            return None
        peak, steady = max(peak, last.peak), max(steady, last.bytes)
    there = [] if last is None else [record.state for record in last.records]
    return Suggestion(
        keep=keep, words=keep.describe(), peak=peak, steady=steady, count=len(there), full=there.count("full")
    )
