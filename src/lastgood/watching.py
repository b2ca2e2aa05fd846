"""`lastgood.watch(path)`: follow a run from another process, and hold each checkpoint while it is evaluated."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from lastgood.checkpoint import Checkpoint
from lastgood.errors import NotEnoughSpace, UsageError, wrong_type
from lastgood.model import Record
from lastgood.ranking import also_called, needs
from lastgood.repo import journal, leases
from lastgood.repo.lock import RunLock
from lastgood.repo.read import records
from lastgood.repo.staging import explained

Wanted = Callable[[Record], bool]

LIVES = ("started", "resumed", "continued")
"""Events of a process that begins to train."""
ENDS = ("finished", "closed")
"""Events after which nothing more comes."""
STOPS = ("interrupted", "preempted")
"""Events after which the run is expected back, as after a kill, which leaves none."""


def watch(
    path: str | os.PathLike[str],
    *,
    every: int | None = None,
    missing: str | None = None,
    latest: bool = False,
    state: Literal["full", "weights"] = "weights",
    poll: float = 5.0,
    timeout: float | None = None,
    lease: float = 600.0,
) -> Iterator[Checkpoint]:
    """Each checkpoint of the branch that the run is on, once, in the order of its saves; also those already there.

    While the loop's body runs, neither retention nor `prune` touches its checkpoint. The iteration ends when the run
    has ended and all were seen; it may begin before the directory exists.

    every: only those at multiples of this many steps. missing: only those without a value of this metric, so that a
    watcher that is started again goes on where it was. latest: where several are waiting, only the newest. state:
    "full" passes over those that hold the weights alone. poll: seconds between looks. timeout: end after so many
    seconds without a new one, whatever the run does; None never does. lease: after so many seconds a checkpoint is let
    go of if this process was killed; while it lives, it is held as long as the body takes. Raises UsageError at once.
    """
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise wrong_type("watch(every)", every, "a whole number of at least 1, or None")
    if state not in ("full", "weights"):
        raise wrong_type("watch(state)", state, "'full' or 'weights'")
    for option, value in (("poll", poll), ("timeout", timeout)):
        if value is None and option == "timeout":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise wrong_type(f"watch({option})", value, "a number of seconds")
    leases.check(lease)
    if missing is not None and (not isinstance(missing, str) or not missing):
        raise wrong_type("watch(missing)", missing, "the name of a metric")
    if missing is not None and needs(missing) != (missing,):
        raise UsageError(f"watch(missing={missing!r}): a formula isn't recorded", hint="name the metric itself")

    def wanted(record: Record) -> bool:
        there = missing is not None and any(name in record.metrics for name in also_called(missing))
        fits = every is None or record.step % every == 0
        return record.ours and record.current and fits and not there and state in (record.state, "weights")

    return _watch(Path(path), wanted, latest=latest, poll=poll, timeout=timeout, lease=lease)


def _watch(
    root: Path, wanted: Wanted, *, latest: bool, poll: float, timeout: float | None, lease: float
) -> Iterator[Checkpoint]:
    seen: set[str] = set()
    since = time.monotonic()
    while True:
        # In this order: what is saved in between is found, for the run had not ended before.
        ended = has_ended(root)
        new = sorted((r for r in records(root) if r.id not in seen and wanted(r)), key=lambda r: r.seq)
        if latest:
            seen.update(record.id for record in new[:-1])
            new = new[-1:]
        held = None
        if new:
            try:
                with explained(root):
                    held = leases.take(root, new[0].id, new[0].name, lease)
            except NotEnoughSpace:  # until retention has made room
                time.sleep(poll)
                continue
            seen.add(new[0].id)
        if held is not None:
            try:
                yield Checkpoint(root, new[0])
            finally:
                held.drop()
            since = time.monotonic()
        elif not new and (ended or (timeout is not None and time.monotonic() - since >= timeout)):
            return
        elif not new:
            time.sleep(poll)


def has_ended(root: Path) -> bool:
    """Whether the last process that trained said that it was done, and nobody holds the run."""
    if RunLock(root).held_by_another():
        return False
    last = next((e["event"] for e in reversed(journal.read(root)) if e.get("event") in (*LIVES, *ENDS, *STOPS)), None)
    return last in ENDS
