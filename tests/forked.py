"""Run a function in a real child process that can be killed, without paying for the imports again."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start(function: Callable[..., Any], *args: Any, log: Path, **kwargs: Any) -> int:
    """Fork; the child runs `function`, its output goes to `log`; returns the child's pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logging.getLogger().handlers.clear()  # those of the test runner
        # Nor its garbage: an interrupt that comes while Python finalises something is dropped.
        gc.callbacks.clear()
        gc.freeze()
        sys.unraisablehook = sys.__unraisablehook__
        function(*args, **kwargs)
        status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 1
        print(leave)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int, timeout: float = 120.0) -> int:
    """Exit status of the child, or minus the signal that ended it. A child that hangs is killed and fails the test."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"child {pid} did not end within {timeout} s")


def run(function: Callable[..., Any], *args: Any, log: Path, timeout: float = 120.0, **kwargs: Any) -> int:
    """start and wait."""
    return wait(start(function, *args, log=log, **kwargs), timeout)
