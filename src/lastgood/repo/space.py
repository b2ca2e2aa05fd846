"""What a run knows of the room for its saves: what the last one took, what the next one needs, and the wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lastgood.errors import NotEnoughSpace
from lastgood.model import FORMAT, Manifest, Record, Span, checkpoint_name
from lastgood.policy import Keep
from lastgood.repo import free, journal, leases, poison, reserve
from lastgood.repo.layout import plain
from lastgood.repo.staging import Staging
from lastgood.room import SPARE, UNCOUNTED, Amount, needed, taken
from lastgood.units import size

OnFull = Literal["warn", "wait", "stop"]


@dataclass(slots=True)
class Space:
    """on_full: what becomes of a save that finds no room; None: what becomes of one that fails for another reason.

    leaving: asked while a save waits for room, which ends when it says something. lack: of the last save, where
    training is to stop for it. missed: saves in a row that found no room; left: the step of the last of them.
    patient: False once nothing is to wait any more, because the process is leaving. root: as its writer spells it.
    """

    root: Path
    on_full: OnFull | None = None
    leaving: Callable[[], object] = bool
    lack: NotEnoughSpace | None = None
    missed: int = 0
    left: int = -1
    patient: bool = True
    _last: Amount = field(default_factory=Amount)
    _own: bool = False  # the last save is of this process

    def begin(self, last: Manifest | None) -> None:
        """A run begins, or goes on from a checkpoint."""
        self._last, self._own = Amount() if last is None else taken(last), False
        self._set_aside(free.free(self.root), Amount())

    def saved(self, manifest: Manifest) -> None:
        """A save is there."""
        self._last, self._own = taken(manifest), True
        self.lack, self.missed = None, 0

    def prepare(
        self,
        estimate: int,
        step: int,
        *,
        keep: Keep,
        run: str,
        lineage: tuple[Span, ...],
        facts: Mapping[str, object],
        sightings: leases.Sightings,
    ) -> None:
        """Find or make room for a save of so many bytes. Raises NotEnoughSpace and OSError; then nothing is written.

        lineage: with the save that comes; facts: of it.
        """
        need = needed(estimate, self._last, own=self._own)
        space = free.free(self.root)
        if not space.covers(need + SPARE):
            coming = Manifest(
                format=FORMAT, id="coming", run=run, step=step, seq=lineage[-1][1], lineage=lineage,
                created=time.time(), facts=dict(facts),
            )  # fmt: skip
            name, sick = f"{checkpoint_name(step)}, under way", poison.reason(coming, {})
            record = Record(name=name, step=step, state="full", manifest=coming, poisoned=sick)
            space = free.make_room(self.root, need + SPARE, record, keep, run, sightings)
        if not space.covers(need + SPARE):
            files = "enough" if space.files == UNCOUNTED else str(space.files)
            if space.files < need.files + SPARE.files:
                files += f" of {need.files + SPARE.files}"
            raise NotEnoughSpace(
                f"a save needs {size(need.bytes)} and {size(SPARE.bytes)} in reserve, {plain(self.root)} has"
                f" {size(space.bytes)} and {files} inodes left; nothing was written",
                hint="free space, or keep fewer checkpoints (save_total_limit, Keep(full=1))",
            )
        self._set_aside(space, need)

    def learn(self, staging: Staging) -> None:
        """This save found no room half-way: the next one needs at least what was written of it."""
        so_far = Amount(sum(entry.size for entry in staging.files.values()), len(staging.files))
        self._last = Amount(max(self._last.bytes, so_far.bytes), max(self._last.files, so_far.files))
        self._own = True

    def wait(self, estimate: int, step: int, lack: NotEnoughSpace, patience: free.Patience) -> bool:
        """Whether there is room for another try; False if that isn't waited for, or the wait was ended."""
        if self.on_full != "wait" or not self.patient:
            return False
        need = needed(estimate, self._last, own=self._own) + SPARE
        if patience.said is None:
            journal.append(self.root, "waits", step=step, error=lack.message)
        what = (
            f"NO ROOM for the checkpoint of step {step}: {lack.message}\n  training waits until {size(need.bytes)} are"
            " free (on_full='wait'), SIGTERM or Ctrl-C end the wait; earlier checkpoints are intact"
        )
        try:
            return patience.wait(self.root, need, what)
        except BaseException:
            self.patient = False  # Ctrl-C: what is saved on the way out must not wait again
            raise

    def left_out(self, step: int, lack: NotEnoughSpace) -> str:
        """Count a save that is left out; what is said of that."""
        self.missed, self.left = self.missed + 1, step
        self.lack = lack if self.on_full == "stop" else None
        goes = "the run stops for it" if self.on_full == "stop" else "training goes on"
        rule = f"on_full={self.on_full!r}" if self.on_full else "on_error='warn'"
        count = f"; {self.missed} saves in a row found no room" if self.missed > 1 else ""
        return f"{goes} ({rule}){count}"

    def _set_aside(self, space: Amount, need: Amount) -> None:
        """Make the reserve, where there is room for it beside a save and what that leaves free."""
        if space.covers(need + SPARE):
            reserve.make(self.root)
