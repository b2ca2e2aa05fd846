"""What one system leaves on the disk over a run, and what there is after a crash. Records alone: pure, JSON-able."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lastgood.model import State
from lastgood.planner.machine import Machine, monthly


class Use(msgspec.Struct, frozen=True):
    """One save. peak, bytes: on disk before and after older ones go. count: checkpoints that are left."""

    step: int
    peak: int
    bytes: int
    count: int


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint. until: the save at which it is deleted; weights_from: at which it is stripped; None: never."""

    step: int
    weights_from: int | None = None
    until: int | None = None


class There(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint on disk, with why it is. value: of the metric, as far as it is known at that moment."""

    step: int
    state: State
    bytes: int
    value: float | None
    reasons: tuple[str, ...]


class Crash(msgspec.Struct, frozen=True, kw_only=True):
    """What a crash finds. step: the last one that was done. in_save: it came while that step was being saved.

    resume: what a relaunch goes on from, None if it fails. best: what to deploy. Both with the reason. lost_steps:
    that are done again (where the relaunch fails: once somebody has helped it); lost_seconds: with the restart.
    """

    step: int
    in_save: bool
    there: tuple[There, ...]
    resume: int | None
    why_resume: str
    best: int | None
    why_best: str
    lost_steps: int
    lost_seconds: float | None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """system: "lastgood" or "trainer". full, weights: bytes of one checkpoint. steady: most bytes between saves.
    peak: most bytes during a save, at step peak_at. end: bytes when training is done.
    full_at: the first save that the disk has no room for; None: all fit, or there is no disk to fit on.
    monthly: price of what is left at the end. crash: after the step that was asked for; crash_in_save: in its save.
    """

    system: str
    name: str
    policy: str
    full: int
    weights: int
    uses: tuple[Use, ...]
    lives: tuple[Life, ...]
    steady: int
    peak: int
    peak_at: int | None
    end: int
    full_at: int | None
    monthly: float | None
    crash: Crash | None = None
    crash_in_save: Crash | None = None


def sums(uses: Sequence[Use], machine: Machine) -> dict[str, object]:
    """The fields of an Outcome that follow from its saves."""
    highest = max(uses, key=lambda use: use.peak, default=None)
    room = None if machine.disk is None else machine.disk - machine.used
    end = uses[-1].bytes if uses else 0
    return {
        "uses": tuple(uses),
        "steady": max((use.bytes for use in uses), default=0),
        "peak": 0 if highest is None else highest.peak,
        "peak_at": None if highest is None else highest.step,
        "end": end,
        "full_at": None if room is None else next((use.step for use in uses if use.peak > room), None),
        "monthly": monthly(machine, end),
    }


def seconds_lost(machine: Machine, steps: int) -> float | None:
    """Seconds until the run is where it was; None if nobody knows how long a step takes."""
    return None if machine.step_time is None else steps * machine.step_time + machine.restart
