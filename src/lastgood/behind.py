"""A run that is written to behind training's back: what is under way, what waits for it, and its end. No torch.

Whoever asks what is on the disk is made to wait until all that was handed over is there: nobody sees a half-way state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lastgood import parting
from lastgood.background import Background
from lastgood.garbage import uncollected
from lastgood.grace import Grace
from lastgood.holding import Holding
from lastgood.model import Record, Span
from lastgood.repo import journal
from lastgood.repo.draft import Blank, Changed, Eager, Window, draft
from lastgood.repo.lock import RunLock
from lastgood.repo.read import records
from lastgood.repo.staging import Ordered, Staging, as_they_come, open_staging
from lastgood.store import direct, local
from lastgood.store.dissolve import dissolve
from lastgood.store.memory import Arena, Pin, Short
from lastgood.talk import say, warn
from lastgood.units import size
from lastgood.writer import Writer

REHEARSED = 64 << 20
"""Bytes (64 MiB) up to which a state is copied in a rehearsal, too: that takes some ten milliseconds."""

SPENT = ("stall", "copy", "hash", "write", "sync")
"""What the journal says of a save, in seconds (FORMAT.md)."""


class Failed(Exception):
    """A save of the writer's came to nothing: `error` says why."""

    def __init__(self, step: int, error: BaseException) -> None:
        super().__init__(f"step {step}: {error}")
        self.step, self.error = step, error


@dataclass(slots=True)
class Save:
    """One save on its way. started: by time.perf_counter; stall, copy: seconds that training stood still, and that of
    it the copy took; waited: for which it stood still later, until the rest was copied. door, lock: of the writer when
    it was made, for what happens after a close.
    """

    step: int
    started: float
    environment: dict[str, str]
    arguments: dict[str, object]
    facts: dict[str, object]
    seq: int = 0
    lineage: tuple[Span, ...] = ()
    door: Path = field(default_factory=Path)
    lock: RunLock | None = None
    stall: float = 0.0
    waited: float = 0.0
    copy: float = 0.0


@dataclass(slots=True)
class Behind(Holding):
    """background: None for a run whose saves are written before training goes on.

    at_once: as stages, of saves before which nothing may change. pin: where memory for copies comes from, see Arena.
    ordered: of files that are written before training goes on, see Staging.
    stages: makes the Window of each save. grace: of a SIGTERM, as a budget; whoever trains sets its `since`.
    owed: why a save is due at the end of the next step, "" if none is. saved: what this process saved, by step; one
    that is under way is in it already, without its files. took: seconds from the beginning of the last save until it
    was committed.
    """

    background: Background | None = field(default=None, kw_only=True)
    stages: Callable[[], Window] = field(default=Eager, kw_only=True)
    at_once: Callable[[], Window] = field(default=Eager, kw_only=True)
    pin: Pin | None = field(default=None, kw_only=True)
    ordered: Ordered = field(default=as_they_come, kw_only=True)
    grace: Grace = field(default_factory=Grace, init=False)
    owed: str = field(default="", init=False)
    saved: dict[int, Record] = field(default_factory=dict, kw_only=True)
    took: float = field(default=0.0, init=False)
    _under_way: int | None = field(default=None, init=False)  # step
    _hurry: bool = field(default=False, init=False)  # nothing is to be waited for any more
    _awaited: bool = field(default=False, init=False)  # somebody waits for the writer
    _writer: Writer = field(default_factory=Writer, init=False)
    _arena: Arena = field(default_factory=Arena, init=False)
    _window: Window = field(default_factory=Eager, init=False)  # of the last save
    _announced: bool = field(default=False, init=False)
    _warm: Literal["", "under way", "rehearsed"] = field(default="", init=False)

    def open(self, *, takeover: bool = False) -> None:
        """Become the only writer, with a thread of this process; see `Holding.open`."""
        self._writer, self._arena = Writer(), Arena(pin=self.pin)
        self._hurry, self._awaited, self._warm = False, False, ""
        self.grace.seconds, self.grace.refused = parting.known(), -1
        Holding.open(self, takeover=takeover)

    def warm(
        self,
        estimate: Callable[[], int],
        also: Callable[[], object] = bool,
        write: Callable[[Staging], None] | None = None,
    ) -> None:
        """Have ready what all saves use, so that the first one needn't wait for it: the memory, while training goes on;
        then what is known of a model as soon as a save was staged.

        To be called behind every step: in the first one optimizers get their state. estimate: gives the bytes of a
        save. also: what else the first save would do once. write: what it would stage.
        """
        if self._warm == "rehearsed" or self._lock is None or not self._writer.mine:
            return
        if not self._warm:
            self._warm = "under way"
            self._get_memory(estimate(), also)
        elif write is None or self.background is None or self.saved:
            self._warm = "rehearsed"
        elif not self._writer.busy:
            self._warm = "rehearsed"
            self._rehearse(write, estimate())

    def _get_memory(self, count: int, also: Callable[[], object]) -> None:
        background = self.background

        def job() -> None:
            with suppress(OSError):  # a lack of memory here is no save that failed: the save itself says so
                direct.ready(count)
            also()
            if background is not None:  # behind what is done soon: a first save that comes early doesn't wait for it
                self._arena.budget = background.budget
                with suppress(Short):
                    self._arena.ready(count, until=lambda: self._awaited)

        if count >= direct.LARGE or background is not None:
            self._writer.submit(job)

    def _rehearse(self, write: Callable[[Staging], None], count: int) -> None:
        """Have staged what nobody commits. Of a large state the tensors are left out: to copy them takes too long."""
        whole = count <= REHEARSED and self.pin is None
        with suppress(Exception):  # the first save says it
            arena, window = (self._arena, self.stages()) if whole else (Arena(), Blank())
            staging = draft(open_staging(self.root), arena, window)
            try:
                with uncollected():
                    write(staging)
            finally:
                staging.discard()

    @property
    def busy(self) -> bool:
        """Whether something is still being written, recorded or deleted in the background."""
        return self.background is not None and self._writer.busy

    def then(self, step: int, act: Callable[[Record], None]) -> None:
        """Do it with the checkpoint that was saved at `step`, behind what is under way; not if there is none."""

        def job() -> None:
            record = self.saved.get(step)
            if record is not None:
                act(record)

        self.later(job)

    def later(self, job: Callable[[], object]) -> None:
        """Do it behind what is under way, or now if nothing can be."""
        if not self._then(job):
            job()

    def _then(self, job: Callable[[], object]) -> bool:
        """Whether it is to be done by the writer; then it was handed over."""
        if self._writer.here or not self._writer.mine or self.background is None:
            return False
        lock = self._lock

        def unless_closed() -> None:
            if self._lock is lock:
                job()

        self._writer.submit(unless_closed)
        return True

    def records(self) -> tuple[Record, ...]:
        """The checkpoints of the directory as they are now. Raises Unreadable if the system can't look just now."""
        self._drained()
        return records(self.root, sure=True)

    def seen(self) -> tuple[Record, ...]:
        """The same for what no resume and no deletion rests on: what can't be read just now must not end a training."""
        self._drained()
        return records(self.root)

    def _drained(self) -> None:
        """Wait until all that was handed over is done; what is waiting for room gives up when training has to leave.

        Not longer than the grace of a SIGTERM lasts: behind it nothing is saved any more, see `Manager.save`.
        """
        if self._writer.here:
            return
        self._awaited = True
        self._window.finish()
        while not (self._writer.wait(0.0 if self.grace.over else 0.1) or self.grace.over):
            self._hurry = self._hurry or not self.space.patient or bool(self.space.leaving())
        self._awaited = False

    def _dissolve(self, graves: Sequence[Path]) -> None:
        """Give back the room of what retention put out of sight, behind training's back, also where saves aren't.

        The next save waits for it. Where the process has to leave, the rest is swept at the next start.
        """
        lock = self._lock

        def job() -> None:
            try:
                for grave in graves:
                    if self._lock is lock:
                        dissolve(grave, hurry=lambda: self._awaited, over=lambda: self._hurry or self.grace.short)
            except OSError as error:
                self._unless_taken()
                warn(f"retention: {self._told(error)}; what is left of it goes at the next start")

        if graves and self._writer.mine:
            self._writer.submit(job, size=sum(local.size(path) or 0 for grave in graves for path in grave.rglob("*")))

    def _skips(self, step: int) -> bool:
        """Whether this save is left out because the last one is still under way."""
        if self.background is None or self.background.on_busy != "skip" or not self._writer.busy:
            return False
        last = self._under_way
        reason = f"the save of step {last} was still being written" if last is not None else "retention was under way"
        journal.append(self.door, "skipped", step=step, reason=reason)
        say(f"step {step} was not saved: {reason} (on_busy='skip')")
        return True

    def _spoilt(self, step: int, error: Changed) -> None:
        """The copy of a save was spoilt: from now on training waits for each copy, and the next step is saved."""
        self.stages, self.owed = self.at_once, f"the copy of step {step} was spoilt"
        journal.append(self.door, "failed", step=step, error=str(error))
        warn(
            f"step {step} was not saved: {error}. The next step is, and from now on training waits for the copies"
            " (background=lastgood.Background(lazy=False) does that from the start); earlier checkpoints are intact"
        )

    def _short(self, estimate: int) -> None:
        if not self._announced:
            self._announced = True
            warn(
                f"a copy of {size(estimate)} doesn't fit into memory: saves are written before training goes on"
                " (background needs as much again as a checkpoint has)"
            )
        self._arena.release()

    def _given_up(self, step: int | None) -> None:
        """The run is closed, and the writer isn't done. step: whose save it is at; None: it deletes, as the next start
        will."""
        if step is None:
            return
        if (late := self.grace.late()) is not None:
            parting.gives_up(self.grace, self.door, step, late)
            return
        warn(f"the disk of {self.root} hangs: the save of step {step} is given up, earlier checkpoints are intact")
        journal.append(self.door, "failed", step=step, error="still being written when the run was closed")

    def close(self, event: str = "closed", **facts: str) -> None:
        """Give the run back, when all is written. Safe to call twice. facts: for the journal, beside the event."""
        if self._lock is None:
            return
        self.space.patient, self._awaited = False, True
        self._window.finish()
        if not self._writer.end(self.grace.usable):
            self._given_up(self._under_way)
        while (raised := self._writer.take()) is not None:
            error = raised.error if isinstance(raised, Failed) else raised
            if not isinstance(error, Exception):
                raise error
            step = raised.step if isinstance(raised, Failed) else max(self.saved, default=0)
            journal.append(self.door, "failed", step=step, error=str(error))
            warn(f"NO CHECKPOINT at step {step}: {error}\n  earlier ones are intact")
        self._writer.stop()
        self._window, self.ordered = Eager(), as_they_come  # nothing of a model is kept any longer
        self._arena.release()
        Holding.close(self, event, **facts)
