"""The options of `manage`, checked where they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lastgood import background
from lastgood.background import Wanted
from lastgood.errors import UsageError, wrong_type
from lastgood.interval import Interval
from lastgood.policy import Keep
from lastgood.ranking import known_mode
from lastgood.triggers import Triggers

MISSABLE = frozenset({"optimizer", "scheduler", "rng", "scaler", "data", "progress", "base_model", "callbacks"})
"""What `allow_missing` may name: every part but the weights, and the frozen base under an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """keep: what to retain; None takes save_total_limit, metric_for_best_model and greater_is_better.
    on_error: a save that fails warns and training goes on, or raises SaveFailed.
    on_full: what a save does that finds no room on the disk, in its inodes or in the quota, whatever on_error says of
        other failures: "warn" leaves it out and training goes on, "wait" holds training until there is room, "stop"
        leaves with status 75 (Preempted, caused by NotEnoughSpace). None: as on_error says.
    verify: "full" hashes every byte before a resume, "quick" compares sizes and headers.
    allow_missing: parts that a resume may go without; they start afresh, and the report says so.
    hyperparameters: on resume learning rate, weight decay, betas as saved, or this run's ("new").
    data_skip: how a resume gets past the batches already trained on; "auto" reads them again only where
        loading may draw random numbers in worker processes, "fast" never does, "replay" always.
    takeover: write to the run although another process holds it (that one is fenced off).
    save_steps: "auto": in place of the Trainer's save_steps as many as keep saves at 2 % of the time, by what is
        measured in this run; or a `lastgood.Interval` with another share, or with a mean time between failures.
    save_seconds: save as well when so much time ("30m", 1800) has gone by since the last save.
    time_limit: how long this process may run ("3h30m", seconds from its start): shortly before it is over the run saves
        and leaves with status 75. None takes what `lastgood run --time-limit` or Slurm says; math.inf: no limit.
    guard: "mark" marks checkpoints whose state is unhealthy (NaN, a loss that blew up), "off" doesn't look.
    trail: write down loss, gradient norm and a hash of the data of every step (`lastgood doctor --prove` needs it).
    background: let training go on while a copy of the state is written: True, False, "auto" (where it is trained on an
        accelerator), or a `lastgood.Background`: its memory, and what becomes of a save that finds the last under way.
    """

    keep: Keep | None = None
    on_error: Literal["warn", "raise"] = "warn"
    on_full: Literal["warn", "wait", "stop"] | None = None
    verify: Literal["full", "quick"] = "full"
    allow_missing: Sequence[str] = ()
    hyperparameters: Literal["saved", "new"] = "saved"
    data_skip: Literal["auto", "fast", "replay"] = "auto"
    takeover: bool = False
    save_steps: Literal["auto"] | Interval | None = None
    save_seconds: float | str | None = None
    time_limit: float | str | None = None
    guard: Literal["mark", "off"] = "mark"
    trail: bool = True
    background: Wanted = "auto"

    def __post_init__(self) -> None:
        if self.keep is not None and not isinstance(self.keep, Keep):
            raise wrong_type(
                "keep", self.keep, "a lastgood.Keep, for instance Keep(last=2, best=3, monitor='eval_loss')"
            )
        for name, allowed in (
            ("on_error", ("warn", "raise")),
            ("on_full", ("warn", "wait", "stop", None)),
            ("verify", ("full", "quick")),
            ("hyperparameters", ("saved", "new")),
            ("data_skip", ("auto", "fast", "replay")),
            ("guard", ("mark", "off")),
        ):
            if getattr(self, name) not in allowed:
                raise wrong_type(name, getattr(self, name), " or ".join(repr(value) for value in allowed))
        for name in ("takeover", "trail"):
            if not isinstance(getattr(self, name), bool):
                raise wrong_type(name, getattr(self, name), "True or False")
        background.checked(self.background)
        if isinstance(self.allow_missing, str) or not set(self.allow_missing) <= MISSABLE:
            raise wrong_type("allow_missing", self.allow_missing, f"a list of names out of {sorted(MISSABLE)}")
        if isinstance(self.save_steps, int):
            raise UsageError(
                "manage(save_steps) takes 'auto' or a lastgood.Interval",
                hint=f"a number belongs to the Trainer's arguments: save_steps={self.save_steps}",
            )
        assert self.triggers is not None  # raises what is wrong with the times

    @property
    def triggers(self) -> Triggers:
        """What brings a save besides the Trainer's own arguments."""
        return Triggers.of(save_steps=self.save_steps, save_seconds=self.save_seconds, time_limit=self.time_limit)


def retention(options: Options, args: Any) -> Keep:
    """The policy in force: `keep` if it was given, else what the Trainer's own arguments say."""
    if options.keep is not None:
        if args.save_total_limit is not None and args.save_total_limit > 0:
            raise UsageError(
                f"keep={options.keep} and save_total_limit={args.save_total_limit} both say what to keep",
                hint="remove one of the two",
            )
        return options.keep
    monitor = args.metric_for_best_model
    mode: Literal["min", "max"] | None = None
    if monitor is not None:
        mode = known_mode(monitor) if args.greater_is_better is None else ("max" if args.greater_is_better else "min")
    return Keep.from_limit(args.save_total_limit, monitor, mode)


def one_interval(options: Options, args: Any) -> None:
    """Raise UsageError where save_steps="auto" and the Trainer's arguments both say at which steps to save."""
    if options.triggers.interval is None or args.save_strategy != "steps":
        return
    usual = type(args).__dataclass_fields__["save_steps"].default
    if args.save_steps != usual:
        raise UsageError(
            f"save_steps={options.save_steps!r} and save_steps={args.save_steps:g} of the Trainer's arguments both say"
            " how often to save",
            hint="remove one of the two",
        )
    if args.load_best_model_at_end:
        raise UsageError(
            "load_best_model_at_end wants a checkpoint at every evaluation, save_steps='auto' chooses steps of its own",
            hint="save_strategy='best' or 'epoch' saves what is evaluated, and save_steps='auto' in between",
        )
