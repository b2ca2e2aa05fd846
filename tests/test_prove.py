"""doctor --prove: real runs, repeated from a checkpoint by scripts that changed and by ones that didn't."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import TrainerCallback

import lastgood
import launched
from lastgood.doctor.prove import prove
from lastgood.errors import NoCheckpoint, Refused, UsageError
from lastgood.format.manifest import NAME
from lastgood.repo import trail

import forked
from cli import call, flip, snapshot
from training import Case, KillAt

LAST = 8


class Drop(TrainerCallback):
    """A script that loses the optimizer's state."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            optimizer.state.clear()


class Dawdle(TrainerCallback):
    """Trains on for a long time after step 8."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= LAST:
            time.sleep(60)


CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "order": {"args": {"train_sampling_strategy": "sequential"}},
    "seed": {"args": {"seed": 8}},
    "dropout": {"model": {"resid_pdrop": 0.5}},
    "schedule": {"args": {"lr_scheduler_type": "constant"}},
    "optimizer": {},
    "long": {"args": {"max_steps": 1000, "lr_scheduler_type": "constant"}},
}
BASE: dict[str, Any] = {"args": {"max_steps": LAST, "logging_steps": 1}}


def script(arguments: list[str]) -> None:
    """A training script: KIND CHANGE OUT [CHECKPOINT]."""
    kind, change, out, *rest = arguments
    case = Case(kind, **{**BASE, **CHANGES[change], "args": {**BASE["args"], **CHANGES[change].get("args", {})}})
    callbacks = {"optimizer": [Drop()], "long": [Dawdle()]}.get(change, [])
    trainer = case.trainer(Path(out), *callbacks)
    if kind == "managed":
        lastgood.manage(trainer).train(resume_from_checkpoint="auto")
        Path(out, "model.txt").write_text("what a script does when it is done")
    elif kind == "stock":
        trainer.train(resume_from_checkpoint=rest[0] if rest else None)
    else:
        print("first line\nlast words")
        raise SystemExit(9)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    with launched.command(script, tmp_path_factory.mktemp("c")) as line:
        yield line


@pytest.fixture(scope="module")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("managed")
    assert forked.run(script, ["managed", "nothing", str(place / "out")], log=place / "log") == 0
    return place / "out"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stock")
    assert forked.run(script, ["stock", "nothing", str(place / "out")], log=place / "log") == 0
    return place / "out"


def test_a_healthy_managed_run_is_proven_and_stays_as_it_is(training: list[str], managed: Path) -> None:
    """The script names the real directory, and would write into it after training."""
    (managed / "model.txt").unlink()
    before = snapshot(managed)
    proof = prove(managed, 4, [*training, "managed", "nothing", str(managed)])
    assert (proof.outcome, proof.code, proof.compared, proof.source) == ("same", 0, 4, "trail"), proof
    assert "checkpoint-4: the 4 steps after it are bit for bit the same" in proof.lines()[0]
    assert snapshot(managed) == before
    assert sorted(os.listdir(managed.parent)) == ["log", "out"], "the scratch directory is gone"


@pytest.mark.parametrize(
    ("change", "step", "what", "means"),
    [
        ("order", 5, "batch", "order"),
        ("seed", 5, "batch", "seed"),
        ("dropout", 5, "loss", "dropout"),
        ("schedule", 6, "lr", "scheduler"),  # step 5 is made with the rate that the optimizer's state has
        ("optimizer", 6, "loss", "optimizer's state"),
    ],
)
def test_what_a_managed_script_changed_is_told_apart(
    change: str, step: int, what: str, means: str, training: list[str], managed: Path
) -> None:
    proof = prove(managed, 4, [*training, "managed", change, str(managed)], steps=3)
    assert proof.outcome == "diverged", proof
    found = proof.divergence
    assert found is not None and (found.step, found.what) == (step, what), proof.lines()
    assert means in found.means
    assert proof.code == 1 and proof.steps == 3
    assert any(line.strip().startswith(f"{step} ") and line.endswith("differs") for line in proof.lines())
    json.dumps([proof.output, found.was, found.now])


@pytest.mark.parametrize(
    ("change", "step", "what"),
    [("nothing", 0, ""), ("order", 5, "loss"), ("dropout", 5, "loss"), ("optimizer", 6, "loss")],
)
def test_a_stock_run_is_compared_by_its_log(
    change: str, step: int, what: str, training: list[str], stock: Path
) -> None:
    before = snapshot(stock)
    line = [*training, "stock", change, "{run}", "{checkpoint}"]
    proof = prove(stock, 4, line, poll=0.1)
    assert proof.source == "log"
    assert snapshot(stock) == before
    found = proof.divergence
    assert (step, what) == (0, "") if found is None else (found.step, found.what) == (step, what), proof
    assert proof.compared == 4


def test_a_stock_command_is_ended_when_it_has_written_enough(training: list[str], stock: Path) -> None:
    began = time.monotonic()
    proof = prove(stock, 4, [*training, "stock", "long", "{run}", "{checkpoint}"], poll=0.05)
    assert time.monotonic() - began < 50
    assert proof.compared == 4 and proof.status == 0
    assert proof.divergence is not None and proof.divergence.what == "lr"


def test_a_managed_script_proves_a_stock_checkpoint(training: list[str], stock: Path) -> None:
    proof = prove(stock, 6, [*training, "managed", "nothing", "{run}"])
    assert (proof.outcome, proof.compared, proof.source) == ("same", 2, "log"), proof


def test_an_adopted_run_is_proven_with_its_stock_script(training: list[str], stock: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stock, tmp_path / "out"))
    assert call("adopt", copy, "-y")[0] == 0
    line = [*training, "stock", "nothing", "{run}", "{checkpoint}"]
    assert prove(copy, 4, line).outcome == "same"
    with pytest.raises(UsageError, match="write into"):
        prove(copy, 4, training)


def test_the_last_words_of_a_command_that_fails(training: list[str], managed: Path) -> None:
    proof = prove(managed, 4, [*training, "broken", "nothing", str(managed)])
    assert (proof.outcome, proof.status, proof.code) == ("failed", 9, 1)
    assert proof.lines()[-1].endswith("| last words")
    assert sorted(path.name for path in managed.parent.iterdir()) == ["log", "out"]


def test_a_command_that_writes_into_the_run_itself_is_found_out(
    training: list[str], managed: Path, tmp_path: Path
) -> None:
    """A stock script with a fixed directory knows nothing of the copy."""
    copy = Path(shutil.copytree(managed, tmp_path / "out"))
    proof = prove(copy, 4, [*training, "stock", "nothing", str(copy)])
    assert (proof.outcome, proof.code) == ("failed", 1)
    assert sorted(proof.wrote) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert "wrote into the run itself" in proof.lines()[-1]


def test_a_command_that_trains_nothing_is_told_what_it_needs(managed: Path) -> None:
    proof = prove(managed, 4, ["true"])
    assert (proof.outcome, proof.wrote) == ("failed", ())
    assert "has to be managed" in proof.lines()[-1]


def test_what_a_killed_doctor_left_goes_with_the_next_proof(managed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(managed, tmp_path / "out"))

    def dies() -> None:
        prove(copy, 4, ["sh", "-c", f"kill -9 {os.getpid()}; sleep 60"])

    assert forked.run(dies, log=tmp_path / "log") == -9
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out.prove-"))
    held = tmp_path / ".out.prove-00000000"
    (held / "run").mkdir(parents=True)
    with FileLock(held / "lock"):
        prove(copy, 4, ["true"])
        assert not left.exists() and held.exists(), "that of a doctor that lives stays"
    prove(copy, 4, ["true"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


def test_what_cannot_be_proven(stock: Path, managed: Path, tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match="no checkpoint of step 5"):
        prove(managed, 5, ["true"])
    with pytest.raises(UsageError, match="nothing is recorded"):
        prove(managed, LAST, ["true"])
    with pytest.raises(UsageError, match="write into"):
        prove(stock, 4, ["train", "--output_dir", str(stock)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(Refused, match="not empty"):
        prove(managed, 4, ["true"], keep=tmp_path / "full")


def test_a_damaged_checkpoint_is_not_proven(managed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(managed, tmp_path / "out"))
    flip(copy / "checkpoint-4" / "optimizer.safetensors")
    with pytest.raises(lastgood.CorruptCheckpoint, match="optimizer"):
        prove(copy, 4, ["true"])
    assert os.listdir(tmp_path) == ["out"]


def test_the_scratch_can_stay(managed: Path, tmp_path: Path) -> None:
    proof = prove(managed, 4, ["true"], keep=tmp_path / "kept")
    assert proof.outcome == "failed" and proof.kept == str(tmp_path / "kept")
    assert (tmp_path / "kept" / "run" / "checkpoint-4" / NAME).is_file()


def test_killed_and_relaunched_is_the_reference_of_both_lives(training: list[str], tmp_path: Path) -> None:
    """The reference goes on where the first life ended."""
    out = tmp_path / "out"

    def killed() -> None:
        lastgood.manage(Case("k", **BASE).trainer(out, KillAt(5))).train(resume_from_checkpoint="auto")

    assert forked.run(killed, log=tmp_path / "log") == -9
    assert forked.run(script, ["managed", "nothing", str(out)], log=tmp_path / "log") == 0
    assert [len(life.entries) for life in trail.read(out)] == [5, 4]
    proof = prove(out, 2, [*training, "managed", "nothing", str(out)])
    assert (proof.outcome, proof.compared) == ("same", 6), proof
    assert [row.was.life for row in proof.rows] == [1, 1, 1, 2, 2, 2]
