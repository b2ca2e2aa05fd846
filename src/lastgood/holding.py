"""A run directory in the hands of the one process that writes to it: taken, fenced, given back. No torch.

What changes something in the directory names it by `door`, and stands in `_fenced`: after another process took over,
both say so instead of getting anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lastgood.errors import LastgoodError, RunLocked, SaveFailed, UsageError
from lastgood.model import Record
from lastgood.repo import gc, journal, layout, leases
from lastgood.repo.lock import RunLock
from lastgood.repo.read import records
from lastgood.repo.run import read_run, start_run
from lastgood.repo.space import Space
from lastgood.store import local
from lastgood.talk import warn


@dataclass(slots=True)
class Holding:
    """root: the directory. run: the id of the run in it, known once one has begun. space: what is known of the room."""

    root: Path
    run: str = field(default="", init=False)
    space: Space = field(init=False)
    _lock: RunLock | None = field(default=None, init=False)
    _sightings: leases.Sightings = field(default_factory=leases.Sightings, init=False)

    def __post_init__(self) -> None:
        self.space = Space(self.root)

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

    # ---- still ours? ---------------------------------------------------------------------

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
