"""The one object that joins everything: save, retain, record, resolve, close. No torch.

An integration hands over a function that writes its parts into a staging directory; the
manager does what comes before (space, lock) and after (commit, policy, deletion). A save
that fails leaves every earlier checkpoint as it was.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lastgood import parting, policy
from lastgood.behind import SPENT, Behind, Failed, Save
from lastgood.errors import LastgoodError, NoCheckpoint, NotEnoughSpace, NotSupported, RunLocked, SaveFailed
from lastgood.finding import Check, find
from lastgood.garbage import uncollected
from lastgood.grace import Late
from lastgood.model import FORMAT, Head, Manifest, Record, Span, checkpoint_name, extend, next_seq
from lastgood.policy import Keep
from lastgood.recovery import Found
from lastgood.repo import free, gc, held, journal, layout, leases, metrics, poison, verify
from lastgood.repo.commit import commit
from lastgood.repo.draft import Changed, Draft, draft
from lastgood.repo.protect import protected
from lastgood.repo.quarantine import carries, quarantine
from lastgood.repo.read import records
from lastgood.repo.run import forget_head, lost_head, read_head, read_run, start_run, write_head, write_policy
from lastgood.repo.space import OnFull, Space
from lastgood.repo.staging import Staging, failure, lacked_room, open_staging
from lastgood.room import SPARE
from lastgood.store.memory import Short
from lastgood.talk import say, warn

RESERVE = SPARE.bytes
"""Bytes left free by a save, so that a manifest, a journal line and a deletion still fit (16 MiB)."""


@dataclass(slots=True)
class Manager(Behind):
    """The writer of one run directory. `begin_fresh` or `begin_from` first, `close` last.

    on_full: what becomes of a save that finds no room, whatever on_error says of other failures: it is left out with a
    warning, it waits for room until `space.leaving` says something, or `space.lack` is set for whoever trains to stop.
    None: as on_error says.
    """

    keep: Keep = field(default_factory=Keep)
    on_error: Literal["warn", "raise"] = "warn"
    on_full: OnFull | None = None
    verify: Check = "full"
    lineage: tuple[Span, ...] = ()
    next: int = 1  # number of the next save
    parent: str | None = None
    failures: int = 0

    def __post_init__(self) -> None:
        self.space = Space(self.root, self.on_full)

    # ---- life of a run -------------------------------------------------------------------

    def begin_fresh(self) -> None:
        """A new run: checkpoints that are already in the directory become foreign and are never touched.

        Raises SaveFailed.
        """
        self.settle()
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
        self.settle()
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
        now: bool = False,
        skip: bool = False,
    ) -> Record | None:
        """Commit what `write` stages as the checkpoint of `step`; None if it failed and on_error is "warn".

        In the background `write` fills a copy in memory, and what is returned is a record without files: the one that
        is committed is in `saved` once `settle` has returned. now: before this returns, all the same.
        estimate: bytes this save will need, to refuse before writing rather than half-way. skip: it may be left out
        where the last one is still being written, if that was chosen.
        """
        started = time.perf_counter()
        if skip and self._skips(step):
            return None
        self.settle()
        # Also of one that nobody called the last: the writer may still be at what `settle` gave up.
        if (now or self.grace.over) and parting.refuses(self.grace, self.door, step, estimate):
            return None
        self.owed = ""
        save = Save(step, started, dict(environment), dict(arguments), copy.deepcopy(dict(facts)))
        patience, behind = free.Patience(self.space.leaving), not now and self.background is not None
        staging: Staging | None = None
        while True:
            try:
                self._still_ours()
                save.lineage = extend(self.lineage, self.next)
                self.space.prepare(
                    estimate, step, keep=self.keep, run=self.run, lineage=save.lineage, facts=facts,
                    sightings=self._sightings,
                )  # fmt: skip
                staging = open_staging(self.root)
                staging.check = None if self.grace.seconds is None else self.grace.check
                staging.ordered = self.ordered
                if behind and self.background is not None:
                    self._arena.budget = self.background.budget
                    staging = draft(staging, self._arena, self.stages())
                    self._arena.ready(estimate)
                with uncollected():
                    write(staging)
                self._still_ours()
                save.seq, self.next = self.next, self.next + 1
                save.door, save.lock = self.door, self._lock
                if isinstance(staging, Draft):
                    return self._hand_over(staging, save, estimate)
                return self._publish(staging, save)
            except Short:
                behind = False
                self._short(estimate)
                if staging is not None:
                    staging.discard()
                    staging = None
            except Late as error:
                parting.gives_up(self.grace, self.door, step, error)
                return None
            except BaseException as error:
                lack = self._undo(staging, error)
                staging = None
                if lack is not None and self.space.wait(estimate, step, lack, patience):
                    continue
                self._failed(step, lack or error)
                return None

    def settle(self) -> None:
        """Wait until all that was handed over is on the disk. What failed meanwhile is told, see `heed`."""
        self._drained()
        self.heed()

    def heed(self) -> None:
        """Tell what failed behind training's back, once: by on_error and on_full, as if it had failed here.

        Raises SaveFailed or whatever a save would have.
        """
        if self._writer.here:
            return
        self._window.finish()
        while (raised := self._writer.take()) is not None:
            if isinstance(raised, Failed) and isinstance(raised.error, Changed):
                self._spoilt(raised.step, raised.error)
            elif isinstance(raised, Failed):
                self._failed(raised.step, raised.error)
            else:
                self._failed(max(self.saved, default=0), raised)

    def _hand_over(self, staging: Draft, save: Save, estimate: int) -> Record:
        """The rest is the writer's; a record of what will be there."""
        parts = {part: tuple(names) for part, names in staging.parts.items()}
        coming = Manifest(
            format=FORMAT, id=staging.id, run=self.run, step=save.step, seq=save.seq, lineage=save.lineage,
            parent=self.parent, parts=parts, facts=save.facts,
        )  # fmt: skip
        record = Record(
            name=checkpoint_name(save.step), step=save.step, manifest=coming,
            state="full" if coming.full else "weights", poisoned=poison.reason(coming, {}),
        )  # fmt: skip
        before, self.saved[save.step] = self.saved.get(save.step), record
        self._under_way, self._hurry, self._window = save.step, False, staging.window
        staging.window.begin()
        save.copy, save.stall = staging.seconds.get("copy", 0.0), time.perf_counter() - save.started
        self._writer.submit(lambda: self._write(staging, save, estimate, before), size=staging.arena.used)
        return record

    def _write(self, made: Draft, save: Save, estimate: int, before: Record | None) -> None:
        """What the writer does of a save."""
        patience = free.Patience(lambda: self._hurry or not self.space.patient)
        while True:
            staging: Staging | None = None
            try:
                made.window.fill()
                staging = made.opened()
                made.write(staging)
                staging.flush()  # what is still on its way from a device is written as it comes
                made.window.prove()
                save.waited = made.window.waited
                if self._lock is not save.lock:
                    raise SaveFailed(f"the run was closed before step {save.step} was written")
                self._still_ours()
                self._publish(staging, save)
                self._under_way = None
                return
            except BaseException as error:
                lack = self._undo(staging, error)
                if lack is not None and self.space.wait(estimate, save.step, lack, patience):
                    continue
                self._under_way = None
                if before is None:
                    self.saved.pop(save.step, None)
                else:
                    self.saved[save.step] = before
                raise Failed(save.step, lack or error) from error

    def _undo(self, staging: Staging | None, error: BaseException) -> NotEnoughSpace | None:
        """Remove what was written of a save; the lack of room, if that was the reason."""
        lack = lacked_room(self.root, error)  # as long as what was written is still there
        if staging is not None:
            if lack is not None:
                self.space.learn(staging)
            staging.discard()
        return lack

    def _publish(self, staging: Staging, save: Save) -> Record:
        record = commit(
            save.door,
            staging,
            run=self.run,
            step=save.step,
            seq=save.seq,
            lineage=save.lineage,
            parent=self.parent,
            created=time.time(),
            environment=save.environment,
            arguments=save.arguments,
            facts=save.facts,
        )
        assert record.manifest is not None
        self.lineage, self.parent = record.manifest.lineage, record.id
        self.saved[save.step] = record
        self.space.saved(record.manifest)
        self.took = time.perf_counter() - save.started
        spent = {"stall": save.stall + save.waited or self.took, **staging.seconds, "copy": save.copy}
        journal.append(
            save.door, "saved", step=save.step, id=record.id, bytes=record.size, seconds=round(self.took, 4),
            spent={name: round(spent.get(name, 0.0), 4) for name in SPENT},
        )  # fmt: skip
        return record

    def retain(self) -> tuple[policy.Decision, ...]:
        """Apply the policy to what is on disk now; the decisions with their reasons go to the journal.

        In the background: behind what is being written, and () here. () too where the grace of a SIGTERM is short: the
        next save does it.
        """
        return self._retain() if not self._then(self._retain) else ()

    def _retain(self) -> tuple[policy.Decision, ...]:
        if self.grace.short:
            return ()
        try:
            self._still_ours()  # whoever was fenced off deletes nothing either
            found = records(self.root, sure=True)
            stay = protected(self.root, found, self.run, self._sightings)
        except OSError as error:
            warn(f"retention: {error}; nothing was deleted, the next save tries again")
            return ()
        decisions, graves = policy.decide(found, self.keep, protect=stay), list[Path]()
        try:
            with self._fenced():
                todo = gc.plan([d.record for d in decisions], decisions)
                gc.execute(self.door, todo, sightings=self._sightings, graves=graves)
                leases.sweep(self.door, self._sightings)
        except OSError as error:
            # Too much on disk is better than a run that dies; the next save tries again.
            warn(f"retention: {self._told(error)}; nothing that is kept was touched, the rest goes at the next save")
        self._dissolve(graves)
        return decisions

    def record(self, step: int, values: Mapping[str, object]) -> None:
        """Attach metrics to the checkpoint that this process saved at `step`, if there is one."""
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        if not self._then(lambda: self._record(step, plain)):
            self._record(step, plain)

    def _record(self, step: int, values: Mapping[str, object]) -> None:
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
        """The checkpoint to resume from (full) or to load (the weights are enough): see `finding.find`."""
        return find(self.root, self.records(), what, keep=self.keep, check=self.verify, full=full, held=held)

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
