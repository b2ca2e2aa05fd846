"""How many steps apart the saves of a run should be, from what a step and a save take in it. Pure; times in seconds."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from lastgood.errors import UsageError, wrong_type
from lastgood.frequency import daly, for_overhead
from lastgood.units import seconds, span

OVERHEAD = 0.02
"""The share of the time that saves may take where nothing else is said (2 %)."""
MOST = 1 << 62
"""Steps: more than any run has."""

Bound = Literal["overhead", "mtbf", "writing", "longest", "step"]
"""What set an interval.

overhead  saves take the given share of the time
mtbf      Daly's optimum between saves and steps done again after failures
writing   the one before is written by then
longest   no longer without a save than that, whatever it costs
step      saves are so cheap that nothing but the step itself is in their way
"""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """How far apart saves are under save_steps="auto", which is Interval().

    overhead: the share of the time, above 0 and below 1, that saves may take (0.02). mtbf: mean time between failures
    ("1d", seconds): the optimum by it instead. longest: after so much time without one ("30m") a save is due, whatever
    it takes. Raises UsageError.
    """

    overhead: float | None = None
    mtbf: float | str | None = None
    longest: float | str = 1800.0

    def __post_init__(self) -> None:
        for name in ("mtbf", "longest"):
            value = seconds(f"Interval({name})", getattr(self, name))
            if value is not None or name == "longest":
                _above(f"Interval({name})", value, "a time above 0: '1d', '30m', or a number of seconds")
            msgspec.structs.force_setattr(self, name, value)
        if self.overhead is not None:
            _above("Interval(overhead)", self.overhead, "a share of the time above 0 and below 1", 1.0)
            if self.mtbf is not None:
                raise UsageError(
                    "Interval(overhead) and Interval(mtbf) both say how often to save", hint="leave one of them out"
                )

    @property
    def patience(self) -> float:
        """`longest` in seconds."""
        assert not isinstance(self.longest, str)
        return self.longest


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """steps: from a save to the next. step, cost, behind: what it was chosen by, see `choose`."""

    steps: int
    bound: Bound
    step: float
    cost: float
    behind: float

    @property
    def share(self) -> float:
        """Of the time, 0 to 1, that saves take."""
        whole = self.steps * self.step + self.cost
        return self.cost / whole if whole > 0 else 0.0

    @property
    def reason(self) -> str:
        """As it is told."""
        why = {
            "overhead": f"so saves take {_percent(self.share)} of the time",
            "mtbf": f"the least time lost to saves and failures; saves take {_percent(self.share)}",
            "writing": f"the one before is on the disk by then; saves take {_percent(self.share)} of the time",
            "longest": f"no longer without one, though saves take {_percent(self.share)} of the time",
            "step": f"saves take {_percent(self.share)} of the time",
        }
        goes_on = f" and goes on for {_time(self.behind)} behind it" if self.behind else ""
        return f"a step takes {_time(self.step)}, a save {_time(self.cost)} of training{goes_on}: {why[self.bound]}"


def choose(wanted: Interval, *, step: float, cost: float, behind: float) -> Choice:
    """The interval for steps that take `step` seconds.

    cost: by how much a save makes training longer: where it stands still, and where its steps are slowed down by what
    is being written. behind: for how long a save is still being written when training goes on. The optimum between
    saves and failures is Daly's, see `lastgood.frequency`. Raises UsageError for times that no run has.
    """
    for name, value in (("step", step), ("cost", cost), ("behind", behind)):
        if not 0 <= value < math.inf:
            raise wrong_type(name, value, "a number of seconds, 0 or more")
    count: float
    bound: Bound
    if wanted.mtbf is not None:
        assert not isinstance(wanted.mtbf, str)
        count, bound = _steps(daly(cost, wanted.mtbf), step), "mtbf"
    else:
        count, bound = _steps(for_overhead(cost, wanted.overhead or OVERHEAD), step), "overhead"
    most = max(1, math.floor(_steps(wanted.patience, step)))
    if count > most:
        count, bound = most, "longest"
    # Sooner than that it would wait for the one before, which costs more than was measured.
    busy = math.ceil(_steps(behind, step))
    if count < busy:
        count, bound = busy, "writing"
    steps = max(1, round(count) if bound == "mtbf" else math.ceil(count))
    return Choice(steps=steps, bound="step" if count < 1 else bound, step=step, cost=cost, behind=behind)


def checked(value: Any) -> Interval | int | None:
    """What the option `save_steps` takes: "auto", an Interval, a number of steps, None. Raises UsageError."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is not None and value != "auto" and not whole and not isinstance(value, Interval):
        raise wrong_type("save_steps", value, "a whole number of at least 1, 'auto', lastgood.Interval(...) or None")
    return Interval() if value == "auto" else value


def _steps(time: float, step: float) -> float:
    """So many steps last so long; finite also for steps that take no time."""
    if time <= 0:
        return 0.0
    return min(time / step, float(MOST)) if step > 0 else float(MOST)


def _above(name: str, value: Any, expected: str, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < below:
        raise wrong_type(name, value, expected)


def _percent(share: float) -> str:
    return f"{share * 100:.2g} %" if share < 0.995 else "all"


def _time(value: float) -> str:
    return f"{value:.2g} s" if value < 100 else span(value)
