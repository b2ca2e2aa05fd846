"""Something happens to a process at its n-th call that changes the disk: a signal, or a stop until somebody goes on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lastgood.format.tensors import Tensor
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo import verify
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from lastgood.repo.staging import Staging

import forked

Life = Callable[..., None]
"""(root, *signals, point=) -> trains to its end, and writes into `end` beside root what came out."""

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


def struck(life: Life, root: Path, name: str, point: int) -> None:
    """A life that gets these signals at its `point`-th call, with Ctrl-C as in a terminal."""
    if "ignored" in name:
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        life(root, *SIGNALS[name][0], point=point)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def survived(life: Life, name: str, some: Iterable[int], place: Path, expected: str) -> int:
    """At how many of these points the signals of this name hit a life in `place`/run, until there are no more of them.

    It ended as documented each time, every checkpoint was whole, and the same command ended with `expected` in `end`.
    """
    root, log, end, hit = place / "run", place / "log", place / "end", 0
    for point in some:
        shutil.rmtree(root, ignore_errors=True)
        log.unlink(missing_ok=True)
        end.unlink(missing_ok=True)
        status = forked.run(struck, life, root, name, point, log=log)
        said = f"\n{log.read_text()}"
        before, at, _ = said.partition("\nat ")
        if not at:
            break
        hit += 1
        allowed = SIGNALS[name][1]
        if "training" not in before or "leaving" in before:  # nobody listens, as in any program
            allowed = {*allowed, *(-number for number in SIGNALS[name][0])}
        assert status in allowed, f"{status}: {said}"
        sound(root, said)
        if status == 75:
            assert "stopped by SIG" in said
            assert records(root), "it says that it saved"
        if status:
            assert forked.run(life, root, log=log) == 0, log.read_text()
        assert end.read_text() == expected, said
        assert os.listdir(root / HIDDEN / "tmp") == []
    return hit


def sound(root: Path, said: str) -> None:
    """Every checkpoint that is there is whole."""
    found = records(root) if root.exists() else ()
    assert all(verify.problems(root, record, full=True) == () for record in found), said
    assert not [record for record in found if record.state == "incomplete"], said


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
