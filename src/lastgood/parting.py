"""What a run does with the grace of a SIGTERM: it looks up how long that is, weighs a save against it, and tells."""

from __future__ import annotations

import os
from pathlib import Path

from lastgood import grace
from lastgood.grace import GRACE, Grace, Late
from lastgood.repo import journal
from lastgood.talk import warn

HINT = (
    "a longer grace (`lastgood run --grace`, Kubernetes' terminationGracePeriodSeconds, Slurm's --signal, systemd's"
    " TimeoutStopSec), saves in the background, more of them, or smaller checkpoints"
)


_said: set[str] = set()


def known() -> float | None:
    """The grace of this process in seconds; None where nobody says. What is wrong with it is said, once."""
    seconds, wrong = grace.find(os.environ)
    if wrong and wrong not in _said:
        _said.add(wrong)
        warn(wrong)
    return seconds


def refuses(budget: Grace, door: Path, step: int, size: int) -> bool:
    """Whether the save of this step, of about so many bytes, isn't begun: it can't be there before the kill."""
    if budget.refused == step:
        return True
    left = budget.left
    if left is None:
        return False
    if budget.over:
        found = grace.verdict(0.0, size, ())
    else:
        found = grace.verdict(left, size, grace.measured(journal.read(door)))
    if found.save:
        return False
    budget.refused = step
    journal.append(door, "skipped", step=step, reason=found.reason)
    _tell(budget, step, f"step {step} was not saved: {found.reason}")
    return True


def gives_up(budget: Grace, door: Path, step: int, error: Late) -> None:
    """The save of this step was broken off: what was written of it goes at the next start."""
    budget.refused = step
    journal.append(door, "failed", step=step, error=str(error.message))
    _tell(budget, step, f"NO CHECKPOINT at step {step}: {error.message}")


def _tell(budget: Grace, step: int, what: str) -> None:
    told = "" if GRACE in what else f" ({GRACE}={budget.seconds:g})"
    warn(f"{what}{told}; earlier checkpoints are intact, and the same command goes on from there\n  hint: {HINT}")
