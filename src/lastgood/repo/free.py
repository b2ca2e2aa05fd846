"""Room for a save: what is free, what is freed for it in which order, and the wait for somebody else to free it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lastgood.model import Record, stripped
from lastgood.policy import Decision, Keep
from lastgood.repo import bin, gc, leases, reserve, verify
from lastgood.repo.protect import protected
from lastgood.repo.read import records
from lastgood.room import UNCOUNTED, Amount, in_advance
from lastgood.store import quota
from lastgood.talk import say, warn

FIRST, LONGEST = 1.0, 30.0
"""Seconds between two looks at a full disk while a save waits for room: from the first, twice as long each time."""
SLICE = 0.1
"""Seconds after which a wait looks whether it is to end."""
AGAIN = 600.0
"""Seconds (10 min) after which it is said again what is being waited for."""


def free(root: Path) -> Amount:
    """What this user can still write there, by the disk and by the quota; the reserve is part of what is left free."""
    room, files = quota.left(root)
    return Amount(room + reserve.held(root), UNCOUNTED if files < 0 else files)


def make_room(
    root: Path, need: Amount, coming: Record, keep: Keep, run: str, sightings: leases.Sightings | None = None
) -> Amount:
    """Free what may go until `need` fits, and return what is free then.

    In this order: leftovers of interrupted saves and deletions; what `undo` could bring back; and what the policy lets
    go behind the save `coming`, but only after a newer checkpoint was hashed. If all of it isn't enough, nothing but
    the leftovers goes: the save fails just the same. The caller holds the run's lock. Raises OSError.
    """
    gc.sweep(root, sightings)
    space, trash = free(root), Amount(bin.size(root), bin.files(root))
    if space.covers(need):
        return space
    todo: tuple[Decision, ...] = ()
    if not (space + trash).covers(need):
        todo = _by_policy(root, need.beyond(space + trash), coming, keep, run, sightings)
        if not todo:
            return space
    if bin.empty(root):
        say("the space of what `lastgood prune` had removed was needed: it can't be undone any more")
    if todo:
        gc.execute(root, gc.plan([d.record for d in todo], todo), sightings=sightings)
        names = ", ".join(f"{d.record.name}{' (to its weights)' if d.action == 'strip' else ''}" for d in todo)
        say(f"freed for the checkpoint of step {coming.step}, before it instead of after: {names}")
    return free(root)


def _by_policy(
    root: Path, short: Amount, coming: Record, keep: Keep, run: str, sightings: leases.Sightings | None
) -> tuple[Decision, ...]:
    found = list(records(root))
    protect = protected(root, found, run, sightings)
    # Asked before anything is hashed: that takes minutes for a large one, mostly in vain.
    while (whole := _newest(found)) is not None and (
        todo := in_advance(found, keep, coming, whole, short=short, gain=_gain, protect=protect)
    ):
        faults = verify.problems(root, whole, full=True)
        if not faults:
            return todo
        warn(f"{whole.name} is damaged ({faults[0]}): it doesn't count as the last good one")
        damaged = msgspec.structs.replace(whole, state="incomplete", problem=faults[0])
        found[found.index(whole)] = damaged
    return ()


def _newest(found: list[Record]) -> Record | None:
    """What a recovery would take; in a run that saves weights alone, the newest of them."""
    good = [record for record in found if record.good]
    whole = [record for record in good if record.state == "full"] or good
    return max(whole, key=lambda record: record.seq, default=None)


def _gain(decision: Decision) -> Amount:
    manifest = decision.record.manifest
    if manifest is None:
        return Amount()
    stay = () if decision.action == "delete" else stripped(manifest).files
    return Amount(gc.gain(decision), len(manifest.files) - len(stay))


@dataclass(slots=True)
class Patience:
    """The wait of one save for room. over: whether it is to end, asked all the time."""

    over: Callable[[], object]
    pause: float = FIRST
    said: float | None = None

    def wait(self, root: Path, need: Amount, what: str) -> bool:
        """Until `need` is free, at least for one pause; False if it was ended before. what: is said now and then."""
        while True:
            now = time.monotonic()
            if self.said is None or now - self.said >= AGAIN:
                self.said = now
                warn(what)
            until = now + self.pause
            self.pause = min(2 * self.pause, LONGEST)
            while (left := until - time.monotonic()) > 0:
                if self.over():
                    return False
                time.sleep(min(SLICE, left))
            with suppress(OSError):  # a disk that can't be asked may come back, too
                if free(root).covers(need):
                    return not self.over()
