"""Real signals to real runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import lastgood
from lastgood.signals import ECHO

import forked
from training import Case, train

CASE = Case("signals", evaluate=True, args={"max_steps": 12, "save_steps": 3, "eval_steps": 3, "save_total_limit": 2})


class Terminate(TrainerCallback):
    """SIGTERM to this process in the middle of a step, or inside an evaluation."""

    def __init__(self, step: int, times: int = 1, where: str = "step", pause: float = 0.0) -> None:
        self.step, self.times, self.where, self.pause = step, times, where, pause

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.where == "step" and state.global_step == self.step:
            self.send()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.where == "evaluation" and state.global_step == self.step:
            self.send()

    def send(self) -> None:
        for turn in range(self.times):
            time.sleep(self.pause if turn else 0.0)
            os.kill(os.getpid(), signal.SIGTERM)


def terminated(case: Case, out: Path, *args: Any) -> None:
    trainer = lastgood.manage(case.trainer(out, Terminate(*args)))
    trainer.train(resume_from_checkpoint="auto")
    raise AssertionError("train() returned as if training were done")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: Any) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("straight")
    assert forked.run(train, CASE, base / "run", base / "result.json", log=base / "log") == 0, (
        base / "log"
    ).read_text()
    return json.loads((base / "result.json").read_text())  # type: ignore[no-any-return]


def finish(out: Path, where: Path) -> dict[str, Any]:
    assert forked.run(train, CASE, out, where / "r.json", log=where / "log") == 0, (where / "log").read_text()
    return json.loads((where / "r.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(("step", "saved"), [(4, 5), (5, 6), (0, 1)])
def test_I20_sigterm_saves_at_the_next_step_and_leaves_with_75(
    step: int, saved: int, tmp_path: Path, expected: dict[str, Any]
) -> None:
    assert forked.run(terminated, CASE, tmp_path / "run", step, log=tmp_path / "log") == 75, (
        tmp_path / "log"
    ).read_text()
    assert lastgood.open(tmp_path / "run").latest().step == saved
    assert finish(tmp_path / "run", tmp_path) == expected


@pytest.mark.parametrize("step", [3, 6])
def test_I20_sigterm_inside_an_evaluation_does_not_wait_for_its_end(
    step: int, tmp_path: Path, expected: dict[str, Any]
) -> None:
    status = forked.run(terminated, CASE, tmp_path / "run", step, 1, "evaluation", log=tmp_path / "log")
    assert status == 75, (tmp_path / "log").read_text()
    assert lastgood.open(tmp_path / "run").latest().step == step
    assert finish(tmp_path / "run", tmp_path) == expected


def test_I3_I20_a_second_sigterm_ends_at_once_and_breaks_nothing(tmp_path: Path, expected: dict[str, Any]) -> None:
    status = forked.run(terminated, CASE, tmp_path / "run", 4, 2, "step", ECHO + 0.1, log=tmp_path / "log")
    assert status == -signal.SIGTERM
    assert finish(tmp_path / "run", tmp_path) == expected


def test_I20_a_sigterm_that_arrives_twice_is_one_request(tmp_path: Path, expected: dict[str, Any]) -> None:
    """A service manager signals the launcher and the training, and the launcher passes its own on."""
    assert forked.run(terminated, CASE, tmp_path / "run", 4, 2, log=tmp_path / "log") == 75
    assert lastgood.open(tmp_path / "run").latest().step == 5
    assert finish(tmp_path / "run", tmp_path) == expected


def test_I1_I3_sigkill_at_random_moments(tmp_path: Path, expected: dict[str, Any]) -> None:
    """Killed again and again wherever the clock happens to be, until it gets through."""
    rng = random.Random(20)
    kills, started = 0, time.monotonic()
    assert forked.run(train, CASE, tmp_path / "timed", tmp_path / "t.json", log=tmp_path / "log") == 0
    whole = time.monotonic() - started
    for _ in range(25):
        pid = forked.start(train, CASE, tmp_path / "run", tmp_path / "r.json", log=tmp_path / "log")
        time.sleep(rng.uniform(0.1, 0.8) * whole)
        os.kill(pid, signal.SIGKILL)
        killed = forked.wait(pid) == -signal.SIGKILL
        kills += killed
        (tmp_path / "r.json").unlink(missing_ok=True)
        if not killed and kills < 5:  # it got through before enough kills: a machine that was slower a moment ago
            whole /= 2
            shutil.rmtree(tmp_path / "run")
    assert kills, "none of them was still alive"
    assert finish(tmp_path / "run", tmp_path)["weights"] == expected["weights"]
    assert not list((tmp_path / "run" / ".lastgood" / "tmp").iterdir())


def test_I15_a_second_launch_fails_fast_and_names_the_first(tmp_path: Path) -> None:
    pid = forked.start(
        train, Case("long", args={"max_steps": 100000}), tmp_path / "run", tmp_path / "r.json", log=tmp_path / "log"
    )
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "run").glob("checkpoint-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        second = lastgood.manage(Case("long").trainer(tmp_path / "run"))
        with pytest.raises(lastgood.RunLocked, match=f"process {pid} "):
            second.train(resume_from_checkpoint="auto")
        os.kill(pid, signal.SIGKILL)
        forked.wait(pid)
        assert second.train(resume_from_checkpoint="auto").global_step >= 2
    finally:
        with_suppress(pid)


def with_suppress(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def test_I15_a_takeover_fences_the_first_one_off(tmp_path: Path) -> None:
    slow = Case("slow", args={"max_steps": 100000, "save_steps": 50})
    pid = forked.start(train, slow, tmp_path / "run", tmp_path / "r.json", log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "run").glob("checkpoint-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)
        mine = lastgood.manage(Case("mine", args={"max_steps": 8}).trainer(tmp_path / "run"), takeover=True)
        mine.train(resume_from_checkpoint="auto")
        before = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
        os.kill(pid, signal.SIGCONT)
        assert forked.wait(pid) == 1
        assert "took over" in (tmp_path / "log").read_text()
        assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == before
    finally:
        with_suppress(pid)
