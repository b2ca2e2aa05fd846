"""Several things that are done at the same time, by the caller and a few threads that help."""

from __future__ import annotations

import _thread
from collections import deque
from collections.abc import Callable, Sequence

from lastgood.store import fs


def together(acts: Sequence[Callable[[], object]], *, limit: int) -> None:
    """Do all of them, at most `limit` at the same time, beginning in their order.

    Behind one that fails nothing new is begun; what is under way is waited for, and then the first of those errors is
    raised. Where calls are counted (`fs.system.workers`) one is done after the other, in the caller's thread.
    """
    waiting = deque(enumerate(acts))
    failed: dict[int, BaseException] = {}

    def work() -> None:
        while not failed:
            try:
                number, act = waiting.popleft()
            except IndexError:
                return
            try:
                act()
            except BaseException as error:
                failed[number] = error

    begun: list[Callable[[], object]] = []
    try:
        for _ in range(min(limit, len(acts)) - 1 if fs.system.workers > 1 else 0):
            try:
                begun.append(_helper(work))
            except RuntimeError:  # a limit of the container, or the interpreter is about to end: the caller does more
                break
        work()
        for joined in begun:
            joined()
    except BaseException as error:  # an interruption
        failed[-1] = error
        for joined in begun:
            joined()
    if failed:
        first = failed[min(failed)]
        failed.clear()
        try:
            raise first
        finally:
            del first  # or its frames, and the tensors in them, would be kept by it


def _helper(work: Callable[[], None]) -> Callable[[], object]:
    """A thread that does it; what is returned waits for its end. Raises RuntimeError where none can be had.

    A bare one, which no program waits for at its end because a disk hangs, and which on Linux has the priority of its
    caller. `Thread.start` waits until the thread runs: six of them took so long that the last fsyncs missed the commit
    of the file system's journal that the first had asked for, and waited for a second one, 7 ms instead of 3. And in
    it, in `Thread.join` and in an Event two interruptions that come one right behind the other become a RuntimeError
    about a lock, which would be taken for a save that failed, or for a limit of the system.
    """
    gate, over = _thread.allocate_lock(), list[bool]()
    gate.acquire()

    def run() -> None:
        try:
            work()
        finally:
            over.append(True)
            gate.release()

    def join() -> None:  # may be called again behind an interruption
        if not over:
            gate.acquire()

    _thread.start_new_thread(run, ())
    return join
