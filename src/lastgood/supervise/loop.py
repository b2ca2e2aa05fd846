"""The loop: launch, watch, judge the end, wait, again."""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from lastgood.deadline import END
from lastgood.errors import LastgoodError, NotSupported, UsageError
from lastgood.grace import GRACE, find
from lastgood.supervise.command import PLACE, Launch, Limits, described, fill
from lastgood.supervise.processes import GUARD, alive, children, gone, subreaper
from lastgood.talk import say, warn

_USAGE_SECONDS = 5.0
_PREEMPTED = (75, 143, -15)
_FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


def supervise(
    command: Sequence[str],
    *,
    choose: Callable[[], Path | None],
    progress: Callable[[], int],
    tidy: Callable[[bool], None],
    limits: Limits,
    enough: Callable[[float], str] = lambda since: "",
    poll: float = 2.0,
    environment: Mapping[str, str] | None = None,
    output: IO[bytes] | None = None,
) -> int:
    """Launch `command` until it is done, can't go on or the supervisor is asked to stop; returns the exit status.

    choose: the verified checkpoint to resume from, None if there is none yet; asked before each launch.
    progress: the newest complete step, -1 without one.
    tidy: called now and then while the command runs (False), and after it ended (True).
    enough: why a command that was preempted isn't launched again; gets when it was launched, in seconds since 1970.
    environment: what the command finds in its own besides ours. output: where its stdout and stderr go; None: to ours.
    """
    if not command or PLACE in command[0]:
        raise UsageError("there is no command to run", hint="lastgood run -- python train.py ...")
    if os.name == "nt":
        raise NotSupported("Windows has no process groups that can be asked to stop")
    if threading.current_thread() is not threading.main_thread():
        raise NotSupported(
            "only the main thread can supervise a command, because signals arrive there",
            hint="call supervise() from the main thread, or use `lastgood run`",
        )
    end = {} if limits.seconds is None else {END: f"{time.time() + limits.seconds:.3f}"}
    told = {**end, **_grace(limits.grace), **(environment or {})}
    supervisor = _Supervisor(command, choose, progress, tidy, limits, enough, poll, told, output)
    with supervisor.listening(), supervisor.guarded():
        return supervisor.run()


def _grace(seconds: float) -> dict[str, str]:
    """What the command is told of it: that of whoever launched us, if it is shorter, because we end then as well."""
    outer, wrong = find(os.environ)
    if wrong:
        warn(wrong)
    least = seconds if outer is None else min(seconds, outer)
    return {GRACE: f"{least:g}" if least > 0 else ""}


@dataclass
class _Supervisor:
    command: Sequence[str]
    choose: Callable[[], Path | None]
    progress: Callable[[], int]
    tidy: Callable[[bool], None]
    limits: Limits
    enough: Callable[[float], str]
    poll: float
    environment: Mapping[str, str]
    output: IO[bytes] | None
    launches: list[Launch] = field(default_factory=list)
    newest: int = -1
    group: int = 0  # of the command that runs
    stop: int = 0  # the signal that asked to stop
    deadline: float = math.inf  # then the command is killed
    end: float = math.inf  # then it is asked to stop: its time is over
    hangup: bool = False
    interrupts: int = 0
    warned: set[str] = field(default_factory=set)
    wake: int = -1
    woken: int = -1
    guard: int = -1
    others: set[int] = field(default_factory=set)  # children of ours that aren't of the command

    # Signals

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Our handlers, and orphans of the command become our children, so that none stays a zombie unseen."""
        self.woken, self.wake = os.pipe()
        os.set_blocking(self.wake, False)
        before = {}
        try:
            for name in (*_FORWARDED, "SIGCHLD"):
                number = getattr(signal, name)
                # What is ignored (nohup) stays so, here and in the command.
                if name == "SIGCHLD" or signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._note)
            subreaper(True)
            yield
        finally:
            subreaper(False)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            os.close(self.wake)
            os.close(self.woken)

    def _note(self, number: int, frame: FrameType | None) -> None:
        with suppress(BlockingIOError):  # full: it wakes as it is
            os.write(self.wake, b".")
        if number == signal.SIGCHLD:
            return
        self.hangup = self.hangup or number == signal.SIGHUP
        self.interrupts += number == signal.SIGINT
        if number in (signal.SIGTERM, signal.SIGINT) or (number == signal.SIGHUP and not self.group):
            self.stop = self.stop or number
            self.deadline = min(self.deadline, time.monotonic() + self.limits.grace)
        if self.group:
            self._forward(signal.SIGKILL if number == signal.SIGINT and self.interrupts > 1 else number)

    def _forward(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._tell_guard(-self.group)
        # The number of a group can't be given away while one of its processes exists.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)

    def _sleep(self, seconds: float) -> None:
        """Until a signal comes, at most so long."""
        if select.select([self.woken], [], [], max(0.0, seconds))[0]:
            os.read(self.woken, 4096)

    # The process that outlives a killed supervisor

    @contextmanager
    def guarded(self) -> Iterator[None]:
        line = [sys.executable, "-I", "-S", "-c", GUARD, str(self.limits.grace)]
        nothing = subprocess.DEVNULL
        with subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, start_new_session=True, bufsize=0
        ) as process:
            assert process.stdin is not None
            self.guard = process.stdin.fileno()
            yield

    def _tell_guard(self, group: int) -> None:
        with suppress(OSError):  # it was killed: the supervision goes on without
            os.write(self.guard, b"%d\n" % group)

    # Launches

    def run(self) -> int:
        crashes = preemptions = 0
        if self.limits.seconds is not None:
            self.end = time.monotonic() + max(0.0, self.limits.seconds - self.limits.grace)
        self.newest = self._look()
        while True:
            if time.monotonic() >= self.end:
                return self._over("the time limit is over", 75)
            checkpoint = None if self.stop else self.choose()
            if self.stop:
                return self._stopped(None)
            started, wall = self.newest, time.time()
            status, seconds = self._launch(checkpoint)
            self.newest = max(started, self._look())
            reason = self._reason(status, seconds, self.newest > started)
            self.launches.append(Launch(len(self.launches) + 1, checkpoint, status, seconds, reason))
            ended = f"{'' if status < 0 else 'ended with '}{described(status)} after {seconds:.0f} s"
            if self.newest > started:
                crashes = 0
            if reason == "stopped":
                return self._stopped(status)
            if reason == "done":
                return self._over(f"done after {seconds:.0f} s", 0)
            if reason == "usage":
                warn(f"{ended}: the command line seems to be wrong, not tried again")
                return status
            if reason == "not executable":
                why = "not found" if status == 127 else "not executable"
                warn(f"{ended}: {self.command[0]}, or a command that it runs, is {why}; not tried again")
                return status
            if reason == "preempted":
                if why := self.enough(wall):
                    return self._over(f"{ended}: {why}", status)
                preemptions += 1
                if self.limits.preemptions is not None and preemptions > self.limits.preemptions:
                    return self._over(f"{ended}: preempted {preemptions} times, no more restarts", status)
                say(f"{ended}: preempted; again at once")
                continue
            crashes += self.newest == started
            if self.newest == started and crashes > self.limits.restarts:
                return self._over(f"{ended}: crash {crashes} in a row without progress, no more restarts", status)
            delay = min(self.limits.backoff * 2.0 ** min(max(0, crashes - 1), 60), self.limits.backoff_max)
            row = f"crash {crashes} of {self.limits.restarts} without progress" if crashes else f"step {self.newest}"
            warn(f"{ended} ({row}); again in {delay:g} s")
            until = time.monotonic() + delay
            while not self.stop and (left := until - time.monotonic()) > 0:
                self._sleep(left)

    def _reason(self, status: int, seconds: float, progressed: bool) -> str:
        if self.stop:
            return "stopped"
        if self.hangup and status in (-signal.SIGHUP, 128 + signal.SIGHUP):
            self.stop = signal.SIGHUP  # the terminal is gone and the command went with it
            return "stopped"
        if status == 0:
            return "done"
        if status in _PREEMPTED:
            return "preempted"
        if status in (126, 127):
            return "not executable"
        if status == 2 and not self.launches and not progressed and seconds < _USAGE_SECONDS:
            return "usage"
        return "crash"

    def _launch(self, checkpoint: Path | None) -> tuple[int, float]:
        """Status and seconds of one try."""
        restarts = len(self.launches)
        environment = {
            **os.environ,
            "LASTGOOD_RESUME": os.fspath(checkpoint) if checkpoint else "",
            "LASTGOOD_RESTARTS": str(restarts),
            **self.environment,
        }
        say(f"launch {restarts + 1} from {checkpoint.name if checkpoint else 'the beginning'}")
        begin, self.others = time.monotonic(), children()
        try:
            child = subprocess.Popen(
                fill(self.command, checkpoint),
                env=environment,
                stdin=None if os.isatty(0) else subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                start_new_session=True,
            )
        except OSError as error:
            warn(f"{self.command[0]} can't be launched: {error.strerror}")
            return 127 if isinstance(error, FileNotFoundError) else 126, 0.0
        # A stop that came during the launch is passed on now; one that comes from here on by the handler.
        signals = {getattr(signal, name) for name in _FORWARDED}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self.group = child.pid
        self._tell_guard(self.group)
        if self.stop:
            self._forward(self.stop)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            status = self._watch(child)
        except BaseException:
            self._clear()
            child.wait()
            raise
        seconds = time.monotonic() - begin
        if status != 0 or self.stop:  # a command that succeeded may leave something running on purpose
            self._clear()
        self.group = 0
        self._tell_guard(0)
        self._try_tidy(True)
        return status, seconds

    def _watch(self, child: subprocess.Popen[bytes]) -> int:
        """Wait for the end of the command."""
        due = time.monotonic() + 5 * self.poll
        while (status := child.poll()) is None:
            now = time.monotonic()
            if now >= self.end and not self.stop:
                say("the time limit is near: asked to stop")
                self._note(signal.SIGTERM, None)
            elif now >= self.deadline:
                warn(f"still running {self.limits.grace:g} s after the request to stop: killed")
                self._forward(signal.SIGKILL)
                self.deadline = math.inf
            elif now >= due and not self.stop:  # while stopping, nothing may delay the deadline
                self._try_tidy(False)
                due = time.monotonic() + 5 * self.poll
            else:
                soon = self.deadline if self.stop else min(self.deadline, self.end, due)
                self._sleep(min(self.poll, max(0.0, soon - now)))
        return status

    def _clear(self) -> None:
        """End what the command left running: it would write beside the next launch and hold its memory."""
        told = bool(self.stop)  # with the rest of the group; it may be saving
        end = min(self.deadline, time.monotonic() + self.limits.grace)
        killed = False
        asked: set[int] = set()  # processes that left the group: workers with sessions of their own, daemons
        while (group := alive(self.group)) or self._strays():
            now = time.monotonic()
            strays = set() if group else self._strays()
            for stray in strays if killed else strays - asked:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(stray, signal.SIGKILL if killed else signal.SIGTERM)
            asked |= strays
            if not told:
                self._forward(signal.SIGTERM)
                told = True
            elif now >= end and not killed:
                self._forward(signal.SIGKILL)
                killed = True
            elif now >= end + 5:
                warn(f"processes of group {self.group} can't be killed")
                return
            self._sleep(0.02)

    def _strays(self) -> set[int]:
        return {child for child in children() - self.others - {self.group} if not gone(child)}

    def _look(self) -> int:
        try:
            return self.progress()
        except (LastgoodError, OSError) as error:
            self._warn_once(f"the newest step can't be read: {error}")
            return self.newest

    def _try_tidy(self, ended: bool) -> None:
        try:
            self.tidy(ended)
        except (LastgoodError, OSError) as error:
            self._warn_once(f"tidying up failed: {error}")

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warn(message)

    def _stopped(self, status: int | None) -> int:
        name = signal.Signals(self.stop).name
        end = "" if status is None else f"; the command ended with {described(status)}"
        return self._over(f"stopped by {name}{end}", 75 if status == 75 else 128 + self.stop)

    def _over(self, message: str, status: int) -> int:
        """The last words: what happened, and the launches if there were several."""
        (say if status == 0 else warn)(message)
        if len(self.launches) > 1:
            say(f"{len(self.launches)} launches, newest step {self.newest}; the last ones:")
            for launch in self.launches[-10:]:
                say(f"  {launch}")
        return status if status >= 0 else 128 - status
