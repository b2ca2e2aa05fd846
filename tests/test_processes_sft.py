"""What happens to the process of a real fine-tune with SFTTrainer: signals at enumerated moments, workers that die."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import lastgood
import moments
from lastgood.repo.read import records
from moments import SIGNALS
from test_trainers import sft

import forked
from training import Case, outcome


class Say(TrainerCallback):
    """When signals are listened to for certain."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print("training", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print("leaving", flush=True)


def life(root: Path, *numbers: int, point: int = 0) -> None:
    """From wherever the run stands to its end; at its `point`-th call that changes the disk come the signals."""
    with moments.signalled(point, *numbers):
        trainer = lastgood.manage(sft(root, True, Say()))
        trainer.train(resume_from_checkpoint="auto")
    (root.parent / "end").write_text(json.dumps(outcome(trainer)))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What it ends with if nothing happens."""
    base = tmp_path_factory.mktemp("straight")
    assert forked.run(life, base / "run", log=base / "log") == 0, (base / "log").read_text()
    return (base / "end").read_text()


@pytest.mark.parametrize("name", SIGNALS)
def test_I3_I20_signals_at_every_moment_of_a_fine_tune(name: str, quick: Path, expected: str) -> None:
    """It ends as documented, every checkpoint is whole, and the same command ends bit for bit as without."""
    some = moments.points(400, 401, first=5 + 21 * list(SIGNALS).index(name))
    assert moments.survived(life, name, some, quick, expected) > (100 if moments.EVERY else 0)


WORKERS = Case("workers", args={"dataloader_num_workers": 2, "max_steps": 8}, noise="torch python")


class KillWorker(TrainerCallback):
    """SIGKILL to one of the loader's workers, and no look at it before the save of this step is under way."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            assert children, "the loader has workers"
            os.kill(int(children[-1]), signal.SIGKILL)
            print("killed a worker", flush=True)


def with_workers(out: Path, result: Path, kill: int = 0) -> None:
    trainer = lastgood.manage(WORKERS.trainer(out, KillWorker(kill)))
    trainer.train(resume_from_checkpoint="auto")
    result.write_text(json.dumps(outcome(trainer)))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the children of a process are listed on Linux alone")
@pytest.mark.parametrize("step", [3, 6])
def test_I1_I3_a_data_worker_that_is_killed_harms_no_checkpoint(step: int, tmp_path: Path) -> None:
    """At a step with a save, and between two; the training may fail, and the same command goes on."""
    log = tmp_path / "log"
    assert forked.run(with_workers, tmp_path / "a", tmp_path / "a.json", log=log) == 0, log.read_text()
    log.unlink()
    status = forked.run(with_workers, tmp_path / "b", tmp_path / "b.json", step, log=log)
    assert "killed a worker" in log.read_text()
    moments.sound(tmp_path / "b", log.read_text())
    if status:  # torch raises its error wherever the training is just then, which may be inside the save
        there = [record.step for record in records(tmp_path / "b")]
        assert there == [*range(2, 2 * len(there) + 1, 2)]
        assert there[-1] >= step - 2 + step % 2, "what was saved before stays"
        assert forked.run(with_workers, tmp_path / "b", tmp_path / "b.json", log=log) == 0, log.read_text()
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()
