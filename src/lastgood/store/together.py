"""Several things that are done at the same time, by the caller and a few threads that help."""

from __future__ import annotations

import threading
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

    begun: list[threading.Thread] = []
    try:
        for _ in range(min(limit, len(acts)) - 1 if fs.system.workers > 1 else 0):
            # A daemon: no program hangs at its end because a disk does. On Linux it has the priority of its caller.
            helper = threading.Thread(target=work, name="lastgood-help", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # a limit of the container, or the interpreter is about to end: the caller does more
                break
            begun.append(helper)
        work()
        for helper in begun:
            helper.join()
    except BaseException as error:  # an interruption
        failed[-1] = error
        for helper in begun:
            helper.join()
    if failed:
        first = failed[min(failed)]
        failed.clear()
        try:
            raise first
        finally:
            del first  # or its frames, and the tensors in them, would be kept by it
