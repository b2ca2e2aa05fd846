"""Whether to save after this step, and whether to leave then: triggers, signals, requests and the time limit in one.

What a training loop asks after every step; it costs a look at the clock, and once a second one into a directory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lastgood import deadline, triggers
from lastgood.deadline import SLURM, Deadline, Pace
from lastgood.interval import Choice
from lastgood.repo import journal, request
from lastgood.repo.request import Inbox
from lastgood.signals import Signals
from lastgood.talk import note, say
from lastgood.tempo import EVENT, Tempo, told
from lastgood.triggers import Last, Triggers

REQUESTS = {
    request.SAVE: "asked for by `lastgood save`",
    request.STOP: "asked for by `lastgood save --stop`",
}
"""Request -> the reason as it is told."""


@dataclass(slots=True)
class Occasions:
    """leave: why the process has to end after the save, "" while it goes on. by: signal, limit, request or space.

    active: between `begin` and the end of `listening`. wanted: somebody outside asked for the save that is due now, by
    a signal or a request: that one is never left out.
    """

    triggers: Triggers = field(default_factory=Triggers)
    signals: Signals = field(default_factory=Signals)
    pace: Pace = field(default_factory=Pace)
    tempo: Tempo = field(default_factory=Tempo)
    deadline: Deadline | None = None
    leave: str = ""
    by: str = ""
    active: bool = False
    wanted: bool = False
    _inbox: Inbox | None = None
    _root: Path = field(default_factory=Path)
    _step: int = 0
    _last: Last = field(default_factory=lambda: Last(0, time.monotonic()))
    _asked: tuple[str, ...] = ()
    _mark: float = 0.0
    _told: bool = False
    _said: bool = False

    def __post_init__(self) -> None:
        self.tempo.wanted = self.triggers.interval

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals count within."""
        self.leave, self.by, self._asked, self._inbox, self._told = "", "", (), None, False
        self.deadline = deadline.here(self.triggers.time_limit)
        try:
            with self.signals.listening():
                yield
        finally:
            self.active = False

    def begin(self, root: Path, step: int, epoch: float = 0.0) -> None:
        """Training begins after `step`, in this run. What was asked for before is dropped, with a word."""
        for name in request.drop_stale(root):
            say(f"a request from before this launch was dropped: {name}")
        self._inbox, self._root, self._step, self.active = Inbox(root), root, step, True
        self._mark = time.monotonic()
        self._last = Last(step, self._mark, epoch)
        history = journal.read(root) if self.deadline is not None or self.tempo.wanted is not None else []
        self._chosen(self.tempo.begin(history), before=True)
        if self.deadline is not None:  # a save may take minutes, and none of this process is known yet
            known = [event.get("seconds") for event in history if event.get("event") == "saved"]
            self.pace.saves.extend(float(value) for value in known[-5:] if isinstance(value, (int, float)))

    def look(self, step: int, epoch: float = 0.0, *, busy: bool = False) -> tuple[str, ...]:
        """The reasons to save now, after this step; () for none. `leave` may be set by it.

        busy: something of an earlier save is still being written.
        """
        now = time.monotonic()
        self.pace.steps.append(now - self._mark)
        self._chosen(self.tempo.stepped(now - self._mark, step - self._step, now, busy=busy))
        self._mark, self._step = now, step
        self.stopping(step)
        reasons = triggers.due(
            self.triggers, step=step, epoch=epoch, now=now, last=self._last,
            paced=self.tempo.due(step - self._last.step, now - self._last.time),
            asked=tuple(dict.fromkeys(self._asked)),
        )  # fmt: skip
        self.wanted = bool(self._asked)
        if reasons:
            self._asked = ()
        return reasons

    def ask(self, reason: str) -> None:
        """Save after the next step that is looked at, and don't leave it out. "": no reason."""
        self._asked += (reason,) if reason else ()

    def stopping(self, step: int) -> str:
        """Why the process has to leave, "" if it needn't: to be asked inside of what takes long, too."""
        now = time.monotonic()
        self._hear(self.signals.stop, "signal", self.signals.stop)
        self._asked += tuple(filter(None, [self.signals.taken()]))
        if self._inbox is not None:
            name = self._inbox.look(now, step)
            if name == request.STOP:
                self._hear(name, "request", REQUESTS[name])
            elif name:
                self._asked += (REQUESTS[name],)
        close = "" if self._told else self.pace.near(self.deadline, now)
        if close and self._theirs():
            # submitit and the like requeue the job by a signal: a process that left by itself would not come back.
            self._told, self._asked = True, (*self._asked, close)
        elif close:
            self._hear(close, "limit", close)
        return self.leave

    def saved(self, step: int, seconds: float, epoch: float = 0.0) -> None:
        """A save of this step was tried, and took so long. One that failed isn't tried again at every step."""
        self.pace.saves.append(seconds)
        self._mark = time.monotonic()
        self._last = Last(step, self._mark, epoch)

    def spent(self, seconds: float, *, busy: bool) -> None:
        """So long did training stand still for the save that was just made, its retention included."""
        self._mark = time.monotonic()
        self._chosen(self.tempo.spent(seconds, self._mark, busy=busy))

    def _chosen(self, choice: Choice | None, *, before: bool = False) -> None:
        """Another number of steps between saves is in force; the first of a process is said. before: by a measurement
        of an earlier process, which the journal has."""
        if choice is None:
            return
        tell, self._said = (note if self._said else say), True
        tell(f"saving every {choice.steps} steps (save_steps='auto'): {choice.reason}")
        if not before:
            journal.append(self._root, EVENT, step=self._step, **told(choice))

    def no_room(self, step: int) -> None:
        """The save of this step found no room, and the run is to stop for it (on_full="stop")."""
        if not self.leave:
            self.leave, self.by = f"no room for the checkpoint of step {step}", "space"

    def resumes(self) -> None:
        """What is no step is over (an evaluation, a log): the next one begins."""
        self._mark = time.monotonic()

    def parting(self, step: int) -> str:
        """What is said when the process leaves: stopped by SIGTERM at step 500."""
        how = f"stopped by {self.leave}" if self.by == "signal" else f"stopped ({self.leave})"
        return f"{how} at step {step}"

    def _hear(self, what: str, by: str, reason: str) -> None:
        if what and not self.leave:
            self.leave, self.by, self._asked = reason, by, (*self._asked, reason)

    def _theirs(self) -> bool:
        ours = self.deadline is None or SLURM not in self.deadline.source
        return not ours and "SIGUSR2" in self.signals.left
