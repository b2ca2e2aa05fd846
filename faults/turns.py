"""Processes that take turns: each stops before every call on files until it is let go, in an order drawn from a seed.

They are real processes, with real locks. But one alone is running at any moment, so the same seed gives the same
history again.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lastgood.errors import LastgoodError
from lastgood.store import fs
from lastgood.store.fs import AnyPath, FileSystem

LIMIT = 60.0
"""Seconds that a process may take between two calls: more than any needs on a busy machine."""

Actor = Callable[[], Any]
"""What a process does; it returns what JSON holds. A LastgoodError or a FileNotFoundError is an answer as well."""


class Turns(FileSystem):
    """Asks before each call that others could see, or that sees others."""

    workers = 1

    def __init__(self, ask: int, go: int, seed: str) -> None:
        self._ask, self._go, self._random = ask, go, random.Random(seed)

    def turn(self) -> None:
        """Wait for it. What a library does in threads of its own goes with the call around it."""
        if threading.current_thread() is threading.main_thread():
            os.write(self._ask, b".")
            if not os.read(self._go, 1):
                os._exit(9)  # who gives the turns is gone

    def open(self, path: AnyPath, flags: int, mode: int = 0o666) -> int:
        self.turn()
        return super().open(path, flags, mode)

    def write(self, handle: int, data: bytes | memoryview) -> int:
        self.turn()
        return super().write(handle, data)

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        self.turn()
        super().rename(source, target)

    def replace(self, source: AnyPath, target: AnyPath) -> None:
        self.turn()
        super().replace(source, target)

    def unlink(self, path: AnyPath) -> None:
        self.turn()
        super().unlink(path)

    def mkdir(self, path: AnyPath) -> None:
        self.turn()
        super().mkdir(path)

    def rmdir(self, path: AnyPath) -> None:
        self.turn()
        super().rmdir(path)

    def names(self, path: AnyPath) -> list[str]:
        self.turn()
        return super().names(path)

    def token(self, count: int) -> str:
        return self._random.randbytes(count).hex()


class Process:
    """One of those that take turns."""

    def __init__(self, actor: Actor, result: Path, seed: str, others: Sequence[Process]) -> None:
        self.result = result
        self._asked, ask = os.pipe()
        go, self._let = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(ask)
            os.close(go)
            return
        for handle in (self._asked, self._let, *(end for other in others for end in (other._asked, other._let))):
            os.close(handle)  # or nobody would notice that the one who gives the turns is gone
        _live(actor, result, Turns(ask, go, seed))

    def wait(self) -> bool:
        """Until it asks for its next turn; False if it ended."""
        if not select.select([self._asked], [], [], LIMIT)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"a process hangs for {LIMIT:g} s")
        return bool(os.read(self._asked, 1))

    def go(self) -> None:
        os.write(self._let, b".")

    def kill(self) -> None:
        """In the middle of what it does."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Any:
        """What it returned; None if it was killed. Raises AssertionError for an error that has no name."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._asked)
        os.close(self._let)
        if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
            return None
        told = json.loads(self.result.read_text())
        assert "unexpected" not in told, told["unexpected"]
        return told


def _live(actor: Actor, result: Path, disk: Turns) -> None:
    """In the child: never returns."""
    try:
        fs.system = disk
        time.sleep = lambda _: disk.turn()  # who waits for a lock lets the others go on
        disk.turn()
        try:
            told: dict[str, Any] = {"value": actor()}
        except (LastgoodError, FileNotFoundError) as error:
            told = {"error": getattr(error, "code", "gone"), "message": str(error)}
        except BaseException:
            told = {"unexpected": traceback.format_exc()}
        result.write_text(json.dumps(told))
    finally:
        os._exit(0)


def play(actors: Sequence[Actor], folder: Path, draw: random.Random, *, kills: bool = False) -> list[Any]:
    """Run them; what each returned: {"value": ...}, {"error": code}, or None for one that was killed.

    kills: one of them may be killed before a call of its own.
    """
    seed = draw.random()
    processes: list[Process] = []
    for number, actor in enumerate(actors):
        processes.append(Process(actor, folder / f"result-{number}", f"{seed}-{number}", processes))
    waiting = [process for process in processes if process.wait()]
    patience = draw.choice([0.0, 0.5, 0.9, 0.97])  # how probably the same one goes on: few changes find other bugs
    victim = draw.choice(processes) if kills else None
    after = draw.randrange(1, 120)
    current = None
    while waiting:
        if current not in waiting or draw.random() > patience:
            current = draw.choice(waiting)
        if current is victim:
            after -= 1
            if after == 0:
                current.kill()
                waiting.remove(current)
                os.waitid(os.P_PID, current.pid, os.WEXITED | os.WNOWAIT)  # its locks are free
                continue
        current.go()
        if not current.wait():
            waiting.remove(current)
    return [process.end() for process in processes]
