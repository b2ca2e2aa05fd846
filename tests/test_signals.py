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
from lastgood.deadline import SLURM
from lastgood.signals import ECHO, Signals

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


class Send(TrainerCallback):
    """Signals to this process, or files into the run, at the beginning of given steps."""

    def __init__(self, out: Path, **at: int) -> None:
        self.out, self.at = out, at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for what, step in self.at.items():
            if state.global_step != step:
                continue
            if what.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, what))
            else:
                (self.out / ".lastgood" / what.replace("_", "-")).touch()


def sent(case: Case, out: Path, result: Path, at: dict[str, int], owner: str = "") -> None:
    """Train with that; owner: a signal that the program handles itself."""
    heard: list[int] = []
    if owner:
        signal.signal(getattr(signal, owner), lambda number, frame: heard.append(number))
    trainer = lastgood.manage(case.trainer(out, Send(out, **at)), **case.options)
    trainer.train(resume_from_checkpoint="auto")
    result.write_text(json.dumps({"step": trainer.state.global_step, "heard": heard}))


def saved_steps(out: Path) -> list[int]:
    return [event["step"] for event in lastgood.open(out).history if event["event"] == "saved"]


def test_I20_sigusr1_saves_and_goes_on_sigusr2_saves_and_leaves(tmp_path: Path, expected: dict[str, Any]) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    at = {"SIGUSR1": 3, "SIGUSR2": 7}
    assert forked.run(sent, CASE, out, tmp_path / "r.json", at, log=log) == 75, log.read_text()
    assert saved_steps(out) == [3, 4, 6, 8]
    assert "stopped by SIGUSR2 at step 8" in log.read_text()
    assert finish(out, tmp_path) == expected


def test_a_signal_that_the_program_handles_itself_stays_its_own(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    at = {"SIGUSR2": 4}
    assert forked.run(sent, CASE, out, tmp_path / "r.json", at, "SIGUSR2", log=log) == 0, log.read_text()
    assert json.loads((tmp_path / "r.json").read_text()) == {"step": 12, "heard": [signal.SIGUSR2]}
    assert saved_steps(out) == [3, 6, 9, 12]


def listen(case: str, ready: Path) -> None:
    """A process that listens, and sends itself what the case says."""
    import faulthandler

    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2")}
    if case == "dumps":
        faulthandler.register(signal.SIGUSR1, all_threads=False)
    if case == "ignored":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signals = Signals()
    with signals.listening():
        if case == "dumps":
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not signals.taken() and signals.left == ("SIGUSR1",)
        elif case == "ignored":
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not signals.taken()
        elif case == "fork":
            child = os.fork()
            if not child:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(60)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGUSR1, "a worker dies as ever"
            assert not signals.taken()
        elif case == "slurm":  # a warning first, the end later: the one SIGTERM doesn't end a save that is under way
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(ECHO + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.stop == "SIGUSR2"
        elif case == "twice":
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.taken() == "SIGUSR1" and not signals.taken() and not signals.requested
    if case in ("fork", "slurm", "twice"):
        assert {name: signal.getsignal(getattr(signal, name)) for name in before} == before
    ready.write_text("done")


@pytest.mark.parametrize("case", ["dumps", "ignored", "fork", "slurm", "twice"])
def test_handlers_of_others_workers_and_repetitions(case: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.run(listen, case, tmp_path / "ready", log=log) == 0, log.read_text()
    assert (tmp_path / "ready").exists()


def test_I20_shortly_before_the_time_limit_it_saves_and_leaves(tmp_path: Path, expected: dict[str, Any]) -> None:
    case = Case("limit", evaluate=True, args=CASE.args, options={"time_limit": "1s"})  # nearer than the reserve
    log = tmp_path / "log"
    assert forked.run(train, case, tmp_path / "run", tmp_path / "r.json", log=log) == 75, log.read_text()
    assert saved_steps(tmp_path / "run") == [1]
    assert "stopped (the time limit is " in log.read_text() and "at step 1; relaunch" in log.read_text()
    assert lastgood.open(tmp_path / "run").history[-1]["by"] == "limit"
    assert finish(tmp_path / "run", tmp_path) == expected


def timed(case: Case, out: Path, result: Path, end: float, owner: str = "") -> None:
    os.environ[SLURM] = str(time.time() + end)
    sent(case, out, result, {}, owner)


def test_slurms_end_counts_and_whoever_requeues_by_a_signal_is_only_given_a_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.run(timed, CASE, tmp_path / "left", tmp_path / "r.json", 20.0, log=log) == 75, log.read_text()
    assert "Slurm" not in log.read_text() and "time limit is near" in log.read_text()
    assert forked.run(timed, CASE, tmp_path / "goes", tmp_path / "r.json", 20.0, "SIGUSR2", log=log) == 0
    assert saved_steps(tmp_path / "goes") == [1, 3, 6, 9, 12]
    far = tmp_path / "far"
    assert forked.run(timed, CASE, far, tmp_path / "r.json", 1e6, log=log) == 0, log.read_text()
    assert saved_steps(far) == [3, 6, 9, 12]


def test_by_the_clock(tmp_path: Path) -> None:
    case = Case("clock", args={"max_steps": 5, "save_strategy": "no"}, options={"save_seconds": 1e-6})
    assert forked.run(train, case, tmp_path / "run", tmp_path / "r.json", log=tmp_path / "log") == 0
    assert saved_steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert "since the last save" in (tmp_path / "log").read_text()


def test_asked_at_the_step_of_an_evaluation_that_brings_no_best(tmp_path: Path) -> None:
    """save_strategy="best" decides after the evaluation; a preemption there must not leave without a checkpoint."""
    args = {**CASE.args, "save_strategy": "best", "metric_for_best_model": "eval_loss", "learning_rate": 0.0}
    case = Case("best", evaluate=True, args=args)
    status = forked.run(sent, case, tmp_path / "two", tmp_path / "r.json", {"SIGTERM": 8}, log=tmp_path / "log")
    assert status == 75, (tmp_path / "log").read_text()
    assert 9 in saved_steps(tmp_path / "two"), (tmp_path / "log").read_text()
