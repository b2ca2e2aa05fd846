"""The processes of a command: ended with the supervisor, and seen as ended."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_CHILD_SUBREAPER = 36

# Ends the command if the supervisor is killed: a process that lives as long as one end of a pipe is open.
# PR_SET_PDEATHSIG would reach the launched process alone: `accelerate launch` or a shell script would
# die of it and leave the training running. It would also need code between fork and exec, where a lock
# that another thread held at the fork is held for ever. Lines: the group that runs, 0 for none,
# negative if it has got its SIGTERM (a second one ends a managed training before it has saved).
GUARD = """
import os, signal, sys, time
for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
group = 0
for line in sys.stdin.buffer:
    group = int(line)
try:
    if group > 0:
        os.killpg(group, signal.SIGTERM)
    end = time.monotonic() + float(sys.argv[1])
    while group and time.monotonic() < end:
        os.killpg(abs(group), 0)
        time.sleep(0.05)
    if group:
        os.killpg(abs(group), signal.SIGKILL)
except OSError:
    pass
"""


def alive(group: int) -> bool:
    """Does the group have a process? Those that ended and are ours by now are reaped."""
    with suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def children() -> set[int]:
    """Our child processes; those of the command that lost their parent are among them. Empty where nothing tells."""
    found = set()
    with suppress(OSError):
        for task in os.listdir("/proc/self/task"):
            with suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
                found |= set(map(int, file.read().split()))
    return found


def gone(child: int) -> bool:
    """Whether this child of ours has ended; reaps it."""
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def subreaper(on: bool) -> None:
    # In a container the first process often reaps nobody: ended orphans would look alive for ever.
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, int(on), 0, 0, 0)
