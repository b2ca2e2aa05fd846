"""What steps and saves take in this run, and from it how many steps lie between two saves. No clock, no disk.

Whoever measures says what time it is, in seconds of a clock that doesn't go back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lastgood.interval import Choice, Interval, choose
from lastgood.model import finite
from lastgood.units import span

FIRST_STEPS, FIRST_SECONDS = 10, 60.0
"""The first save, which tells what one takes, comes after so many steps or so long, whichever is over first."""
RECENT = 100
"""Steps whose median counts."""
SAVES = 9
"""Saves whose medians count."""
NEAR = 0.1
"""An interval that would change by less than that share stays as it is."""

EVENT = "interval"
"""The journal's event (FORMAT.md)."""


@dataclass(slots=True)
class Saved:
    """stall: seconds that training stood still for a save. more: by how much the steps until it was on the disk took
    longer than others, together. behind: from when training went on until then."""

    stall: float
    more: float = 0.0
    behind: float = 0.0


@dataclass(slots=True)
class Tempo:
    """wanted: None where nobody asked for an interval; then nothing is measured and nothing is ever due.

    choice: the interval in force, None until it is known.
    """

    wanted: Interval | None = None
    choice: Choice | None = None
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _saves: deque[Saved] = field(default_factory=lambda: deque(maxlen=SAVES))
    _made: int = 0  # saves of this process that are on the disk
    _under_way: Saved | None = None
    _went_on: float = 0.0

    def begin(self, events: Iterable[Mapping[str, Any]]) -> Choice | None:
        """Go on from what this run measured last, by its journal; a run that began anew has measured nothing."""
        last: Mapping[str, Any] | None = None
        for event in events:
            if event.get("event") in (EVENT, "started"):
                last = event if event["event"] == EVENT else None
        if self.wanted is None or last is None:
            return None
        found = [finite(last.get(name)) for name in ("step_seconds", "save_seconds", "behind_seconds")]
        if any(value is None or value < 0 for value in found):
            return None
        step, cost, behind = (value or 0.0 for value in found)
        self._steps.append(step)
        self._saves.append(Saved(cost, 0.0, behind))
        self.choice = choose(self.wanted, step=step, cost=cost, behind=behind)
        return self.choice

    def stepped(self, taken: float, count: int, now: float, *, busy: bool) -> Choice | None:
        """`count` steps took so long together; busy: something of a save is still being written. A new interval."""
        if self.wanted is None or count < 1:
            return None
        save = self._under_way
        if save is None:
            self._steps.append(taken / count)
            return None
        if self._steps:
            save.more += taken - count * median(self._steps)
        return None if busy else self._done(save, now)

    def spent(self, stall: float, now: float, *, busy: bool) -> Choice | None:
        """A save is behind training, which stood still for so long. busy: it is still being written. A new interval."""
        if self.wanted is None:
            return None
        new = self._done(self._under_way, now - stall) if self._under_way is not None else None
        self._under_way, self._went_on = Saved(stall), now
        return new if busy else self._done(self._under_way, now) or new

    def due(self, steps: int, passed: float) -> str:
        """Why to save, so many steps and seconds after the last save or the beginning; "" if it isn't time."""
        if self.wanted is None:
            return ""
        if passed >= self.wanted.patience:
            return f"{span(passed)} since the last save"
        if self.choice is not None:
            return f"every {self.choice.steps} steps (save_steps='auto')" if steps >= self.choice.steps else ""
        first = self._under_way is None and (steps >= FIRST_STEPS or passed >= FIRST_SECONDS)
        return "to see what a save takes (save_steps='auto')" if first else ""

    def _done(self, save: Saved, now: float) -> Choice | None:
        """A save is on the disk. The first one takes longer than others: it counts only where there is none."""
        save.behind, self._under_way = max(0.0, now - self._went_on), None
        self._made += 1
        if self._made == 2:
            self._saves.clear()
        if self._made > 1 or not self._saves:
            self._saves.append(save)
        if self.wanted is None or not self._steps:
            return None
        stall = median(one.stall for one in self._saves)
        cost = max(stall, median(one.stall + one.more for one in self._saves))
        behind = median(one.behind for one in self._saves)
        new = choose(self.wanted, step=max(0.0, median(self._steps)), cost=max(0.0, cost), behind=behind)
        old, self.choice = self.choice, new
        if old is not None and abs(new.steps - old.steps) <= NEAR * old.steps:
            self.choice = old
        return None if self.choice is old else new


def told(choice: Choice) -> dict[str, Any]:
    """What the journal says of it."""
    return {
        "every": choice.steps,
        "bound": choice.bound,
        "step_seconds": float(f"{choice.step:.6g}"),
        "save_seconds": float(f"{choice.cost:.6g}"),
        "behind_seconds": float(f"{choice.behind:.6g}"),
        "share": float(f"{choice.share:.4g}"),
        "reason": choice.reason,
    }
