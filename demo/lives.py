"""How a life of a training is launched: as anybody would start it, or as a fork that has its imports already."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from demo.doors import live


def command(door: str, out: Path, steps: int) -> subprocess.Popen[bytes]:
    """A process of its own; its output goes to OUT.log."""
    out.parent.mkdir(parents=True, exist_ok=True)
    call = [sys.executable, "-m", "demo.doors", door, str(out), "--steps", str(steps)]
    with out.with_name(f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT)


class Forked:
    """A child of this process, which has to have no threads; its output goes to OUT.log."""

    def __init__(self, door: str, out: Path, steps: int) -> None:
        self._status: int | None = None
        out.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(door, out, steps)

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it lives."""
        if self._status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if done else None
        return self._status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _child(door: str, out: Path, steps: int) -> None:
    status = 1
    try:
        handle = os.open(out.with_name(f"{out.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        if "accelerate.state" in sys.modules:  # a life of its own: nothing of whoever started it
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        live(door, out, steps)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def imports() -> None:
    """What the doors need, so that no fork has to import it."""
    import accelerate  # noqa: F401
    from tqdm import tqdm
    from transformers import GPT2LMHeadModel, Trainer  # noqa: F401

    from demo.doors import DOORS

    if "lightning" in DOORS:
        import lightning.pytorch  # noqa: F401
    # A progress bar is drawn under a lock that forked processes share: one that is killed meanwhile would hold up all
    # of the others for ever.
    tqdm.set_lock(threading.RLock())
