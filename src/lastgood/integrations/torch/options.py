"""The options of `CheckpointManager`, checked where they are given."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lastgood import background
from lastgood.background import Wanted
from lastgood.errors import UsageError, wrong_type
from lastgood.interval import Interval
from lastgood.policy import Keep
from lastgood.triggers import Triggers


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """keep: what to retain (`lastgood.Keep`); everything by default.
    save_steps, save_seconds, save_epochs: a checkpoint every so many steps, seconds (or "30m"), epochs of the loader
        that is followed. save_steps="auto": as many as keep saves at 2 % of the time, by what is measured in this run;
        or a `lastgood.Interval`, with another share or with a mean time between failures.
    save_best: also at a step whose recorded metric is the best so far.
    time_limit: seconds (or "3h30m") after which this process will be ended from outside; save and leave before.
    on_error: a save that fails warns and training goes on, or raises SaveFailed.
    on_full: what a save does that finds no room on the disk, in its inodes or in the quota, whatever on_error says of
        other failures: "warn" leaves it out and training goes on, "wait" holds training until there is room, "stop"
        leaves with status 75 (Preempted, caused by NotEnoughSpace). None: as on_error says.
    verify: "full" hashes every byte before a restore, "quick" compares sizes and headers.
    allow_missing: parts that a restore may go without, and parts of a checkpoint that this run doesn't have.
    init: a checkpoint of another run whose weights a new run begins with; a run that has checkpoints ignores it.
    arguments: hyperparameters to write down (secrets are masked) and to compare at a restore.
    takeover: write to the run although another process holds it (that one is fenced off).
    trail: write down loss, gradient norm, learning rate and a hash of the data of every step.
    background: let training go on while a copy of the state is written: True, False, "auto" (where it is trained on an
        accelerator), or a `lastgood.Background`: its memory, and what becomes of a save that finds the last under way.
    guard: "mark" a checkpoint whose numbers are poisoned (NaN, a loss that jumped and stays up), so that nothing is
        resumed from it or rotated onto it, or "off".
    """

    keep: Keep = field(default_factory=Keep)
    save_steps: int | Literal["auto"] | Interval | None = None
    save_seconds: float | str | None = None
    save_epochs: float | None = None
    save_best: bool = False
    time_limit: float | str | None = None
    on_error: Literal["warn", "raise"] = "warn"
    on_full: Literal["warn", "wait", "stop"] | None = None
    verify: Literal["full", "quick"] = "full"
    allow_missing: Sequence[str] = ()
    init: str | os.PathLike[str] | None = None
    arguments: Mapping[str, Any] | None = None
    takeover: bool = False
    trail: bool = True
    background: Wanted = "auto"
    guard: Literal["mark", "off"] = "mark"

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Keep):
            raise wrong_type(
                "keep", self.keep, "a lastgood.Keep, for instance Keep(last=2, best=3, monitor='eval_loss')"
            )
        for name, allowed in (
            ("on_error", ("warn", "raise")),
            ("on_full", ("warn", "wait", "stop", None)),
            ("verify", ("full", "quick")),
            ("guard", ("mark", "off")),
        ):
            if getattr(self, name) not in allowed:
                raise wrong_type(name, getattr(self, name), " or ".join(repr(value) for value in allowed))
        for name in ("save_best", "takeover", "trail"):
            if not isinstance(getattr(self, name), bool):
                raise wrong_type(name, getattr(self, name), "True or False")
        background.checked(self.background)
        names = self.allow_missing
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise wrong_type("allow_missing", names, "a list of names of parts")
        if self.arguments is not None and not isinstance(self.arguments, Mapping):
            raise wrong_type("arguments", self.arguments, "a dict, for instance vars(args)")
        if self.save_best and self.keep.monitor is None:
            raise UsageError(
                "save_best=True needs to know the best by which metric",
                hint="keep=lastgood.Keep(best=1, monitor='eval_loss')",
            )
        self.triggers  # noqa: B018  # raises UsageError now and not at the first step

    @property
    def triggers(self) -> Triggers:
        return Triggers.of(
            save_steps=self.save_steps,
            save_seconds=self.save_seconds,
            save_epochs=self.save_epochs,
            time_limit=self.time_limit,
        )
