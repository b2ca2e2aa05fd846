"""What is launched and how often: the command with its checkpoint filled in, the limits, one line per launch."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lastgood.errors import UsageError

PLACE = "{checkpoint}"
"""What stands in the command for the path of the checkpoint to resume from."""


@dataclass(frozen=True)
class Limits:
    """How often and how fast to try again."""

    restarts: int = 10
    """Restarts in a row after crashes without progress."""
    preemptions: int | None = None
    """Restarts after preemptions in all; None: no limit."""
    backoff: float = 5.0
    """Seconds to wait after a crash; doubles with each one without progress."""
    backoff_max: float = 300.0
    grace: float = 60.0
    """Seconds between SIGTERM and SIGKILL."""
    seconds: float | None = None
    """Seconds for everything together, all launches: the command is told, and asked to stop `grace` before the end."""

    def __post_init__(self) -> None:
        for name in ("restarts", "preemptions", "backoff", "backoff_max", "grace", "seconds"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf):
                raise UsageError(f"{name} must be 0 or more, not {value!r}")
        if self.seconds is not None and self.seconds <= self.grace:
            raise UsageError(
                f"a time limit of {self.seconds:g} s leaves nothing before the {self.grace:g} s of grace",
                hint="a longer one, or a shorter --grace",
            )


@dataclass(frozen=True)
class Launch:
    """One try, for the summary."""

    number: int
    checkpoint: Path | None
    status: int
    """Exit status, or minus the signal that ended it."""
    seconds: float
    reason: str
    """done, preempted, crash, stopped, usage or not executable."""

    def __str__(self) -> str:
        origin = self.checkpoint.name if self.checkpoint else "the beginning"
        return f"launch {self.number} from {origin}: {self.reason}, {described(self.status)} after {self.seconds:.0f} s"


def fill(command: Sequence[str], checkpoint: Path | None) -> list[str]:
    """The command with the path for {checkpoint}; without one the arguments that ask for it go, with their option."""
    filled: list[str] = []
    previous = ""
    for argument in command:
        if PLACE not in argument:
            filled.append(argument)
        elif checkpoint is not None:
            filled.append(argument.replace(PLACE, os.fspath(checkpoint)))
        # `-` is standard input and `--` the end of the options: neither takes a value.
        elif argument == PLACE and PLACE not in previous and previous.startswith("-") and previous not in ("-", "--"):
            filled.pop()
        previous = argument
    return filled


def described(status: int) -> str:
    """A status in words."""
    number = -status if status < 0 else status - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"status {status}"
    name += ": perhaps out of memory" if name == "SIGKILL" else ""
    return f"killed by signal {number} ({name})" if status < 0 else f"status {status} ({name})"
