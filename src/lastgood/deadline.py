"""The wall-clock limit of a process: what its user says, `lastgood run --time-limit`, or Slurm. Decisions are pure.

Times are seconds of time.monotonic(): a clock that is set meanwhile changes nothing.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from lastgood.units import span

END = "LASTGOOD_END_TIME"
"""Set by `lastgood run --time-limit`: seconds since 1970 at which everything has to be over."""
SLURM = "SLURM_JOB_END_TIME"
"""Set by Slurm from 23.02 on in the environment of a job: seconds since 1970. Where it is missing nothing is guessed:
asking the controller takes a network."""
RESERVE = 30.0
"""Seconds that are left over in any case: for leaving, and for a file system that is slow just then."""
LONGEST = 20
"""So many of the last steps and saves are looked at for the longest."""

_IMPORTED = time.monotonic()


class Deadline(msgspec.Struct, frozen=True):
    """end: in seconds of the monotonic clock. source: who set it, as a person calls it."""

    end: float
    source: str


def find(
    limit: float | None, environment: Mapping[str, str], *, age: float, now: float, wall: float
) -> Deadline | None:
    """The limit in force: the user's word, else the nearer one of the environment; None if nothing limits.

    limit: seconds from the start of the process; infinite: none, whatever the environment says. age: of the process.
    now, wall: the same moment by the monotonic clock and in seconds since 1970. An end that is over when the process
    begins was that of another job: it limits nothing.
    """
    if limit is not None:
        return None if math.isinf(limit) else Deadline(now - age + limit, f"time_limit={span(limit)}")
    found = []
    for name, source in ((END, "lastgood run --time-limit"), (SLURM, f"Slurm's end of the job ({SLURM})")):
        end = _seconds(environment.get(name, ""))
        if end is not None and end > wall:
            found.append(Deadline(now + end - wall, source))
    return min(found, key=lambda deadline: deadline.end, default=None)


def here(limit: float | None) -> Deadline | None:
    """The same for this process, now."""
    return find(limit, os.environ, age=process_age(), now=time.monotonic(), wall=time.time())


def near(now: float, end: float, step_seconds: float, save_seconds: float) -> str:
    """Why it is time to save and leave; "" while another step and its save fit.

    Two of each: the next step may take longer than the longest so far, and so may its save.
    """
    left, needed = end - now, 2 * step_seconds + 2 * save_seconds + RESERVE
    if left >= needed:
        return ""
    took = f"a step takes up to {step_seconds:.2g} s, a save {save_seconds:.2g} s"
    return f"the time limit is near: {span(left)} left, {took}" if left > 0 else "the time limit is over"


@dataclass(slots=True)
class Pace:
    """How long steps and saves take: the longest of the last ones, in seconds."""

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=LONGEST))
    saves: deque[float] = field(default_factory=lambda: deque(maxlen=LONGEST))

    def near(self, deadline: Deadline | None, now: float) -> str:
        """`near`, by what was measured; "" without a deadline."""
        if deadline is None:
            return ""
        return near(now, deadline.end, max(self.steps, default=0.0), max(self.saves, default=0.0))


def process_age() -> float:
    """Seconds since this process was started; where the system doesn't tell, since lastgood was imported."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")  # field 22
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _IMPORTED


def _seconds(text: str) -> float | None:
    """A time since 1970; None for anything else (Slurm writes a huge number, or none, for "no limit")."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < 1e11 else None
