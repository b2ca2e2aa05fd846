"""Something happens to a process at its n-th call that changes the disk: a signal, or a stop until somebody goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lastgood.format.tensors import Tensor
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo.read import records
from lastgood.repo.staging import Staging

CALLS = ("open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")
EVERY = bool(os.environ.get("EVERY_POINT"))
"""Every moment instead of a choice of them."""


SIGNALS = {
    "TERM": ((signal.SIGTERM,), {0, 75}),
    "TERM TERM": ((signal.SIGTERM, signal.SIGTERM), {0, 75}),  # within a second: one request
    "INT": ((signal.SIGINT,), {130, 1}),
    "INT INT": ((signal.SIGINT, signal.SIGINT), {130, 1}),
    "TERM INT": ((signal.SIGTERM, signal.SIGINT), {130, 1}),
    "TERM KILL": ((signal.SIGTERM, signal.SIGKILL), {-signal.SIGKILL}),
    "HUP": ((signal.SIGHUP,), {-signal.SIGHUP}),
    "QUIT, ignored": ((signal.SIGQUIT,), {0}),
    "USR2": ((signal.SIGUSR2,), {0, 75}),
    "KILL": ((signal.SIGKILL,), {-signal.SIGKILL}),
}
"""Name -> what is sent, and how a training that hears it may end."""


@contextmanager
def counted(act: Callable[[int, str], None]) -> Iterator[None]:
    """Before each such call of this process: `act` with its number, from 1 on, and what it is about to do."""
    owner, count = os.getpid(), [0]
    originals = {name: getattr(os, name) for name in CALLS}

    def wrap(name: str) -> Callable[..., Any]:
        original = originals[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if os.getpid() == owner and not (name == "open" and not args[1] & os.O_CREAT):
                count[0] += 1
                act(count[0], f"{name} {args[0]}")
            return original(*args, **kwargs)

        return call

    try:
        for name in CALLS:
            setattr(os, name, wrap(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def signalled(point: int, *numbers: int) -> Any:
    """These signals to this process at its `point`-th call."""

    def act(number: int, what: str) -> None:
        if number == point:
            print(f"\nat {what}", flush=True)  # behind a progress bar that has no end of line
            for one in numbers:
                os.kill(os.getpid(), one)

    return counted(act)


def points(last: int, step: int, first: int = 1) -> range:
    """Which ones are tried."""
    return range(first, last + 1, 1 if EVERY else step)


def stage(value: int) -> Callable[[Staging], None]:
    """A small checkpoint whose content tells its value."""

    def write(staging: Staging) -> None:
        content = bytes([value % 251]) * 512
        staging.tensors("model.safetensors", "model", [Tensor("w", "U8", (512,), memoryview(content))])
        staging.tensors("optimizer.safetensors", "optimizer", [Tensor("m", "U8", (512,), memoryview(content))])
        staging.data("resume.json", "progress", b"{}")
        (Path(staging.path) / "config.json").write_text("{}")
        staging.adopt("model")

    return write


def manager(root: Path, step: int | None = None, *, takeover: bool = False, **keep: Any) -> Manager:
    """The writer of a run; it goes on from its newest checkpoint, or that of `step`."""
    made = Manager(root=root, keep=Keep(**keep), on_error="raise")
    made.open(takeover=takeover)
    there = [r for r in records(root) if r.ours and r.state == "full" and r.current and step in (None, r.step)]
    if there:
        made.begin_from(there[-1])
    else:
        made.begin_fresh()
    return made


def save(made: Manager, step: int, write: Callable[[Staging], None] | None = None) -> Record | None:
    """Save and prune."""
    record = made.save(step, write or stage(step), estimate=1, environment={}, arguments={}, facts={})
    made.retain()
    return record


def prepared(root: Path) -> None:
    """A run with the checkpoints 1, 2 and 3, the first one with metrics."""
    made = manager(root)
    for step in (1, 2, 3):
        save(made, step)
        made.record(step, {"eval_loss": 1.0})
    made.close()


def stopped(pid: int) -> int | None:
    """Wait until a child was stopped or ended; its exit status if it ended."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def end(pid: int) -> None:
    """Whatever it is doing."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return
