"""Whatever may ask a loop for a checkpoint: its schedule, signals, `lastgood save`, the end of its time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lastgood import deadline, triggers
from lastgood.repo import request
from lastgood.signals import Signals
from lastgood.talk import say
from lastgood.triggers import Last, Triggers


class Asking:
    """One launch of a loop."""

    def __init__(self, root: Path, wanted: Triggers) -> None:
        self._root = root
        self._wanted = wanted
        self._signals = Signals()
        self._inbox = request.Inbox(root)
        self._pace = deadline.Pace()
        self._deadline: deadline.Deadline | None = None
        self._step, self._looked = 0, 0.0
        self.last = Last(0, 0.0)

    @contextmanager
    def listening(self, step: int, epoch: float) -> Iterator[None]:
        """While the loop runs; it begins behind this step. What was asked for before counts no more."""
        for name in request.drop_stale(self._root):
            say(f"{name} was asked for before this launch, when nothing was training: not done")
        self._deadline = deadline.here(self._wanted.time_limit)
        self._step, self._looked = step, time.monotonic()
        self.last = Last(step, self._looked, epoch)
        with self._signals.listening():
            yield

    def stepped(self, step: int, epoch: float) -> tuple[str, tuple[str, ...]]:
        """A step is complete: (why to leave after a save, "" to go on; the reasons to save now)."""
        now = time.monotonic()
        if step > self._step:
            self._pace.steps.append((now - self._looked) / (step - self._step))
        self._step, self._looked = step, now
        wanted = self._inbox.look(now, step)
        leave = self.leave() or (f"asked for by {wanted}" if wanted == request.STOP else "")
        saving = self._signals.taken(), f"asked for by {wanted}" if wanted else ""
        asked = [leave] if leave else [text for text in saving if text]
        return leave, triggers.due(self._wanted, step=step, now=now, last=self.last, epoch=epoch, asked=asked)

    def leave(self) -> str:
        """Why to save and leave; "" to go on."""
        return self._signals.stop or self._pace.near(self._deadline, time.monotonic())

    def saved(self, step: int, epoch: float, seconds: float) -> None:
        """A checkpoint of this step was committed; it took so long."""
        self._pace.saves.append(seconds)
        self.last = Last(step, time.monotonic(), epoch)
