"""Signals that ask for a checkpoint. A handler sets a flag and nothing else; the training loop looks at the flags.

    SIGTERM   save at the next step and leave with status 75; a second one, later, ends the process at once
    SIGUSR2   save at the next step and leave with status 75: what submitit sends before the end, and a habit with
              Slurm's --signal=USR2@120
    SIGUSR1   save at the next step and go on

SIGUSR1 and SIGUSR2 are only taken where nobody has them: a program that handles one means something by it (submitit
requeues by SIGUSR2, faulthandler.register dumps stacks), and ignored ones stay ignored. SIGTERM is taken from whoever
has it while training; the handler that was there gets the second one, and comes back afterwards.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ECHO = 1.0
"""Seconds in which a second SIGTERM is the same request: a service manager signals the launcher and every process of
it, and the launcher passes its own on."""


class Signals:
    """stop: the signal that asked to save and leave, "" for none. saving: whether one asked to save and go on.

    left: names of those signals that the program handles itself.
    """

    def __init__(self) -> None:
        self.stop = ""
        self.saving = False
        self.since = 0.0
        self.terminated = False
        self.left: tuple[str, ...] = ()

    @property
    def terminated_at(self) -> float | None:
        """When SIGTERM came, by time.monotonic(); None if it didn't."""
        return self.since if self.terminated else None

    @property
    def requested(self) -> bool:
        """Whether one asked to leave."""
        return bool(self.stop)

    def taken(self) -> str:
        """The signal that asked to save and go on, once; "" if none did since the last time."""
        if not self.saving:
            return ""
        self.saving = False
        return "SIGUSR1"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while training; the handlers that were there before come back afterwards."""
        self.stop, self.saving, self.terminated, self.left = "", False, False, ()
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread alone
            return
        before: dict[int, Any] = {}
        owner = os.getpid()

        def note(number: int, frame: Any) -> None:
            term = number == signal.SIGTERM
            if os.getpid() == owner:
                if not term:
                    if number == getattr(signal, "SIGUSR1", None):
                        self.saving = True
                    else:
                        self.stop = self.stop or "SIGUSR2"
                    return
                if self.terminated and time.monotonic() - self.since < ECHO:
                    return
                if not self.terminated:
                    self.stop, self.terminated, self.since = self.stop or "SIGTERM", True, time.monotonic()
                    return
            # The second time; and a forked data worker must die as it always did.
            handler = before[number]
            signal.signal(number, handler if callable(handler) else signal.SIG_DFL)
            os.kill(os.getpid(), number)

        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
            number = getattr(signal, name, None)
            if number is None:  # Windows
                continue
            if name != "SIGTERM" and not _free(number):
                self.left = (*self.left, name)
                continue
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class Overheard:
    """When SIGTERM came to a program that handles it by itself; at: by time.monotonic(), None before."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._before: Any = None

    def begin(self) -> None:
        """Listen from now on; whoever handles the signal goes on to do so."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGTERM)
        if callable(before):
            self._before = before
            signal.signal(signal.SIGTERM, self._note)

    def end(self) -> None:
        """Listen no more; unless somebody else has taken the signal since."""
        if self._before is not None and signal.getsignal(signal.SIGTERM) == self._note:
            signal.signal(signal.SIGTERM, self._before)
        self._before = None

    def _note(self, number: int, frame: Any) -> None:
        self.at = time.monotonic() if self.at is None else self.at
        self._before(number, frame)


def _free(number: int) -> bool:
    """Whether a signal does what it does by default, also by handlers that Python knows nothing of."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
        return not int(caught.split()[1], 16) >> (number - 1) & 1
    except (OSError, StopIteration, ValueError, IndexError):
        return True
