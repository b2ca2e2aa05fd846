"""Trainings on a disk that somebody else fills up: each goes on, waits or stops as it was told, and loses nothing."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

import lastgood
import loops
from lastgood.cli.run import _enough
from lastgood.errors import NotEnoughSpace, Preempted
from lastgood.repo.layout import HIDDEN
from test_crash_points import contents

import forked
from faults import space
from lightnings import Case as Fit
from training import Case

STEPS, FULL_AT = 8, 4


class Neighbour:
    """A part of the run behind which another process fills the disk, in the middle of the save of one step."""

    def __init__(self, disk: Path, log: Path, then: str) -> None:
        self.disk, self.step, self.armed = disk, 0, bool(then)
        ours, theirs = os.pipe()
        self.answer, self.tell = os.pipe()
        self.ask, owner = theirs, os.getpid()
        if os.fork() == 0:
            os.close(theirs)
            try:
                while order := os.read(ours, 1):
                    if order == b"f":
                        space.leave(disk, pages=3)
                    elif (disk / "filler").exists():
                        space.relieve(disk)
                    os.write(self.tell, order)
                    if order == b"f" and then in ("room", "SIGTERM", "SIGINT"):
                        while "training waits until" not in log.read_text():
                            time.sleep(0.01)
                        if then == "room":
                            space.relieve(disk)
                        else:
                            os.kill(owner, getattr(signal, then))
            finally:
                os._exit(0)
        os.close(ours)

    def order(self, what: bytes) -> None:
        os.write(self.ask, what)
        assert os.read(self.answer, 1) == what

    def state_dict(self) -> dict[str, Any]:
        if self.armed and self.step == FULL_AT and os.listdir(self.disk / "run" / HIDDEN / "tmp"):
            self.armed = False
            self.order(b"f")
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def training(disk: Path, log: Path, then: str, result: Path, **options: Any) -> None:
    """8 steps, a save at every second one. then: what becomes of the disk that is full at step 4."""
    torch.set_num_threads(1)
    set_seed(0)
    recipe, other = loops.simple(loops.Net(64)), Neighbour(disk, log, then)
    with lastgood.CheckpointManager(disk / "run", save_steps=2, **options, **recipe.parts, neighbour=other) as ckpt:
        for step in range(ckpt.restore(), STEPS):
            loss = recipe.step(step)
            other.step = step + 1
            ckpt.step(step + 1, loss=loss)
            if step + 1 == FULL_AT + 1 and then == "later":
                other.order(b"r")
    result.write_text(loops.state(recipe))


def steps(disk: Path) -> list[int]:
    return [record.step for record in lastgood.open(disk / "run").checkpoints if record.ours]


def train(disk: Path, then: str, **options: Any) -> tuple[int, str, str]:
    """Status, log and result of a launch."""
    log, result = disk.parent / "log", disk.parent / "result"
    log.write_text("")
    result.unlink(missing_ok=True)
    status = forked.run(training, disk, log, then, result, log=log, **options)
    return status, log.read_text(), result.read_text() if result.exists() else ""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: Any) -> str:
    """What an uninterrupted run ends with."""
    place = tmp_path_factory.mktemp("whole") / "disk"
    place.mkdir()
    status, log, result = train(place, "")
    assert status == 0 and steps(place) == [2, 4, 6, 8], log
    return result


def first(disk: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(disk / "run").items() if name.startswith("checkpoint-2/")}


@pytest.mark.parametrize("options", [{}, {"on_full": "warn", "on_error": "raise"}])
def test_I3_I19_warn_leaves_the_save_out_and_training_goes_on(
    options: dict[str, Any], small: Path, expected: str
) -> None:
    status, log, result = train(small, "later", **options)
    assert status == 0 and result == expected, log
    assert log.count("NO CHECKPOINT at step 4") == 1 and "training goes on (on_" in log
    assert steps(small) == [2, 6, 8] and not os.listdir(small / "run" / HIDDEN / "tmp")
    assert all(lastgood.open(small / "run").problems(r) == () for r in lastgood.open(small / "run").checkpoints)


def test_I3_I19_wait_holds_training_until_there_is_room(small: Path, expected: str) -> None:
    status, log, result = train(small, "room", on_full="wait")
    assert status == 0 and result == expected, log
    assert log.count("training waits until") == 1 and "NO CHECKPOINT" not in log
    assert steps(small) == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_I20_a_signal_ends_the_wait(name: str, small: Path, expected: str) -> None:
    status, log, _ = train(small, name, on_full="wait")
    assert status == (75 if name == "SIGTERM" else 1), log
    assert ("KeyboardInterrupt" in log) == (name == "SIGINT") and log.count("training waits until") == 1
    assert steps(small) == [2]
    space.relieve(small)
    status, log, result = train(small, "")
    assert status == 0 and result == expected, log


def test_I3_I19_stop_ends_the_run_and_a_relaunch_goes_on(small: Path, expected: str) -> None:
    status, log, _ = train(small, "stop", on_full="stop")
    assert status == 75 and log.count("NO CHECKPOINT at step 4") == 1, log
    assert "the run stops for it (on_full='stop')" in log and "stopped (no room for the checkpoint of step 4)" in log
    assert steps(small) == [2]
    event = lastgood.open(small / "run").history[-1]
    assert event["event"] == "preempted" and event["by"] == "space"
    assert "not launched again" in _enough(small / "run", 0.0), "`lastgood run` would only try in vain"
    before = first(small)
    status, log, _ = train(small, "", on_full="stop")  # the disk is still full: nothing gets lost by trying
    assert status == 75 and "resuming from checkpoint-2" in log and steps(small) == [2] and first(small) == before, log
    space.relieve(small)
    status, log, result = train(small, "", on_full="stop")
    assert status == 0 and result == expected, log
    assert steps(small) == [2, 4, 6, 8] and first(small) == before


def limited(disk: Path, log: Path, result: Path, **options: Any) -> None:
    """From step 4 on files can't grow beyond 50 kB, up to step 5."""
    torch.manual_seed(0)
    recipe = loops.simple(loops.Net(64))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with lastgood.CheckpointManager(disk / "run", save_steps=2, **options, **recipe.parts) as ckpt:
        for step in range(ckpt.restore(), STEPS):
            loss = recipe.step(step)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if step + 1 in (4, 5) else hard, hard))
            ckpt.step(step + 1, loss=loss)


@pytest.mark.parametrize("on_full", ["wait", "stop"])
def test_I3_a_limit_of_the_file_size_is_no_full_disk(on_full: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    status = forked.run(limited, tmp_path, log, tmp_path / "result", on_full=on_full, log=log)
    assert status == 0 and "NO CHECKPOINT at step 4" in log.read_text() and "errno 27" in log.read_text()
    assert steps(tmp_path) == [2, 6, 8], "waiting would have no end, for no space is missing"


# ---- the other doors -----------------------------------------------------------------------


def test_I19_a_trainer_stops_for_want_of_room(small: Path, caplog: Any) -> None:
    trainer = lastgood.manage(Case("x").trainer(small / "run"), on_full="stop")
    space.leave(small, pages=(10 << 20) // space.PAGE)
    with pytest.raises(Preempted, match="no room for the checkpoint of step 2") as caught:
        trainer.train()
    assert caught.value.code == 75 and isinstance(caught.value.__cause__, NotEnoughSpace)
    assert trainer.state.global_step == 2 and "NO CHECKPOINT at step 2" in caplog.text
    space.relieve(small)
    again = lastgood.manage(Case("x").trainer(small / "run"), on_full="stop")
    again.train(resume_from_checkpoint="auto")
    assert steps(small) == [2, 4, 6, 8]


def waiting(disk: Path) -> None:
    lastgood.manage(Case("x").trainer(disk / "run"), on_full="wait").train()


def test_I20_a_trainer_that_waits_for_room_hears_a_sigterm(small: Path, tmp_path: Path) -> None:
    space.leave(small, pages=(10 << 20) // space.PAGE)
    log = tmp_path / "log"
    child = forked.start(waiting, small, log=log)
    while not log.exists() or "training waits until" not in log.read_text():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert forked.wait(child) == 75, log.read_text()
    assert steps(small) == [] and "stopped by SIGTERM at step 2" in log.read_text()


def test_I19_a_lightning_run_stops_for_want_of_room(small: Path) -> None:
    space.leave(small, pages=(10 << 20) // space.PAGE)
    with pytest.raises(Preempted, match="no room for the checkpoint of step 2") as caught:
        Fit("x", options={"on_full": "stop"}).fit(small / "run")
    assert isinstance(caught.value.__cause__, NotEnoughSpace)
    assert steps(small) == []
    assert lastgood.open(small / "run").history[-1]["by"] == "space"
    space.relieve(small)
    Fit("x", options={"on_full": "stop"}).fit(small / "run")
    assert steps(small)[-1] == 12


@pytest.mark.parametrize("make", [lambda **o: lastgood.CheckpointManager("x", model=torch.nn.Linear(1, 1), **o),
                                  lambda **o: lastgood.LightningCheckpoint("x", **o),
                                  lambda **o: lastgood.manage(Case("x").trainer(Path("x")), **o)])  # fmt: skip
def test_a_wrong_on_full_is_named(make: Any) -> None:
    with pytest.raises(lastgood.UsageError, match="on_full must be 'warn' or 'wait' or 'stop'"):
        make(on_full="pause")
