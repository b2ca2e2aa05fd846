"""Several things that are done at the same time, by the caller and a few threads that help."""

from __future__ import annotations

import _thread
import threading
from collections import deque
from collections.abc import Callable, Sequence

from lastgood.store import fs


def together(acts: Sequence[Callable[[], object]], *, limit: int, brief: bool = False) -> None:
    """Do all of them, at most `limit` at the same time, beginning in their order.

    brief: they do hardly more than ask the system once, so that it matters how soon the last one begins, see `_helper`.

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
                begun.append(_helper(work, brief))
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


def _helper(work: Callable[[], None], brief: bool) -> Callable[[], object]:
    """A thread that does it; what is returned waits for its end. Raises RuntimeError where none can be had.

    `Thread.start` waits until the thread runs. Six of them took so long that the last fsyncs missed the commit of the
    file system's journal that the first had asked for, and waited for a second one: 7 ms instead of 3. So what is brief
    has a bare one, and may not ask which thread it is in.
    """
    gate, over = _thread.allocate_lock(), list[bool]()
    gate.acquire()

    def run() -> None:
        try:
            work()
        finally:
            over.append(True)
            gate.release()

    def join() -> None:
        # Neither an Event nor Thread.join: an interruption of their wait, and a second one right behind it, become a
        # RuntimeError about a lock, which would be taken for a save that failed; or they return too early the next
        # time. This may be asked again after each of them.
        if not over:
            gate.acquire()

    if brief:
        _thread.start_new_thread(run, ())
    else:
        # A daemon: no program hangs at its end because a disk does. On Linux it has the priority of its caller.
        threading.Thread(target=run, name="lastgood-help", daemon=True).start()
    return join
