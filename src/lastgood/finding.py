"""The checkpoint to resume from or to load, verified; and what becomes of the damaged ones on the way. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lastgood.errors import NoCheckpoint
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.recovery import LOST_HEAD, UNADOPTED, Found, first_good, in_order
from lastgood.repo import verify
from lastgood.repo.held import Held
from lastgood.repo.run import lost_head

Check = Literal["full", "quick"]
"""How a checkpoint is verified: every byte hashed, or sizes and headers compared."""


def find(
    root: Path,
    everything: Sequence[Record],
    what: Literal["last", "best"] | int,
    *,
    keep: Keep,
    check: Check = "full",
    full: bool = True,
    held: Held | None = None,
) -> Found:
    """The one to resume from (full) or to load (the weights are enough), out of all that are there.

    "last" and "best" fall back to the next one when one fails verification; a step does not. keep: says by which
    metric one is the best. held: see `verify.problems`.
    Raises NoCheckpoint, with a line for each that was passed over, when none is left.
    """
    monitor, mode = keep.primary
    if not isinstance(what, int) and (lost := lost_head(root)):
        raise NoCheckpoint(lost, hint=LOST_HEAD)
    skipped = [(r.name, r.problem or r.state) for r in everything if r.state in ("incomplete", "foreign")]
    damaged = [r.name for r in everything if r.state == "incomplete"]
    choice = first_good(
        in_order(everything, what, monitor=monitor, mode=mode),
        lambda record: verify.problems(root, record, full=check == "full", sure=True, held=held),
        weights="holds the weights alone" if full else "",
        fall_back=not isinstance(what, int),
    )
    skipped += choice.skipped
    if choice.record is not None:
        record = choice.record
        if what == "last":
            skipped += [(r.name, UNADOPTED) for r in everything if r.state == "stock" and r.step > record.step]
        return Found(record, tuple(skipped), (*damaged, *choice.damaged))
    if isinstance(what, int):
        aside = [r.name for r in everything if r.step == what and r.ours and not r.current and r.state == "full"]
        skipped += [(name, f"another branch left {name}: its path resumes from it") for name in aside]
        skipped += [(r.name, UNADOPTED) for r in everything if r.state == "stock" and r.step == what]
    listing = "".join(f"\n  {name}: {reason}" for name, reason in skipped)
    raise NoCheckpoint(
        f"{root} has no good checkpoint for {what!r}{listing}",
        hint="resume_from_checkpoint='auto' takes the newest good one, False starts afresh"
        + ("; a poisoned one is taken if its step or path is named" if any(r.poisoned for r in everything) else ""),
    )
