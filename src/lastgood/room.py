"""What a save takes, and what may go for it before it is there. Pure: no disk, no clock.

Nothing goes that the policy wouldn't let go behind this very save: with `Keep(last=2)` the older of two may go first,
the newer one never does, because until the save is there it is all that a recovery has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from lastgood.model import Manifest, Record
from lastgood.policy import Decision, Keep, decide
from lastgood.ranking import ranking

BLOCK = 4096
"""Bytes that the smallest file takes on common file systems."""
UNCOUNTED = 1 << 62
"""Files that can be made where the file system doesn't count them."""


class Amount(msgspec.Struct, frozen=True):
    """Bytes, and files or directories (inodes): what is free, what something takes or frees."""

    bytes: int = 0
    files: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.bytes + other.bytes, self.files + other.files)

    def covers(self, other: Amount) -> bool:
        """Whether there is as much of both."""
        return self.bytes >= other.bytes and self.files >= other.files

    def beyond(self, other: Amount) -> Amount:
        """What of this `other` doesn't cover."""
        return Amount(max(0, self.bytes - other.bytes), max(0, self.files - other.files))


SPARE = Amount(16 << 20, 65)
"""Left free by a save (16 MiB, 65 files), so that journal, metrics and whatever else a run writes still fit."""


def taken(manifest: Manifest) -> Amount:
    """What a checkpoint takes on disk, itself and its manifest, in whole blocks."""
    sizes = [entry.size for entry in manifest.files.values()]
    folders = {name.rpartition("/")[0] for name in manifest.files} | {""}
    # An entry of a manifest has some 200 bytes: path, size and hash.
    inside = sum(-(-size // BLOCK) * BLOCK for size in [*sizes, BLOCK + 200 * len(sizes)])
    return Amount(inside + BLOCK * len(folders), len(sizes) + 1 + len(folders))


def needed(estimate: int, last: Amount, *, own: bool) -> Amount:
    """What the next save takes, at least what the last one took: an estimate doesn't know of everything.

    estimate: bytes of its tensors. own: the last save was of this process. That of an earlier one counts where it isn't
    of another kind (weights alone, say), whose tensors take much less: they are counted exactly.
    """
    if not own and estimate * 2 < last.bytes:
        last = Amount()
    return Amount(max(estimate, last.bytes), last.files)


def in_advance(
    found: Sequence[Record],
    keep: Keep,
    coming: Record,
    proven: Record,
    *,
    short: Amount,
    gain: Callable[[Decision], Amount],
    protect: Collection[str] = (),
) -> tuple[Decision, ...]:
    """Of what the policy lets go behind the save `coming` as much as makes up for `short`; () if all isn't enough.

    First the parts that only a resume needs, then whole checkpoints, the oldest first. proven: the newest one that was
    verified just now; it stays as it is, and so do whatever is newer and the best. gain: what a decision frees.
    """
    decisions = decide([*found, coming], keep, protect=protect)
    winners = {record.name for name, mode in keep.monitors for record in ranking(found, name, mode)[:1]}
    queue = [d for d in decisions if d.action != "keep" and d.record.good and d.record.seq < proven.seq]
    queue = [d for d in queue if d.record.name not in winners]  # not even to its weights, as long as it isn't proven
    queue.sort(key=lambda d: (d.action != "strip", d.record.seq))
    freed, todo = Amount(), []
    for decision in queue:
        if freed.covers(short):
            break
        todo.append(Decision(decision.record, decision.action, (*decision.reasons, "now: the next save needs room")))
        freed += gain(decision)
    return tuple(todo) if freed.covers(short) else ()
