"""The grace of a SIGTERM: the seconds from the signal until the process is killed, and what still fits in. No disk.

Nobody tells a process how long that is but whoever launched it. Where it is known, a save that can't fit isn't begun,
and what is under way is given up shortly before the end: the process leaves by itself, with its status. Whatever is not
known speaks for the save: one that is cut off leaves what was there before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from lastgood.errors import SaveFailed

GRACE = "LASTGOOD_GRACE"
"""Set by `lastgood run --grace`, and by who else knows it: seconds from SIGTERM to SIGKILL."""
PARTING, SHARE = 3.0, 0.25
"""What a process needs to end, with all that others do at its exit: three seconds, or that share of a short grace."""
HASTE = 10.0
"""With fewer seconds left nothing is deleted any more: the next start does that as well."""
BESIDE = 4.0
"""A save alone may be so many times as fast as one that was written beside training: that one had one file at a time, a
lower priority, and waited for what training was to hand over."""
SMALL = 16 << 20
"""Bytes (16 MiB) below which a save takes as long as its number of files, whatever is in them."""


class Late(SaveFailed):
    """The grace was all but over while a save was being written."""


class Took(msgspec.Struct, frozen=True):
    """One save that was measured. seconds: until it was durable. beside: training went on meanwhile."""

    bytes: int
    seconds: float
    beside: bool = False


class Verdict(msgspec.Struct, frozen=True):
    """save: whether it is begun. reason: in words that end a sentence."""

    save: bool
    reason: str


def find(environment: Mapping[str, str]) -> tuple[float | None, str]:
    """(the grace in seconds, None where nobody says; what is wrong with what somebody says, "" if nothing is)."""
    text = environment.get(GRACE, "").strip()
    if not text:
        return None, ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 < value < math.inf:
        return value, ""
    return None, f"{GRACE}={text!r} is no number of seconds above 0: it is ignored, and the grace counts as unknown"


def measured(events: Iterable[Mapping[str, Any]]) -> tuple[Took, ...]:
    """The saves of this run, by its journal; what was saved before it began anew was another model's."""
    found: list[Took] = []
    for event in events:
        if event.get("event") == "started":
            found.clear()
        if event.get("event") != "saved":
            continue
        count, seconds, spent = event.get("bytes"), event.get("seconds"), event.get("spent")
        if not isinstance(count, int) or count <= 0 or not isinstance(seconds, (int, float)) or not seconds >= 0:
            continue
        # Only what is known to have held training up from beginning to end tells what a save alone takes.
        alone = isinstance(spent, Mapping) and spent.get("stall") == seconds
        found.append(Took(count, float(seconds), not alone))
    return tuple(found)


def fastest(size: int, saves: Iterable[Took]) -> float | None:
    """The least seconds that a save of so many bytes can take, by those that were measured; None without any.

    A smaller save is taken to be faster by as much as it is smaller, a larger one not to be slower.
    """
    return min((_alone(took) * min(1.0, max(size, SMALL) / max(took.bytes, SMALL)) for took in saves), default=None)


def _alone(took: Took) -> float:
    return took.seconds / (BESIDE if took.beside else 1.0)


def verdict(left: float | None, size: int, saves: Iterable[Took]) -> Verdict:
    """Whether a save of so many bytes is begun with so many seconds left; None: nobody knows how many."""
    if left is None:
        return Verdict(True, "how long the grace is nobody knows")
    if left <= 0:
        return Verdict(False, "the grace is all but over")
    least = fastest(size, saves)
    if least is None:
        return Verdict(True, f"{left:.3g} s of the grace are left, and what a save takes isn't known yet")
    even = "even " if least > left else ""
    told = f"{left:.3g} s of the grace are left, and {even}the fastest save so far would have taken {least:.3g} s"
    return Verdict(least <= left, told)


@dataclass(slots=True)
class Grace:
    """seconds: None where nobody says how many. since: gives when SIGTERM came, None before; by time.monotonic().

    refused: the step whose save was not begun, or given up, for lack of time; told once.
    """

    seconds: float | None = None
    since: Callable[[], float | None] = lambda: None
    refused: int = -1

    @property
    def left(self) -> float | None:
        """Seconds until the kill; None where nobody knows, and while there was no signal."""
        came = self.since()
        return None if came is None or self.seconds is None else came + self.seconds - time.monotonic()

    @property
    def usable(self) -> float | None:
        """The same without what the process needs to end; never below 0."""
        left = self.left
        return None if left is None else max(0.0, left - min(PARTING, SHARE * (self.seconds or 0.0)))

    @property
    def over(self) -> bool:
        """Whether it is time to end, whatever is under way."""
        return self.usable == 0.0

    @property
    def short(self) -> bool:
        """Whether what the next start does as well is left to it."""
        left = self.left
        return left is not None and left < HASTE

    def late(self) -> Late | None:
        """What is to be said of a save that is still being written when it is time to end; None while it isn't."""
        if not self.over:
            return None
        return Late(f"it was still being written when the {self.seconds:g} s after SIGTERM ({GRACE}) were all but over")

    def check(self) -> None:
        """Raises Late when it is time to end."""
        if (late := self.late()) is not None:
            raise late
