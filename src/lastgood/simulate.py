"""A whole run in virtual time, by the same policy as the live one: what would stay, what would go, how much it takes.

Pure: no clock, no disk, no torch. Its records look like those of a run directory, down to the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import msgspec

from lastgood import policy, ranking
from lastgood.errors import NoCheckpoint
from lastgood.model import (
    FORMAT,
    FileEntry,
    Head,
    Manifest,
    Record,
    Span,
    State,
    checkpoint_name,
    extend,
    going_on,
    lineage_in_force,
    next_seq,
    placed,
    stripped,
)
from lastgood.policy import Keep

RUN = "0" * 16


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint is written. full_bytes: all of it, None if it holds the weights alone. created: in seconds.

    values: metrics that are known by then, because the evaluation came first. poisoned: what the guard saw by then.
    """

    step: int
    full_bytes: int | None
    weights_bytes: int
    created: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)
    poisoned: str = ""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Values arrive for the checkpoint of a step; they count from the next retention on."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Resume:
    """The run goes back to the full checkpoint of this step that is still there; the next save begins a branch."""

    step: int


@dataclass(frozen=True, slots=True)
class Pin:
    """Somebody pins or tags the checkpoint of this step that is still there."""

    step: int
    name: str = "pinned"


@dataclass(frozen=True, slots=True)
class Mark:
    """The guard, or somebody, marks the checkpoint of this step that is still there as poisoned; "": as healthy."""

    step: int
    poisoned: str


@dataclass(frozen=True, slots=True)
class Retain:
    """The policy is applied without a save, as at the end of training."""


Event = Save | Metrics | Resume | Pin | Mark | Retain


@dataclass(frozen=True)
class Moment:
    """One retention. step: of the newest save. peak, bytes: on disk before and after it. records: what stays.

    before: what there was. The reasons are worked out when they are asked for.
    """

    step: int
    before: tuple[Record, ...]
    records: tuple[Record, ...]
    peak: int
    bytes: int
    keep: Keep
    head: Head | None

    @cached_property
    def decisions(self) -> tuple[policy.Decision, ...]:
        """What becomes of each checkpoint, with its reasons."""
        return _decide(self.before, self.keep, self.head)

    @property
    def latest(self) -> Record | None:
        """What a recovery resumes from."""
        return policy.latest(self.records)

    @property
    def best(self) -> Record | None:
        """What gets deployed."""
        monitor, mode = self.keep.primary
        return ranking.best(self.records, monitor, mode) if monitor is not None and mode is not None else None


def simulate(history: Iterable[Event], keep: Keep) -> tuple[Moment, ...]:
    """One moment per save (and per `Retain`), in order.

    Raises NoCheckpoint for a resume or a pin of a step that isn't there any more. Metrics for a step that this life
    of the run didn't save are dropped, as a live run does.
    """
    return tuple(moments(history, keep))


def moments(
    history: Iterable[Event], keep: Keep, there: Iterable[Record] = (), head: Head | None = None
) -> Iterator[Moment]:
    """The same one by one, for who needn't see the end.

    there: of a run that goes on, its checkpoints on the branch that it is on; head: where it went back to.
    """
    run = _Run.from_disk(keep, tuple(there), head)
    for event in history:
        if isinstance(event, Save):
            run.save(event)
            yield run.retain()
        elif isinstance(event, Retain):
            yield run.retain()
        elif isinstance(event, Metrics):
            run.record(event)
        elif isinstance(event, Resume):
            run.resume(event.step)
        elif isinstance(event, Mark):
            run.mark(event)
        else:
            run.pin(event)


@dataclass(slots=True)
class _Run:
    """The writer and its disk: what Manager, commit and gc do, without either."""

    keep: Keep
    disk: tuple[Record, ...] = ()
    bytes: int = 0
    head: Head | None = None
    lineage: tuple[Span, ...] = ()
    next: int = 1
    parent: str | None = None
    step: int = 0
    saved: dict[int, str] = field(default_factory=dict)  # step -> id, of this life
    settled: int = 0  # so many of the oldest stay as they are for good
    sick: bool = False  # whether any was ever poisoned

    @classmethod
    def from_disk(cls, keep: Keep, there: tuple[Record, ...], head: Head | None) -> _Run:
        """With what is there already; saves go on from the end of the branch in force."""
        sick = any(record.poisoned for record in there)
        size = sum([record.size for record in there])
        way, number = lineage_in_force(there, head), next_seq(there, head)
        return cls(keep, placed(there, head), size, head, way, number, sick=sick)

    def save(self, event: Save) -> None:
        id = f"{self.next:08x}" * 2  # the first 8 digits tell displaced names apart
        self.lineage = extend(self.lineage, self.next)
        manifest = _manifest(event, id, self.next, self.lineage, self.parent)
        name = checkpoint_name(event.step)
        state: State = "full" if manifest.full else "weights"
        new = Record(name=name, step=event.step, state=state, manifest=manifest, metrics=event.values)
        if event.poisoned:
            new, self.sick = msgspec.structs.replace(new, poisoned=event.poisoned), True
        if self.head is None and (not self.disk or self.disk[-1].step < event.step):
            self.disk = (*self.disk, new)  # a run that never went back has one branch, and is in order already
        else:
            aside = [
                msgspec.structs.replace(r, name=checkpoint_name(r.step, r.id)) if r.name == name else r
                for r in self.disk
            ]
            self.disk = placed([*aside, new], self.head)
        self.bytes += new.size
        self.next, self.parent, self.step, self.saved[event.step] = self.next + 1, id, event.step, id

    def retain(self) -> Moment:
        before, peak = self.disk, self.bytes
        moment = partial(Moment, self.step, before, peak=peak, keep=self.keep, head=self.head)
        if not self.sick and policy.all_stay(before, self.keep):
            return moment(records=before, bytes=peak)
        settled, open_ = self._settled()
        decisions = _decide(open_, self.keep, self.head)
        left = [_strip(d.record) if d.action == "strip" else d.record for d in decisions if d.action != "delete"]
        left = [*settled, *left]
        self.disk = tuple(left) if self.head is None else placed(left, self.head)
        self.bytes -= sum([d.record.size for d in decisions if d.action != "keep"])
        self.bytes += sum([_strip(d.record).size for d in decisions if d.action == "strip"])
        return moment(records=self.disk, bytes=self.bytes)

    def _settled(self) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
        """(old ones that nothing can change any more, those to decide on): else a long run takes the square of time."""
        if self.head is not None:
            self.settled = 0
            return (), self.disk
        window = len(self.disk) - max(self.keep.last or 0, self.keep.full or 0, 1)
        while self.settled < window and policy.settled(self.disk[self.settled], self.keep):
            self.settled += 1
        return self.disk[: self.settled], self.disk[self.settled :]

    def record(self, event: Metrics) -> None:
        id, disk = self.saved.get(event.step), list(self.disk)
        for place in reversed(range(len(disk))):  # mostly it is the newest
            record = disk[place]
            if record.id == id:
                disk[place] = msgspec.structs.replace(record, metrics={**record.metrics, **event.values})
                self.disk = tuple(disk)
                return

    def resume(self, step: int) -> None:
        record = next((r for r in policy.at_step(self.disk, step) if r.state == "full"), None)
        if record is None or record.manifest is None:
            raise NoCheckpoint(f"there is no full checkpoint of step {step} to resume from at that moment")
        self.lineage, self.parent, self.step = record.manifest.lineage, record.id, step
        self.next, self.saved = next_seq(self.disk, self.head), {step: record.id}
        if not record.current or any(r.current and r.seq > record.seq for r in self.disk):
            self.head = Head(run=RUN, lineage=self.lineage, next=self.next)
        self.disk = placed(self.disk, self.head)

    def mark(self, event: Mark) -> None:
        record = next(iter(policy.at_step(self.disk, event.step)), None)
        if record is None:
            raise NoCheckpoint(f"there is no checkpoint of step {event.step} to mark at that moment")
        marked = msgspec.structs.replace(record, poisoned=event.poisoned)
        self.disk = tuple(marked if r is record else r for r in self.disk)
        self.sick, self.settled = True, 0

    def pin(self, event: Pin) -> None:
        record = next(iter(policy.at_step(self.disk, event.step)), None)
        if record is None:
            raise NoCheckpoint(f"there is no checkpoint of step {event.step} to pin at that moment")
        names = (*(name for name in record.pinned if name != event.name), event.name)
        held = msgspec.structs.replace(record, pinned=names)
        self.disk = tuple(held if r is record else r for r in self.disk)


def _decide(records: tuple[Record, ...], keep: Keep, head: Head | None) -> tuple[policy.Decision, ...]:
    return policy.decide(records, keep, protect=going_on(records, head))


def _manifest(event: Save, id: str, seq: int, lineage: tuple[Span, ...], parent: str | None) -> Manifest:
    parts: dict[str, tuple[str, ...]] = {"model": ("weights",)}
    files = {"weights": FileEntry(event.weights_bytes, "")}
    if event.full_bytes is not None:
        parts["progress"] = ("state",)
        files["state"] = FileEntry(event.full_bytes - event.weights_bytes, "")
    return Manifest(
        format=FORMAT, id=id, run=RUN, step=event.step, seq=seq, lineage=lineage, parent=parent,
        created=event.created, parts=parts, files=files,
    )  # fmt: skip


def _strip(record: Record) -> Record:
    assert record.manifest is not None
    return msgspec.structs.replace(record, state="weights", manifest=stripped(record.manifest))
