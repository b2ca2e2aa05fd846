"""The one object that joins everything: save, retain, record, resolve, close. No torch.

An integration hands over a function that writes its parts into a staging directory; the
manager does what comes before (space, lock) and after (commit, policy, deletion). A save
that fails leaves every earlier checkpoint as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lastgood import policy
from lastgood.errors import LastgoodError, NoCheckpoint, NotEnoughSpace, NotSupported, RunLocked, SaveFailed, UsageError
from lastgood.model import Head, Record, Span, extend, next_seq
from lastgood.policy import Keep
from lastgood.recovery import UNADOPTED, first_good, in_order
from lastgood.repo import bin, gc, journal, layout, leases, metrics, poison, verify
from lastgood.repo.commit import commit
from lastgood.repo.lock import RunLock
from lastgood.repo.protect import protected
from lastgood.repo.quarantine import quarantine
from lastgood.repo.read import records
from lastgood.repo.run import read_head, read_run, start_run, write_head, write_policy
from lastgood.repo.staging import Staging, failure, open_staging
from lastgood.store import local
from lastgood.talk import say, warn
from lastgood.units import size

RESERVE = 16 << 20
"""Bytes left free by a save, so that a manifest, a journal line and a deletion still fit (16 MiB)."""


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoint to use; those passed over on the way, each with its reason; which of these are damaged."""

    record: Record
    skipped: tuple[tuple[str, str], ...] = ()
    damaged: tuple[str, ...] = ()


@dataclass(slots=True)
class Manager:
    """The writer of one run directory. `begin_fresh` or `begin_from` first, `close` last."""

    root: Path
    keep: Keep = field(default_factory=Keep)
    on_error: Literal["warn", "raise"] = "warn"
    verify: Literal["full", "quick"] = "full"
    run: str = ""
    lineage: tuple[Span, ...] = ()
    next: int = 1  # number of the next save
    parent: str | None = None
    failures: int = 0
    saved: dict[int, Record] = field(default_factory=dict)  # by step, of this process
    _lock: RunLock | None = None
    _sightings: leases.Sightings = field(default_factory=leases.Sightings)

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
            local.make_dirs(self.root / layout.HIDDEN)
            lock = RunLock(self.root)
            lock.acquire(takeover=takeover)
            self._lock = lock
            gc.sweep(self.root, self._sightings)
            self._recover_identity()
        except OSError as error:
            if isinstance(error, LastgoodError):
                raise
            raise SaveFailed(
                f"{self.root} can't be used for checkpoints: {error.strerror or error}",
                hint="choose an output_dir that exists on a writable disk and belongs to you",
            ) from error

    def _recover_identity(self) -> None:
        """A lost run.json must not make the run's own checkpoints foreign: their manifests name the run too."""
        if read_run(self.root) is not None:
            return
        runs = {record.manifest.run for record in self.records() if record.manifest is not None}
        if len(runs) == 1:
            start_run(self.root, runs.pop())
            warn(f"{self.root} had no readable run.json; the run was recognised by its checkpoints")

    def begin_fresh(self) -> None:
        """A new run: checkpoints that are already in the directory become foreign and are never touched."""
        others = [record.name for record in self.records() if record.state != "incomplete"]
        with leases.alone(self.root):
            self._still_ours()
            self.run = start_run(self.root)
        self.lineage, self.next, self.parent, self.saved = (), 1, None, {}
        write_policy(self.root, self.keep.options())
        journal.append(self.root, "started", run=self.run, others=others)

    def begin_from(self, record: Record) -> None:
        """Continue from a checkpoint of this run; from an older one, a branch begins."""
        manifest = record.manifest
        if manifest is None:
            raise NoCheckpoint(f"{record.name} has no manifest to continue from")
        everything = self.records()
        self.run = manifest.run
        self.lineage, self.parent, self.saved = manifest.lineage, manifest.id, {}
        self.next = next_seq(everything, read_head(self.root, self.run))
        left = [r for r in everything if r.ours and r.current and r.seq > record.seq]
        if left or not record.current:
            # Written down before training goes on: otherwise a crash before the first save of the
            # new branch would hand the abandoned one to the next resume.
            with leases.alone(self.root):
                self._still_ours()
                write_head(self.root, Head(run=self.run, lineage=manifest.lineage, next=self.next))
        write_policy(self.root, self.keep.options())
        journal.append(self.root, "resumed", step=record.step, id=record.id, left=[r.name for r in left])

    def close(self, event: str = "closed", **facts: str) -> None:
        """Give the run back. Safe to call twice. facts: for the journal, beside the event."""
        if self._lock is not None:
            journal.append(self.root, event, run=self.run, **facts)
            self._lock.release()
            self._lock = None

    def records(self) -> tuple[Record, ...]:
        """The checkpoints of the directory as they are now."""
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
        started = time.perf_counter()
        staging: Staging | None = None
        try:
            self._still_ours()
            self._preflight(estimate)
            staging = open_staging(self.root)
            write(staging)
            self._still_ours()
            seq, self.next = self.next, self.next + 1
            record = commit(
                self.root,
                staging,
                run=self.run,
                step=step,
                seq=seq,
                lineage=extend(self.lineage, seq),
                parent=self.parent,
                created=time.time(),
                environment=dict(environment),
                arguments=dict(arguments),
                facts=dict(facts),
                fence=self._still_ours,
            )
        except BaseException as error:
            if staging is not None:
                staging.discard()
            self._failed(step, error)
            return None
        assert record.manifest is not None
        self.lineage, self.parent = record.manifest.lineage, record.id
        self.saved[step] = record
        seconds = round(time.perf_counter() - started, 4)
        journal.append(self.root, "saved", step=step, id=record.id, bytes=record.size, seconds=seconds)
        return record

    def retain(self) -> tuple[policy.Decision, ...]:
        """Apply the policy to what is on disk now; the decisions with their reasons go to the journal."""
        decisions: tuple[policy.Decision, ...] = ()
        try:
            self._still_ours()  # whoever was fenced off deletes nothing either
            found = self.records()
            decisions = policy.decide(found, self.keep, protect=protected(self.root, found, self.run, self._sightings))
            todo = gc.plan([d.record for d in decisions], decisions)
            gc.execute(self.root, todo, sightings=self._sightings, fence=self._still_ours)
            leases.sweep(self.root, self._sightings)
        except OSError as error:
            # Too much on disk is better than a run that dies; the next save tries again.
            warn(f"retention: {error}; nothing that is kept was touched, the rest goes at the next save")
        return decisions

    def record(self, step: int, values: Mapping[str, object]) -> None:
        """Attach metrics to the checkpoint that this process saved at `step`, if there is one."""
        record = self.saved.get(step)
        if record is None:
            return
        try:
            metrics.record(self.root, record.id, step, values)
        except OSError as error:
            warn(f"the metrics of step {step} could not be written ({error}); they don't count for best")

    def poison(self, first: int, reason: str) -> tuple[Record, ...]:
        """Mark what this process saved at step `first` and later: its state was unhealthy already. Returns those.

        A mark that can't be written is a warning: training goes on, and the next save carries its own.
        """
        there = {record.id: record for record in self.records() if record.ours and not record.poisoned}
        sick = [r for step, r in self.saved.items() if step >= first and r.id in there]
        if not sick:
            return ()
        try:
            poison.mark(self.root, {record.id: reason for record in sick})
        except (OSError, LastgoodError) as error:
            warn(f"{', '.join(r.name for r in sick)} could not be marked as poisoned ({error})")
            return ()
        for record in sick:
            journal.append(self.root, "poisoned", step=record.step, id=record.id, reason=reason)
        return tuple(sick)

    def _still_ours(self) -> None:
        if self._lock is not None and not self._lock.still_held():
            raise RunLocked(
                f"another process took over {self.root}; this one must not write to it any more",
                hint="stop this process; its checkpoints so far are intact",
            )

    def _preflight(self, estimate: int) -> None:
        free, inodes = local.free(self.root)
        if free >= estimate + RESERVE and (inodes < 0 or inodes > 64):
            return
        gc.sweep(self.root, self._sightings)  # leftovers of interrupted saves and deletions are the first to go
        free, inodes = local.free(self.root)
        # In vain it isn't emptied: without enough in it, the save fails just the same.
        enough = free + bin.size(self.root) >= estimate + RESERVE
        if enough and (free < estimate + RESERVE or 0 <= inodes <= 64) and bin.empty(self.root):
            say("the space of what `lastgood prune` had removed was needed: it can't be undone any more")
            free, inodes = local.free(self.root)
        if free < estimate + RESERVE or 0 <= inodes <= 64:
            raise NotEnoughSpace(
                f"a save needs {size(estimate)} and {size(RESERVE)} in reserve, {self.root} has {size(free)}"
                f" and {'enough' if inodes < 0 else inodes} inodes left; nothing was written",
                hint="free space, or keep fewer checkpoints (save_total_limit, Keep(full=1))",
            )

    def _failed(self, step: int, error: BaseException) -> None:
        self.failures += 1
        if isinstance(error, OSError):
            with suppress(OSError):
                self._still_ours()  # who took over swept away what was staged: that isn't the disk's fault
        fatal = isinstance(error, (RunLocked, NotSupported)) or not isinstance(error, Exception)
        if not fatal:
            journal.append(self.root, "failed", step=step, error=str(error))
        if isinstance(error, OSError) and not isinstance(error, LastgoodError):
            error = failure(self.root / layout.HIDDEN, error)  # from a library that wrote a file of its own
        if fatal or (self.on_error == "raise" and isinstance(error, LastgoodError)):
            raise error
        if self.on_error == "raise":
            raise SaveFailed(
                f"the checkpoint of step {step} could not be written: {error}; earlier ones are intact",
                hint="see the error above this one",
            ) from error
        warn(f"NO CHECKPOINT at step {step}: {error}\n  earlier ones are intact, training goes on (on_error='warn')")

    # ---- finding -------------------------------------------------------------------------

    def find(self, what: Literal["last", "best"] | int, *, full: bool = True) -> Found:
        """The checkpoint to resume from (full) or to load (the weights are enough), verified.

        "last" and "best" fall back to the next one when one fails verification; a step does not.
        Raises NoCheckpoint, with a line for each that was passed over, when none is left.
        """
        everything = self.records()
        monitor, mode = self.keep.primary
        skipped = [(r.name, r.problem or r.state) for r in everything if r.state in ("incomplete", "foreign")]
        damaged = [r.name for r in everything if r.state == "incomplete"]
        choice = first_good(
            in_order(everything, what, monitor=monitor, mode=mode),
            lambda record: verify.problems(self.root, record, full=self.verify == "full"),
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
        listing = "".join(f"\n  {name}: {reason}" for name, reason in skipped)
        raise NoCheckpoint(
            f"{self.root} has no good checkpoint for {what!r}{listing}",
            hint="resume_from_checkpoint='auto' takes the newest good one, False starts afresh"
            + ("; a poisoned one is taken if its step or path is named" if any(r.poisoned for r in everything) else ""),
        )

    def quarantine(self, names: tuple[str, ...]) -> None:
        """Move checkpoints of this run that failed verification out of the way; their bytes are kept for a look.

        Each is read once more: what couldn't be read for a moment (no descriptor left, a network that was away) is no
        damaged checkpoint, and stays.
        """
        self._still_ours()
        run = read_run(self.root)
        found = {record.name: record for record in self.records()}
        for name in names:
            if run is None or not _carries(self.root / name, run):
                continue
            record = found.get(name)
            if record is not None and record.ours and not verify.problems(self.root, record, full=True):
                warn(f"{name} couldn't be read a moment ago, and is good: it stays where it is")
                continue
            say(f"{name} is damaged; moved to {quarantine(self.root, name)}")


def _carries(path: Path, run: str) -> bool:
    """Whether a damaged checkpoint is provably of this run: its manifest, readable or not, has the run's id."""
    try:
        return run.encode() in local.read(path / "lastgood.json", 64 << 20)
    except OSError:
        return False
