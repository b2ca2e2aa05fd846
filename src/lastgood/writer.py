"""The one thread that writes while training goes on: what it is given, in that order, one thing at a time. No torch."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from lastgood.talk import warn

NICE = 5
"""How much lower its priority is, and that of the threads that it starts (Linux): where training uses every core, the
writer takes what is left over."""
PATIENCE = 60.0
"""Seconds that the end of a process waits for the writer, and more for more bytes: a disk may hang for ever."""
IDLE = 30.0
"""Seconds without a job after which the thread ends: the next job makes another one."""
SLOWEST = 10_000_000
"""Bytes a second (10 MB/s): what is slower than that counts as a disk that hangs."""


class Writer:
    """No thread before the first job; none in a forked child, which has no business with its parent's jobs.

    What a job raised is handed out by `take`, once; jobs behind it are still done. `stop` ends the thread, until the
    next job.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._working = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._raised: list[BaseException] = []
        self._bytes = 0
        self._abandoned = False

    @property
    def mine(self) -> bool:
        """False in a forked child."""
        return os.getpid() == self._owner

    @property
    def busy(self) -> bool:
        """Whether anything is still to be done."""
        # In this order: what isn't waiting any more is being worked at, and says so before it is taken out.
        return self.mine and (bool(self._jobs) or self._working)

    @property
    def here(self) -> bool:
        """Whether it is the writer who asks."""
        return self._thread is not None and self._thread.ident == threading.get_ident()

    def submit(self, job: Callable[[], None], *, size: int = 0) -> None:
        """To be done behind all that was submitted before. size: bytes that it writes, for the patience at the end."""
        assert self.mine, "a forked child has no writer"
        with self._changed:
            self._jobs.append(job)
            self._bytes += size
            self._stopping = False
            running = self._thread is not None or self._started()
            self._changed.notify_all()
        while not running and self._jobs:
            self._do(self._jobs.popleft())

    def _started(self) -> bool:
        """Whether there is a thread: an interpreter that is ending starts none, nor does a system at its limit."""
        thread = threading.Thread(target=self._run, name="lastgood writer", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._thread = thread
        _living.add(self)
        return True

    def wait(self, seconds: float) -> bool:
        """Until all is done, for so long at most; whether it is. The writer itself is never waited for by itself."""
        if not self.busy or self.here:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._working and not self._jobs, seconds)

    def end(self, seconds: float | None = None) -> bool:
        """Wait with a limit; False if it was reached: what isn't done by then is given up, and not waited for again.

        seconds: there are no more than that.
        """
        patience = PATIENCE + self._bytes / SLOWEST
        if self.wait(patience if seconds is None else min(seconds, patience)):
            return True
        with self._changed:
            self._jobs.clear()
            self._abandoned = True
        return False

    def take(self) -> BaseException | None:
        """What a job raised, each once; None if nothing did."""
        return self._raised.pop(0) if self._raised else None

    def stop(self) -> None:
        """Let the thread end when all is done."""
        if not self.mine:  # who held the condition when it was forked holds it for ever
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _run(self) -> None:
        with suppress(AttributeError, OSError):  # of this thread alone, on Linux; elsewhere that can't be said
            if os.uname().sysname == "Linux":
                me = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + NICE))
        while True:
            with self._changed:
                while not self._jobs:
                    if self._stopping or not (self._changed.wait(IDLE) or self._jobs):
                        self._thread = None
                        return
                self._working = True
                job = self._jobs.popleft()
            self._do(job)
            del job  # what it holds may be large
            with self._changed:
                self._working = False
                if not self._jobs:
                    self._bytes = 0
                self._changed.notify_all()

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._raised.append(error)


_living: weakref.WeakSet[Writer] = weakref.WeakSet()


@atexit.register
def _drain() -> None:
    """A program that ends without close(): what is in memory still becomes a checkpoint."""
    for writer in list(_living):
        if not writer._abandoned and not writer.end():
            warn("the disk hangs: the save under way is given up, earlier checkpoints are intact")
        while (error := writer.take()) is not None:
            warn(f"NO CHECKPOINT: {error}\n  earlier ones are intact")
