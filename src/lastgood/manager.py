"""The one object that joins everything: save, retain, record, resolve, close. No torch.

An integration hands over a function that writes its parts into a staging directory; the
manager does what comes before (space, lock) and after (commit, policy, deletion). A save
that fails leaves every earlier checkpoint as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lastgood import policy
from lastgood.errors import (
    LastgoodError,
    NoCheckpoint,
    NotEnoughSpace,
    NotSupported,
    RunLocked,
    SaveFailed,
    UsageError,
)
from lastgood.model import Head, Record, Span, extend, next_seq
from lastgood.policy import Keep
from lastgood.recovery import LOST_HEAD, UNADOPTED, Found, first_good, in_order
from lastgood.repo import free, gc, held, journal, layout, leases, metrics, poison, verify
from lastgood.repo.commit import commit
from lastgood.repo.lock import RunLock
from lastgood.repo.protect import protected
from lastgood.repo.quarantine import carries, quarantine
from lastgood.repo.read import records
from lastgood.repo.run import forget_head, lost_head, read_head, read_run, start_run, write_head, write_policy
from lastgood.repo.space import OnFull, Space
from lastgood.repo.staging import Staging, failure, lacked_room, open_staging
from lastgood.room import SPARE
from lastgood.store import local
from lastgood.talk import say, warn

RESERVE = SPARE.bytes
"""Bytes left free by a save, so that a manifest, a journal line and a deletion still fit (16 MiB)."""


@dataclass(slots=True)
class Manager:
    """The writer of one run directory. `begin_fresh` or `begin_from` first, `close` last.

    on_full: what becomes of a save that finds no room, whatever on_error says of other failures: it is left out with a
    warning, it waits for room until `space.leaving` says something, or `space.lack` is set for whoever trains to stop.
    None: as on_error says.
    """

    root: Path
    keep: Keep = field(default_factory=Keep)
    on_error: Literal["warn", "raise"] = "warn"
    on_full: OnFull | None = None
    verify: Literal["full", "quick"] = "full"
    run: str = ""
    lineage: tuple[Span, ...] = ()
    next: int = 1  # number of the next save
    parent: str | None = None
    failures: int = 0
    saved: dict[int, Record] = field(default_factory=dict)  # by step, of this process
    space: Space = field(init=False)
    _lock: RunLock | None = None
    _sightings: leases.Sightings = field(default_factory=leases.Sightings)

    def __post_init__(self) -> None:
        self.space = Space(self.root, self.on_full)

    # ---- life of a run -------------------------------------------------------------------

    def open(self, *, takeover: bool = False) -> None:
        """Become the only writer.

        Raises RunLocked (somebody else is), SaveFailed (the directory isn't writable) or UsageError (it is inside a
        checkpoint).
        """
        inside = next((p for p in (self.root, *self.root.absolute().parents) if layout.is_checkpoint(p)), None)
        if inside is not None:
            raise UsageError(
                f"{self.root} lies in the checkpoint {inside}, which retention may delete",
                hint="choose a directory of its own for this run",
            )
        try:
            with self._usable():
                layout.own(self.root)
                local.make_dirs(self.root / layout.HIDDEN)
                lock = RunLock(self.root)
                lock.acquire(takeover=takeover)
                self._lock, self.space.root = lock, lock.door
                with self._fenced():
                    gc.sweep(self.door, self._sightings)
                    self._recover_identity()
        except OSError:
            if self._lock is not None:  # who can't write to the run doesn't keep others from it
                self._lock.release()
                self._lock, self.space.root = None, self.root
            raise

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """A run can't begin on a disk that fails: SaveFailed instead of a bare OSError."""
        try:
            yield
        except OSError as error:
            if isinstance(error, LastgoodError):
                raise
            raise SaveFailed(
                f"{self.root} can't be used for checkpoints: {error.strerror or error}",
                hint="choose an output_dir that exists on a writable disk and belongs to you",
            ) from error

    def _recover_identity(self) -> None:
        """A lost run.json must not make the run's own checkpoints foreign: their manifests name the run too."""
        if read_run(self.root, sure=True) is not None:
            return
        runs = {record.manifest.run for record in self.records() if record.manifest is not None}
        if len(runs) == 1:
            start_run(self.door, runs.pop())
            warn(f"{self.root} had no readable run.json; the run was recognised by its checkpoints")

    def begin_fresh(self) -> None:
        """A new run: checkpoints that are already in the directory become foreign and are never touched.

        Raises SaveFailed.
        """
        others = [record.name for record in self.records() if record.state != "incomplete"]
        with self._usable(), self._fenced():
            self.run = start_run(self.door)
            self.lineage, self.next, self.parent, self.saved = (), 1, None, {}
            write_policy(self.door, self.keep.options())
            self.space.begin(None)
            journal.append(self.door, "started", run=self.run, others=others)

    def begin_from(self, record: Record) -> None:
        """Continue from a checkpoint of this run; from an older one, a branch begins. Raises SaveFailed."""
        manifest = record.manifest
        if manifest is None:
            raise NoCheckpoint(f"{record.name} has no manifest to continue from")
        everything = self.records()
        with self._usable(), self._fenced():
            self.run = manifest.run
            self.lineage, self.parent, self.saved = manifest.lineage, manifest.id, {}
            self.next = next_seq(everything, read_head(self.root, self.run, sure=True))
            left = [r for r in everything if r.ours and r.current and r.seq > record.seq]
            if left or not record.current:
                # Written down before training goes on: otherwise a crash before the first save of the
                # new branch would hand the abandoned one to the next resume.
                write_head(self.door, Head(run=self.run, lineage=manifest.lineage, next=self.next))
            elif lost_head(self.root):
                forget_head(self.door)
            write_policy(self.door, self.keep.options())
            self.space.begin(manifest)
            journal.append(self.door, "resumed", step=record.step, id=record.id, left=[r.name for r in left])

    def close(self, event: str = "closed", **facts: str) -> None:
        """Give the run back. Safe to call twice. facts: for the journal, beside the event."""
        if self._lock is not None:
            journal.append(self.door, event, run=self.run, **facts)
            self._lock.release()
            self._lock, self.space.root = None, self.root

    @property
    def door(self) -> Path:
        """The run's directory for whatever changes something in it: calls fail after another process took over."""
        return self.root if self._lock is None else self._lock.door

    def records(self) -> tuple[Record, ...]:
        """The checkpoints of the directory as they are now. Raises Unreadable if the system can't look just now."""
        return records(self.root, sure=True)

    def seen(self) -> tuple[Record, ...]:
        """The same for what no resume and no deletion rests on: what can't be read just now must not end a training."""
        return records(self.root)

    # ---- saving --------------------------------------------------------------------------

    def save(
        self,
        step: int,
        write: Callable[[Staging], None],
        *,
        estimate: int,
        environment: Mapping[str, str],
        arguments: Mapping[str, object],
        facts: Mapping[str, object],
    ) -> Record | None:
        """Commit what `write` stages as the checkpoint of `step`; None if it failed and on_error is "warn".

        estimate: bytes this save will need, to refuse before writing rather than half-way.
        """
        started, patience = time.perf_counter(), free.Patience(self.space.leaving)
        staging: Staging | None = None
        while True:
            try:
                self._still_ours()
                lineage = extend(self.lineage, self.next)
                self.space.prepare(
                    estimate, step, keep=self.keep, run=self.run, lineage=lineage, facts=facts,
                    sightings=self._sightings,
                )  # fmt: skip
                staging = open_staging(self.root)
                write(staging)
                self._still_ours()
                seq, self.next = self.next, self.next + 1
                record = commit(
                    self.door,
                    staging,
                    run=self.run,
                    step=step,
                    seq=seq,
                    lineage=lineage,
                    parent=self.parent,
                    created=time.time(),
                    environment=dict(environment),
                    arguments=dict(arguments),
                    facts=dict(facts),
                )
                break
            except BaseException as error:
                lack = lacked_room(self.root, error)  # as long as what was written is still there
                if staging is not None:
                    if lack is not None:
                        self.space.learn(staging)
                    staging.discard()
                    staging = None
                if lack is not None and self.space.wait(estimate, step, lack, patience):
                    continue
                self._failed(step, lack or error)
                return None
        assert record.manifest is not None
        self.lineage, self.parent = record.manifest.lineage, record.id
        self.saved[step] = record
        self.space.saved(record.manifest)
        seconds = round(time.perf_counter() - started, 4)
        journal.append(self.door, "saved", step=step, id=record.id, bytes=record.size, seconds=seconds)
        return record

    def retain(self) -> tuple[policy.Decision, ...]:
        """Apply the policy to what is on disk now; the decisions with their reasons go to the journal."""
        try:
            self._still_ours()  # whoever was fenced off deletes nothing either
            found = self.records()
            stay = protected(self.root, found, self.run, self._sightings)
        except OSError as error:
            warn(f"retention: {error}; nothing was deleted, the next save tries again")
            return ()
        decisions = policy.decide(found, self.keep, protect=stay)
        try:
            with self._fenced():
                gc.execute(self.door, gc.plan([d.record for d in decisions], decisions), sightings=self._sightings)
                leases.sweep(self.door, self._sightings)
        except OSError as error:
            # Too much on disk is better than a run that dies; the next save tries again.
            warn(f"retention: {self._told(error)}; nothing that is kept was touched, the rest goes at the next save")
        return decisions

    def record(self, step: int, values: Mapping[str, object]) -> None:
        """Attach metrics to the checkpoint that this process saved at `step`, if there is one."""
        record = self.saved.get(step)
        if record is None:
            return
        try:
            with self._fenced():
                metrics.record(self.door, record.id, step, values)
        except OSError as error:
            warn(f"the metrics of step {step} could not be written ({self._told(error)}); they don't count for best")

    def poison(self, first: int, reason: str) -> tuple[Record, ...]:
        """Mark what this process saved at step `first` and later: its state was unhealthy already. Returns those.

        A mark that can't be written is a warning: training goes on, and the next save carries its own.
        """
        sick: list[Record] = []
        try:
            there = {record.id for record in self.records() if record.ours and not record.poisoned}
            sick = [r for step, r in self.saved.items() if step >= first and r.id in there]
            if not sick:
                return ()
            with self._fenced():
                poison.mark(self.door, {record.id: reason for record in sick})
        except (OSError, LastgoodError) as error:
            self._unless_taken()
            names = ", ".join(r.name for r in sick) or f"the checkpoints from step {first} on"
            warn(f"{names} could not be marked as poisoned ({self._told(error)})")
            return ()
        for record in sick:
            journal.append(self.door, "poisoned", step=record.step, id=record.id, reason=reason)
        return tuple(sick)

    @contextmanager
    def _fenced(self) -> Iterator[None]:
        """What fails inside because another process took over is RunLocked, and so is what nobody noticed."""
        try:
            yield
        except OSError:
            self._unless_taken()
            raise
        self._still_ours()

    def _unless_taken(self) -> None:
        """After an error: a takeover may be its cause. Where that can't be told, the error speaks for itself."""
        with suppress(OSError):
            self._still_ours()

    def _told(self, error: Exception) -> str:
        """An error without the detour that its path takes through the fence."""
        return str(error).replace(f"{self.door}", f"{self.root}")

    def _still_ours(self) -> None:
        if self._lock is not None and not self._lock.still_held():
            raise RunLocked(
                f"another process took over {self.root}; this one must not write to it any more",
                hint="stop this process; its checkpoints so far are intact",
            )

    def _failed(self, step: int, error: BaseException) -> None:
        self.failures += 1
        fatal = isinstance(error, (RunLocked, NotSupported)) or not isinstance(error, Exception)
        if not fatal:
            self._unless_taken()  # what it needed was taken away, too
            journal.append(self.door, "failed", step=step, error=str(error))
        if isinstance(error, OSError) and not isinstance(error, LastgoodError):
            error = failure(self.root / layout.HIDDEN, error)  # from a library that wrote a file of its own
        ruled = isinstance(error, NotEnoughSpace) and self.on_full is not None
        if fatal or (self.on_error == "raise" and isinstance(error, LastgoodError) and not ruled):
            raise error
        if self.on_error == "raise" and not ruled:
            raise SaveFailed(
                f"the checkpoint of step {step} could not be written: {error}; earlier ones are intact",
                hint="see the error above this one",
            ) from error
        goes = "training goes on (on_error='warn')"
        if isinstance(error, NotEnoughSpace):
            goes = self.space.left_out(step, error)
        warn(f"NO CHECKPOINT at step {step}: {error}\n  earlier ones are intact, {goes}")

    # ---- finding -------------------------------------------------------------------------

    def find(self, what: Literal["last", "best"] | int, *, full: bool = True, held: held.Held | None = None) -> Found:
        """The checkpoint to resume from (full) or to load (the weights are enough), verified. held: see `problems`.

        "last" and "best" fall back to the next one when one fails verification; a step does not.
        Raises NoCheckpoint, with a line for each that was passed over, when none is left.
        """
        everything = self.records()
        monitor, mode = self.keep.primary
        if not isinstance(what, int) and (lost := lost_head(self.root)):
            raise NoCheckpoint(lost, hint=LOST_HEAD)
        skipped = [(r.name, r.problem or r.state) for r in everything if r.state in ("incomplete", "foreign")]
        damaged = [r.name for r in everything if r.state == "incomplete"]
        choice = first_good(
            in_order(everything, what, monitor=monitor, mode=mode),
            lambda record: verify.problems(self.root, record, full=self.verify == "full", sure=True, held=held),
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
            f"{self.root} has no good checkpoint for {what!r}{listing}",
            hint="resume_from_checkpoint='auto' takes the newest good one, False starts afresh"
            + ("; a poisoned one is taken if its step or path is named" if any(r.poisoned for r in everything) else ""),
        )

    def quarantine(self, names: tuple[str, ...]) -> None:
        """Move checkpoints of this run that failed verification out of the way; their bytes are kept for a look.

        Each is read once more: one that couldn't be read for a moment is no damaged one, and stays.
        """
        self._still_ours()
        run = read_run(self.root)
        found = {record.name: record for record in self.records()} if names else {}
        for name in names:
            if run is None or not carries(self.root / name, run):
                continue
            record = found.get(name)
            if record is not None and record.ours and not verify.problems(self.root, record, full=True):
                warn(f"{name} couldn't be read a moment ago, and is good: it stays where it is")
                continue
            try:
                with self._fenced():
                    place = quarantine(self.door, name)
            except OSError as error:  # a full disk must not keep a run from going on from a good one
                warn(f"{name} is damaged and could not be moved aside ({self._told(error)})")
                continue
            say(f"{name} is damaged; moved to {place}")
