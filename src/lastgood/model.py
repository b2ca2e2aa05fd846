"""The frozen records that all layers speak in. No disk, no clock, no torch.

A *checkpoint* is one committed snapshot at a global step. Its *manifest* is the
commit record inside it. A *record* is what a scan of a run directory knows of one
checkpoint: the manifest, its metrics and where it stands in the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

FORMAT = 2
"""Version of the on-disk format that this package writes (FORMAT.md)."""

State = Literal["full", "weights", "incomplete", "stock", "foreign"]
"""What a directory named like a checkpoint is.

full        ours, complete, everything that a resume needs
weights     ours, complete, the model alone
incomplete  carries our manifest (or is unreadable) but a file is missing or has another size
stock       no manifest: written by a Trainer that lastgood didn't manage
foreign     a manifest of another run, or of a newer format
"""

Span = tuple[int, int]
"""First and last sequence number (both included) of a stretch of saves on one branch."""


TRAINERS = ("trainer", "fsdp", "deepspeed")
"""Layouts of a stock Trainer: one directory per step, so they may be adopted, or deleted unadopted if that is asked."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=False, omit_defaults=True):
    """Size in bytes of one file of a checkpoint, and its hash by one of two algorithms; by neither where none is known.

    xxh3: XXH3-128 (32 hex digits, the most significant first). blake3: 64 hex digits, in checkpoints of format 1.
    """

    size: int
    xxh3: str = ""
    blake3: str = ""

    @property
    def hash(self) -> str:
        return self.xxh3 or self.blake3

    @property
    def kind(self) -> Literal["xxh3", "blake3"]:
        """What to hash the file by, to compare it with this."""
        return "blake3" if self.blake3 else "xxh3"


KEPT_PARTS = ("model", "progress", "arguments")
"""Parts of an adopted checkpoint that stay when it is stripped: weights, and the run's log for plots."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The commit record `lastgood.json`: a checkpoint exists iff it parses and its files have these sizes."""

    format: int
    id: str  # 16 hex digits, unique
    run: str  # 16 hex digits, the run that wrote it and alone may delete it
    step: int  # global (optimizer) step
    seq: int  # 1, 2, 3, ... over all saves of the run, whatever the branch: this is the order, never the clock
    lineage: tuple[Span, ...]  # the sequence numbers on the way to here, this one included
    parent: str | None = None  # id of the checkpoint that this state continued from
    created: float = 0.0  # seconds since 1970, for display only
    parts: dict[str, tuple[str, ...]] = {}  # part -> its files
    files: dict[str, FileEntry] = {}  # relative POSIX path -> size and hash; everything but the manifest itself
    environment: dict[str, str] = {}  # library -> version
    arguments: dict[str, object] = {}  # training arguments, secrets masked
    facts: dict[str, object] = {}  # what a later resume compares itself with: data, adapter, world size
    layout: str = ""  # whose files these are: "" ours, else the tool that wrote an adopted checkpoint ("trainer")

    @property
    def full(self) -> bool:
        """Whether a resume finds everything in it."""
        return "progress" in self.parts

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(entry.size for entry in self.files.values())


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One directory of a run, as a scan sees it."""

    name: str  # directory name inside the run: checkpoint-500
    step: int
    state: State
    manifest: Manifest | None = None
    metrics: Mapping[str, float] = {}
    current: bool = True  # on the branch that the run is on now
    pinned: tuple[str, ...] = ()  # names that hold it: pins and tags
    problem: str = ""  # for incomplete and foreign: what was seen
    poisoned: str = ""  # why its state is unhealthy (NaN, a loss that blew up); "" for a good one
    layout: str = ""  # whose files these are, see Manifest

    @property
    def ours(self) -> bool:
        """Written by this run, and readable: what retention, latest and best range over."""
        return self.state in ("full", "weights")

    @property
    def good(self) -> bool:
        """Ours, on the current branch and not poisoned: what latest, best and the places of a policy range over."""
        return self.ours and self.current and not self.poisoned

    @property
    def seq(self) -> int:
        return self.manifest.seq if self.manifest is not None else 0

    @property
    def id(self) -> str:
        return self.manifest.id if self.manifest is not None else ""

    @property
    def size(self) -> int:
        return self.manifest.size if self.manifest is not None else 0


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """A resume went back: saves continue from the end of `lineage`, the first of them gets number `next`."""

    run: str
    lineage: tuple[Span, ...]
    next: int


def checkpoint_name(step: int, suffix: str = "") -> str:
    """checkpoint-500; with the first 8 digits of an id behind it where that name is taken."""
    return f"checkpoint-{step}.{suffix[:8]}" if suffix else f"checkpoint-{step}"


def stripped(manifest: Manifest) -> Manifest:
    """The manifest of the same checkpoint with its weights alone."""
    parts = KEPT_PARTS if manifest.layout else ("model",)
    names = tuple(name for part in parts for name in manifest.parts.get(part, ()))
    files: dict[str, FileEntry] = {name: entry for name, entry in manifest.files.items() if name in names}
    return msgspec.structs.replace(manifest, parts={"model": names}, files=files)


def placed(found: Iterable[Record], head: Head | None) -> tuple[Record, ...]:
    """The records by (step, number), each knowing whether it is on the branch that the run is on now."""
    found = list(found)
    way = lineage_in_force(found, head)
    known = [
        msgspec.structs.replace(record, current=on_lineage(record.seq, way)) if record.ours else record
        for record in found
    ]
    return tuple(sorted(known, key=lambda record: (record.step, record.seq, record.name)))


def lineage_in_force(found: Sequence[Record], head: Head | None) -> tuple[Span, ...]:
    """The way to where the run is now: that of its newest save, unless a resume went back after it."""
    newest = max((record for record in found if record.ours), key=lambda record: record.seq, default=None)
    if head is not None and (newest is None or head.next > newest.seq):
        return head.lineage
    return newest.manifest.lineage if newest is not None and newest.manifest is not None else ()


def next_seq(found: Sequence[Record], head: Head | None) -> int:
    """The number of the next save: one more than any of the run, on whatever branch."""
    newest = max((record.seq for record in found if record.ours), default=0)
    return max(newest + 1, head.next if head is not None else 1)


def going_on(found: Sequence[Record], head: Head | None) -> dict[str, str]:
    """id -> reason of the checkpoint that a resume went back to, as long as nothing newer is saved.

    The next save continues from it, so it stays as it is, whatever the policy says; anybody can read that from disk.
    """
    if head is None or not head.lineage or next_seq(found, None) > head.next:
        return {}
    tip = head.lineage[-1][1]
    return {r.id: "the run goes on from here" for r in found if r.ours and r.current and r.seq == tip}


def on_lineage(seq: int, lineage: Iterable[Span]) -> bool:
    """Whether the save with this sequence number is on the way that `lineage` describes."""
    return any(first <= seq <= last for first, last in lineage)


def extend(lineage: Iterable[Span], seq: int) -> tuple[Span, ...]:
    """The lineage of a save number `seq` that continues from the end of `lineage`."""
    spans = list(lineage)
    if spans and spans[-1][1] == seq - 1:
        spans[-1] = (spans[-1][0], seq)
    else:
        spans.append((seq, seq))
    return tuple(spans)


def finite(value: object) -> float | None:
    """The metric as a float, or None where it can't rank anything (NaN, infinity, text, missing)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        return None
    return number if math.isfinite(number) else None
