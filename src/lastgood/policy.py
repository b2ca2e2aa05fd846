"""What is kept, and why: records in, one decision with its reasons per checkpoint out.

Pure: no clock, no disk, no torch. The live manager, every dry run and any simulation call
`decide`, so they can't disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec

from lastgood.errors import UsageError, wrong_type
from lastgood.formula import parse
from lastgood.model import Record
from lastgood.ranking import Mode, known_mode, metric_of, ranking

Monitors = tuple[tuple[str, Mode], ...]
"""Metrics with their directions, the first one first."""


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """Which checkpoints stay: one that any rule wants is kept; Keep() keeps all.

    total: that many, the newest and the best others by `monitor` (without a monitor the newest ones): the meaning
        of save_total_limit. last: the newest. best: the best by `monitor`. every: those at multiples of this many
    steps. within: those saved at most this many seconds before the newest. full: of those that stay, how many of the
    newest keep everything a resume needs, the others keep their weights; None: all.

    monitor: a metric, or a formula of metrics ("0.5*mmlu + 0.5*gsm8k"), and whether the "min" or the "max" is best;
    or several, with as many modes: the best by each stay. The first is what "best" alone means, and goes by in total.
    """

    total: int | None = None
    last: int | None = None
    best: int | None = None
    every: int | None = None
    within: float | None = None
    full: int | None = None
    monitor: str | tuple[str, ...] | None = None
    mode: Mode | tuple[Mode | None, ...] | None = None

    def __post_init__(self) -> None:
        for option in ("total", "last", "best", "every", "full"):
            value = getattr(self, option)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise wrong_type(f"Keep({option})", value, "a whole number of at least 1, or None")
        if self.within is not None and not (_is_number(self.within) and 0 < self.within < math.inf):
            raise wrong_type("Keep(within)", self.within, "a number of seconds above 0, or None")
        if self.total is not None and (self.last is not None or self.best is not None):
            raise UsageError("Keep(total) already says how many newest and best ones stay; leave out last and best")
        names, modes = _listed(self.monitor), _listed(self.mode)
        if not all(isinstance(name, str) and name for name in names) or (self.monitor is not None and not names):
            raise wrong_type("Keep(monitor)", self.monitor, "the name of a metric, or several")
        if len(set(names)) < len(names):
            raise UsageError("Keep(monitor) names a metric twice")
        if self.best is not None and not names:
            raise UsageError("Keep(best) needs monitor: best by which metric?", hint="monitor='eval_loss'")
        if not all(mode in (None, "min", "max") for mode in modes):
            raise wrong_type("Keep(mode)", self.mode, "'min' or 'max'")
        if names and modes and len(modes) != len(names):
            raise UsageError(
                f"Keep(monitor) names {len(names)} metrics and mode {len(modes)} directions: give one for each",
                hint="monitor=('eval_loss', 'mmlu'), mode=('min', 'max')",
            )
        if names:
            found = tuple(map(_direction, names, modes or (None,) * len(names)))
            one = len(names) == 1
            msgspec.structs.force_setattr(self, "monitor", names[0] if one else names)
            msgspec.structs.force_setattr(self, "mode", found[0] if one else found)

    @property
    def monitors(self) -> Monitors:
        """The metrics with their directions; () if there are none."""
        return tuple(zip(_listed(self.monitor), _listed(self.mode), strict=False))

    @property
    def primary(self) -> tuple[str, Mode] | tuple[None, None]:
        """What "best" means: the first metric, and its direction."""
        return next(iter(self.monitors), (None, None))

    @classmethod
    def from_limit(cls, limit: int | None, monitor: str | None, mode: Mode | None) -> Keep:
        """save_total_limit and metric_for_best_model as a policy; no limit or one below 1 keeps everything."""
        return cls(total=limit if limit is not None and limit > 0 else None, monitor=monitor, mode=mode)

    def options(self) -> dict[str, object]:
        """The options that are set, as keyword arguments."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}

    def describe(self) -> str:
        """One line for people: keep the last 2, the best 3 by eval_loss, full state for the newest 1."""
        names = [name for name, _ in self.monitors]
        rules = {
            "total": f"{self.total} in all (the newest" + (f", the best others by {names[0]})" if names else ")"),
            "last": f"the last {self.last}",
            "best": f"the best {self.best} by {' and by '.join(names)}",
            "every": f"every {self.every} steps",
            "within": f"all within {self.within:g} s of the newest" if self.within else "",
            "full": f"full state for the newest {self.full}",
        }
        said = [text for option, text in rules.items() if getattr(self, option) is not None]
        return f"keep {', '.join(said)}" if said else "keep everything"

    @property
    def unlimited(self) -> bool:
        """No rule that would let anything go."""
        rules = (self.total, self.last, self.best, self.every, self.within)
        return all(rule is None for rule in rules)


class Decision(msgspec.Struct, frozen=True):
    """What becomes of one checkpoint, with at least one reason in plain English."""

    record: Record
    action: Literal["keep", "strip", "delete"]
    reasons: tuple[str, ...]


def _listed(value: Any) -> tuple[Any, ...]:
    """One or several values of an option; a list comes from JSON."""
    return () if value is None else tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _direction(name: str, mode: Mode | None) -> Mode:
    """Raises UsageError where the name doesn't tell it, and for a formula with a slip."""
    parse(name)
    found = mode or known_mode(name)
    if found is None:
        raise UsageError(f"is a lower or a higher {name} better?", hint="give mode='min' or mode='max'", code="CKB005")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def latest(records: Sequence[Record]) -> Record | None:
    """The newest full checkpoint of the current branch that isn't poisoned: what a recovery uses."""
    full = [record for record in records if record.state == "full" and record.good]
    return max(full, key=lambda record: record.seq, default=None)


def all_stay(records: Sequence[Record], keep: Keep) -> bool:
    """Whether `decide` surely keeps every one of them as it is; False where that isn't plain at a glance.

    Only for records of which none is poisoned.
    Cheap: the decisions over a run that keeps a thousand checkpoints would take the square of that.
    """
    count = len(records)
    if keep.full is not None and keep.full < count:
        return False
    if keep.unlimited or (keep.last or 0) >= count or (keep.total or 0) >= count:
        return True
    every = keep.every
    return every is not None and all(record.step % every == 0 for record in records)


def settled(record: Record, keep: Keep) -> bool:
    """Whether one that isn't among the newest stays as it is, whatever comes, and has no say in what becomes of others.

    Where checkpoints are ranked every one of them counts, unless no rule deletes any.
    """
    if record.poisoned:
        return keep.unlimited
    if keep.full is not None and record.state == "full":
        return False
    ranked = keep.monitor is not None or keep.total is not None
    return keep.unlimited or (keep.every is not None and record.step % keep.every == 0 and not ranked)


def at_step(records: Sequence[Record], step: int) -> tuple[Record, ...]:
    """What "the checkpoint of this step" means: the newest on the current branch, else those of branches left."""
    here = sorted((r for r in records if r.ours and r.step == step), key=lambda r: -r.seq)
    return tuple([r for r in here if r.current] or here)


def decide(records: Sequence[Record], keep: Keep, *, protect: Collection[str] = ()) -> tuple[Decision, ...]:
    """One decision per record, in the order given. `protect`: ids that stay as they are (a mapping gives reasons)."""
    mine = sorted([r for r in records if r.good], key=lambda r: -r.seq)
    ranked = {name: ranking(mine, name, mode) for name, mode in keep.monitors}
    wanted = _wanted(mine, ranked, keep)
    newest_full = latest(mine)
    # Counted among those that stay: one that is about to be deleted would use up a place, and the run would be
    # left with fewer recovery points than were asked for.
    stay = [r for r in mine if r.state == "full" and (r.name in wanted or _held(r, protect))]
    places = {record.name: place for place, record in enumerate(mine, 1)}
    ranks = {name: {record.name: rank for rank, record in enumerate(order, 1)} for name, order in ranked.items()}
    stays_full = {record.name for record in stay[: keep.full]}
    decisions = []
    successor = newest_full or next(iter(mine), None)
    last_sick = max((r.seq for r in records if r.poisoned and r.ours and r.current), default=0)
    for record in records:
        if record.poisoned and record.ours:
            decisions.append(_poisoned(record, keep, _held(record, protect), successor, last_sick))
            continue
        if not record.ours or not record.current:
            decisions.append(Decision(record, "keep", (_not_ours(record),)))
            continue
        held = _held(record, protect)
        reasons = held + wanted.get(record.name, ())
        if not reasons:
            decisions.append(Decision(record, "delete", (_why_not(record, places, ranks),)))
        elif keep.full is None or record.state != "full" or record.name in stays_full or held or record is newest_full:
            decisions.append(Decision(record, "keep", reasons))
        else:
            why = f"weights only: full state is kept for the newest {keep.full}"
            decisions.append(Decision(record, "strip", (*reasons, why)))
    return tuple(decisions)


def enough(
    decisions: Sequence[Decision], wanted: int, gain: Callable[[Decision], int], *, protect: Collection[str] = ()
) -> tuple[Decision, ...]:
    """Of these decisions as many as free `wanted` bytes: deletions before strips, branches left and old ones first.

    gain: bytes that a decision frees. Strips that the policy didn't ask for are added if deletions don't suffice,
    never of the newest full checkpoint or of one that is held.
    """
    newest = latest([d.record for d in decisions])
    queue = [d for d in decisions if d.action == "delete"] + [d for d in decisions if d.action == "strip"]
    for decision in decisions:
        record = decision.record
        free_to_go = decision.action == "keep" and record.state == "full" and record.current and not record.pinned
        if free_to_go and record is not newest and record.id not in protect:
            queue.append(Decision(record, "strip", (*decision.reasons, "weights only: the space is needed")))
    order = {"delete": 0, "strip": 1}
    queue.sort(key=lambda d: (order[d.action], d.record.current, d.record.seq))
    freed, todo = 0, {}
    for decision in queue:
        if freed >= wanted:
            break
        todo[decision.record.name] = decision
        freed += gain(decision)
    spared = "not needed: enough is freed without it"
    return tuple(
        todo.get(d.record.name) or (d if d.action == "keep" else Decision(d.record, "keep", (spared,)))
        for d in decisions
    )


def _wanted(mine: Sequence[Record], ranked: Mapping[str, Sequence[Record]], keep: Keep) -> dict[str, tuple[str, ...]]:
    """name -> reasons of the rules that want it. `mine` newest first, `ranked` best first, by each metric."""
    reasons: dict[str, list[str]] = {}

    def want(record: Record, reason: str) -> None:
        reasons.setdefault(record.name, []).append(reason)

    recovery = latest(mine)
    if recovery is not None:
        want(recovery, "latest: what a recovery resumes from")
    for name, order in ranked.items():
        for winner in order[:1]:
            want(winner, f"best: {name} = {metric_of(winner, name):.6g}")
    if keep.unlimited:
        for record in mine:
            want(record, "no limit is set")
    for place, record in enumerate(mine[: keep.last or 0], 1):
        want(record, f"last {place}/{keep.last}")
    for name, order in ranked.items():
        for place, record in enumerate(order[: keep.best or 0], 1):
            want(record, f"best {place}/{keep.best} by {name}")
    if keep.every is not None:
        for record in mine:
            if record.step % keep.every == 0:
                want(record, f"every {keep.every} steps")
    if keep.within is not None:
        newest = max((record.manifest.created for record in mine if record.manifest is not None), default=0.0)
        for record in mine:
            created = record.manifest.created if record.manifest is not None else 0.0
            if newest - created <= keep.within:
                want(record, f"saved within {keep.within:g} s of the newest")
    if keep.total is not None and mine:
        first, _ = keep.primary
        others = [record for record in ranked.get(first or "", ()) if record is not mine[0]]
        there = {record.name for record in others}
        others += [record for record in mine[1:] if record.name not in there]
        for place, record in enumerate([mine[0], *others][: keep.total], 1):
            value = None if first is None else metric_of(record, first)
            kind = "newest" if place == 1 else "best others" if ranked.get(first or "") else "newest ones"
            score = "" if value is None or place == 1 else f", {first} = {value:.6g}"
            want(
                record,
                f"{place} of {keep.total} in all ({kind}{score})",
            )
    return {name: tuple(texts) for name, texts in reasons.items()}


def _poisoned(record: Record, keep: Keep, held: tuple[str, ...], successor: Record | None, last_sick: int) -> Decision:
    """It takes no place among those that are kept, and goes as soon as a good one is there that is newer.

    Until then the newest of them stays for a look: a run that has diverged must not fill the disk with its wreckage.
    """
    why = f"poisoned: {record.poisoned}"
    if held:
        return Decision(record, "keep", (*held, why))
    if keep.unlimited:
        return Decision(record, "keep", (why, "no limit is set"))
    if successor is not None and successor.seq > record.seq:
        return Decision(record, "delete", (why, f"{successor.name} is newer and healthy"))
    if record.current and record.seq < last_sick:
        return Decision(record, "delete", (why, "a newer one of these is there for a look"))
    return Decision(record, "keep", (why, "no newer one is healthy yet"))


def _held(record: Record, protect: Collection[str]) -> tuple[str, ...]:
    if not record.pinned and not protect:
        return ()
    reasons = [f"pinned: {name}" for name in record.pinned]
    if record.id in protect:
        reasons.append(str(protect[record.id]) if isinstance(protect, Mapping) else "in use")
    return tuple(reasons)


def _not_ours(record: Record) -> str:
    if record.ours:
        return "on a branch that was left; never deleted by itself"
    return {
        "foreign": "belongs to another run; never touched",
        "stock": "written without lastgood; never touched",
    }.get(record.state, f"incomplete ({record.problem}); never touched")


def _why_not(record: Record, places: Mapping[str, int], ranks: Mapping[str, Mapping[str, int]]) -> str:
    text = f"{_ordinal(places[record.name])} newest of {len(places)}"
    for name, order in ranks.items():
        value = metric_of(record, name)
        if value is None:
            text += f", without a finite {name}"
        else:
            text += f", {name} {value:.6g} is {_ordinal(order[record.name])} of {len(order)}"
    return f"no rule keeps it: {text}"


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


OPTIONS = Keep.__struct_fields__
"""Names of the options of Keep."""
