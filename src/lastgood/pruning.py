"""What `prune` would remove, and why: the policy's decisions, narrowed to what was asked for. Deletes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lastgood import policy
from lastgood.errors import NotEnoughSpace, Refused, UsageError
from lastgood.formula import parse
from lastgood.layouts.found import modified
from lastgood.model import TRAINERS, Record
from lastgood.policy import Decision, Keep
from lastgood.ranking import also_called, needs
from lastgood.repo import gc
from lastgood.repo.free import free
from lastgood.repo.read import records
from lastgood.room import SPARE, Amount
from lastgood.store import local
from lastgood.units import size
from lastgood.view import View

LATELY = 120.0
"""Seconds for which a half-written checkpoint counts as one that is being written."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What the plan may range over besides this run's own checkpoints."""

    stock: bool = False
    abandoned: bool = False
    incomplete: bool = False


def plan(view: View, rules: dict[str, Any], *, to_free: int | None = None, scope: Scope = Scope()) -> list[Decision]:
    """One decision per checkpoint: the policy's, then narrowed to what was asked for. Pure but for the view's reads."""
    keep = _keep(view, rules, to_free)
    native = {record.name: record for record in view.native}
    found = [
        record if record.id or (scope.stock and record.layout in TRAINERS) else native.get(record.name, record)
        for record in view.records
    ]
    found = [msgspec.structs.replace(r, state="stock") if _aside(r, scope) else r for r in found]
    if not any(record.id for record in found):
        found = [msgspec.structs.replace(r, current=True) if r.ours else r for r in found]
    protect = view.protect
    decisions = [_whole(decision) for decision in policy.decide(found, keep, protect=protect)]
    if scope.abandoned:
        decisions = [d if d.record.id in protect else _abandoned(d) for d in decisions]
    if to_free is None:
        return decisions
    enough = policy.enough(decisions, to_free, lambda decision: gc.gain(_whole(decision)), protect=protect)
    enough = tuple(_whole(decision) for decision in enough)
    freed = sum(gc.gain(decision) for decision in enough)
    if freed < to_free:
        raise NotEnoughSpace(
            f"only {size(freed)} of the wanted {size(to_free)} can be freed: the rest is the last good"
            " checkpoint, the best, or held",
            hint="fewer rules, `lastgood unpin`, --stock, --abandoned; `lastgood df` shows what takes the space",
        )
    return list(enough)


def _keep(view: View, rules: dict[str, Any], to_free: int | None) -> Keep:
    chosen = {name: value for name, value in rules.items() if value is not None}
    limits = chosen.keys() - {"monitor", "mode"}
    if not limits and to_free is None:
        if view.keep is None or view.keep.options().keys() <= {"monitor", "mode"}:
            raise UsageError(
                "what is to be kept? The run has no policy of its own that lets anything go",
                hint="lastgood prune --keep-last 2 --keep-best 3 --dry-run",
            )
        # As it is, without a metric that the run itself doesn't go by: what the live run would do, and its reasons.
        own = view.keep.options()
        if "monitor" in chosen:
            own.pop("mode", None)  # the direction of another metric
        return Keep(**{**own, **chosen})
    if not limits and to_free is not None:
        chosen = {"last": 1, **chosen}
    if "monitor" not in chosen and view.monitor is not None:
        chosen = {**view.metric, **chosen}
    return Keep(**chosen)


def _whole(decision: Decision) -> Decision:
    """A stock checkpoint without its optimizer would be resumed from with a fresh one, silently: all or nothing."""
    if decision.action == "strip" and not decision.record.id:
        return Decision(decision.record, "keep", (*decision.reasons, "whole, because it isn't adopted"))
    return decision


def _abandoned(decision: Decision) -> Decision:
    record = decision.record
    if record.ours and record.id and not record.current and not record.pinned:
        return Decision(record, "delete", ("on a branch that was left",))
    return decision


def proven(
    view: View, rules: dict[str, Any], decisions: list[Decision], damaged: Callable[[str, str], None], **how: Any
) -> tuple[View, list[Decision]]:
    """Deleting the others makes the newest the last good one: it is hashed first, and passed over if damaged."""
    weights_alone = all(record.state not in ("full", "incomplete") for record in view.records)
    while True:
        newest = policy.latest([d.record for d in decisions])
        if weights_alone:  # save_only_model: the newest is all there is to go on from
            own = [d.record for d in decisions if d.record.good]
            newest = max(own, key=lambda record: record.seq, default=None)
        if newest is None:
            raise Refused("no full checkpoint is good: nothing is deleted", hint="`lastgood verify --full` says why")
        faults = view.problems(newest, full=True)
        if not faults:
            return view, decisions
        damaged(newest.name, faults[0])
        swap = msgspec.structs.replace(newest, state="incomplete", problem=faults[0])
        view = _with(view, newest.name, swap)
        decisions = plan(view, rules, **how)


def _with(view: View, name: str, record: Record) -> View:
    """The view with another record in the place of `name`."""

    def swapped(found: Sequence[Record]) -> tuple[Record, ...]:
        return tuple(record if r.name == name else r for r in found)

    return msgspec.structs.replace(view, native=swapped(view.native), records=swapped(view.records))


def last_good(view: View, *, full: bool) -> Record | None:
    """The newest full checkpoint that passes verification: what a recovery would really use."""
    own = sorted((r for r in view.records if r.good and r.state == "full"), key=lambda r: -r.seq)
    return next((record for record in own if not view.problems(record, full=full)), None)


def changed(view: View) -> list[str]:
    """Names of the checkpoints whose pins, tags, metrics or marks aren't those of the view any more."""
    now = {r.name: (r.id, r.pinned, r.metrics, r.poisoned) for r in records(view.root)}
    return [r.name for r in view.native if now.get(r.name) != (r.id, r.pinned, r.metrics, r.poisoned)]


def ranks(view: View, monitor: str) -> None:
    """Raises UsageError for a metric that no checkpoint has, while others are recorded: the best would go unseen.

    Of a formula each of its metrics counts.
    """
    own = [record for record in view.records if record.ours]
    known = sorted({name for record in own for name in record.metrics})
    parse(monitor)  # a slip in a formula is named as such
    for name in () if monitor in known else needs(monitor):
        if known and not set(also_called(name)) & set(known):
            raise UsageError(
                f"no checkpoint has a {name}: none would be kept as the best",
                hint=f"recorded metrics: {', '.join(known)}",
            )


def short_of_room(view: View) -> bool:
    """Whether the disk, as it is, has no room for one more save like the newest."""
    newest = policy.latest(view.records)
    return not free(view.root).covers(Amount(0 if newest is None else newest.size) + SPARE)


def occupied(path: Path) -> int:
    """Bytes of the files in a directory whose manifest doesn't say, or can't be read."""
    return sum(local.size(Path(at) / name) or 0 for at, _, names in os.walk(path) for name in names)


def _aside(record: Record, scope: Scope) -> bool:
    """Whether it was written without lastgood, and isn't asked for: --stock means the Trainer's, nobody else's."""
    return record.ours and not record.id and not (scope.stock and record.layout in TRAINERS)


def husks(view: View, stock: bool) -> list[Record]:
    """Incomplete directories that are provably this run's, or any of a stock run if --stock says so.

    But not the furthest one as long as a Trainer, which holds no lock, may be writing it.
    """
    run = view.run
    furthest = max((record.step for record in view.records), default=-1)
    return [
        r
        for r in view.records
        if r.state == "incomplete"
        and not r.pinned
        and (
            (r.manifest is not None and r.manifest.run == run and run)
            or (stock and r.layout in TRAINERS and (r.step < furthest or not in_flux(view.path(r))))
        )
    ]


def in_flux(path: Path) -> bool:
    """Whether something in a directory was written lately."""
    return last_write(path) > time.time() - LATELY


def last_write(path: Path) -> float:
    """Seconds since 1970 of the last write to a file, or to anything in a directory."""
    return max(modified(path), *(modified(Path(at) / name) for at, _, names in os.walk(path) for name in names), 0.0)
