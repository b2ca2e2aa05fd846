"""`lastgood save` and the file that any tool may touch: real processes that train while others ask."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import lastgood
from lastgood.repo import request
from lastgood.repo.request import PAUSE, Inbox
from test_signals import sent

import cli
import forked
from training import Case, train

LONG = Case("asked", args={"max_steps": 100_000, "save_strategy": "no"})


@contextmanager
def training(out: Path, case: Case = LONG) -> Iterator[int]:
    """A run that trains in a process of its own, and has begun."""
    log = out.parent / "log"
    pid = forked.start(train, case, out, out.parent / "r.json", log=log)
    try:
        end = time.monotonic() + 120
        while not (out / ".lastgood" / "trail.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.01)
        assert (out / ".lastgood" / "trail.jsonl").exists(), log.read_text()
        yield pid
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_from_another_terminal(tmp_path: Path) -> None:
    """The request, its answer, and an end with 75; the lock of the run is the trainer's all the time."""
    out = tmp_path / "run"
    with training(out) as pid:
        first = cli.run("save", out, "--wait", 120)
        assert first.code == 0, first.err
        name = first.out.strip()
        assert f"process {pid} " in first.err
        assert name == lastgood.open(out).latest().name
        (out / ".lastgood" / "save-now").touch()  # any tool
        second = cli.run("-C", out, "save", "--stop", "--wait", 120)
        assert second.code == 0, second.err
        assert second.out.strip() != name
        assert forked.wait(pid) == 75
    log = (tmp_path / "log").read_text()
    assert "asked for by `lastgood save`" in log
    history = lastgood.open(out).history
    assert next(e["request"] for e in history if e["event"] == "asked") == "save-now"
    assert history[-1]["event"] == "preempted" and history[-1]["by"] == "request"
    assert not {"save-now", "save-and-stop"} & set(os.listdir(out / ".lastgood"))
    over = cli.call("save", out)
    assert over.code == 3 and "nobody is training" in over.err
    assert not (out / ".lastgood" / "save-now").exists()


def test_nobody_answers(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with training(out) as pid:
        os.kill(pid, signal.SIGSTOP)
        try:
            late = cli.call("save", out, "--wait", 0.3)
            assert late.code == 1 and "within 0.3 s; the request was taken back" in late.err
            assert not (out / ".lastgood" / "save-now").exists()
        finally:
            os.kill(pid, signal.SIGCONT)
        waiting = subprocess.Popen(
            [sys.executable, "-m", "lastgood", "save", os.fspath(out), "--wait", "120"],
            env=cli.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.kill(pid, signal.SIGKILL)
        forked.wait(pid)
        said, told = waiting.communicate(timeout=120)
        # It was killed before it heard of it, or after it had saved: whoever waits isn't left alone.
        assert (waiting.returncode, bool(said)) in ((0, True), (1, False), (3, False)), told


def test_what_was_asked_before_the_launch_is_dropped_with_a_word(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    case = Case("stale", args={"max_steps": 4, "save_strategy": "no"})
    (out / ".lastgood").mkdir(parents=True)
    for name in ("save-now", "save-and-stop"):
        (out / ".lastgood" / name).touch()
    assert forked.run(train, case, out, tmp_path / "r.json", log=log) == 0, log.read_text()
    assert log.read_text().count("from before this launch was dropped") == 2
    assert not lastgood.open(out).checkpoints


def test_a_touch_in_the_middle(tmp_path: Path) -> None:
    case = Case("touched", args={"max_steps": 6, "save_strategy": "no"})
    status = forked.run(sent, case, tmp_path / "run", tmp_path / "r.json", {"save_and_stop": 0}, log=tmp_path / "log")
    assert status == 75, (tmp_path / "log").read_text()
    assert [r.step for r in lastgood.open(tmp_path / "run").checkpoints] == [1]


def test_the_inbox_looks_once_a_second_and_takes_each_once(tmp_path: Path) -> None:
    cli.managed(tmp_path)
    inbox = Inbox(tmp_path)
    request.ask(tmp_path, stop=False)
    request.ask(tmp_path, stop=False)
    assert inbox.look(100.0, 7) == request.SAVE
    request.ask(tmp_path, stop=True)
    request.ask(tmp_path, stop=False)
    assert inbox.look(100.0 + PAUSE / 2, 8) == ""
    assert inbox.look(100.0 + PAUSE, 9) == request.STOP
    assert inbox.look(100.0 + 2 * PAUSE, 10) == ""
    assert [e["step"] for e in lastgood.open(tmp_path).history if e["event"] == "asked"] == [7, 9]
    assert not request.withdraw(tmp_path, stop=True)


@pytest.mark.parametrize("thing", ["directory", "link"])
def test_what_is_no_file_hurts_nobody(thing: str, tmp_path: Path) -> None:
    cli.managed(tmp_path)
    outside = tmp_path / "precious"
    outside.write_text("x")
    at = tmp_path / ".lastgood" / "save-now"
    at.mkdir() if thing == "directory" else at.symlink_to(outside)
    found = [Inbox(tmp_path).look(n * 10.0, n) for n in range(2)]
    assert found == (["", ""] if thing == "directory" else ["save-now", ""])
    assert outside.read_text() == "x"


@pytest.mark.parametrize("args", [("--wait", "-1"), ("--wait", "nan"), ("--wait", "inf"), ("nowhere",)])
def test_wrong_arguments(args: Any, tmp_path: Path) -> None:
    assert cli.call("save", *args, cwd=cli.managed(tmp_path)).code in (2, 10)


def test_a_run_that_lastgood_does_not_manage_can_not_be_asked(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    done = cli.call("save", tmp_path)
    assert done.code == 3 and not (tmp_path / ".lastgood").exists()


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_signals import Send
from training import Case
import lastgood
out = Path(sys.argv[1])
case = Case("stopped", args={{"max_steps": 900, "save_strategy": "no"}})
lastgood.manage(case.trainer(out, Send(out, save_and_stop=0))).train(resume_from_checkpoint="auto")
"""


def test_who_was_asked_to_stop_is_not_launched_again(tmp_path: Path) -> None:
    tool, out = tmp_path / "train.py", tmp_path / "run"
    tool.write_text(SCRIPT.format(here=os.fspath(Path(__file__).parent)))
    env = {"HF_HUB_OFFLINE": "1"}
    ended = cli.run("-C", out, "run", "--", sys.executable, tool, out, env=env, timeout=300)
    assert ended.code == 75, ended.err
    assert "stopped by `lastgood save --stop`, not launched again" in ended.err
    assert [r.step for r in lastgood.open(out).checkpoints] == [1]


def test_a_command_whose_time_is_over_is_asked_to_stop_and_not_launched_again(tmp_path: Path) -> None:
    told = tmp_path / "told"
    line = ("sh", "-c", f"echo $LASTGOOD_END_TIME >> {told}; sleep 300 & wait")
    before = time.time()
    ended = cli.run("-C", tmp_path, "run", "--time-limit", "3s", "--grace", 1, "--", *line, timeout=120)
    assert ended.code == 143, ended.err
    assert "the time limit is near: asked to stop" in ended.err
    (end,) = told.read_text().split()
    assert before + 3 <= float(end) <= time.time() + 3
    for wrong in ("60s", "soon", "0s"):
        assert cli.call("-C", tmp_path, "run", "--time-limit", wrong, "--", "true").code == 2
