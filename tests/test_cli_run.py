"""lastgood run: real training scripts that crash and are preempted, supervised with no change to their code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lastgood
from lastgood.view import look

HERE = Path(__file__).parent

SCRIPT = """
import argparse, os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import torch
from training import Case, digest
import lastgood

options = argparse.ArgumentParser()
options.add_argument("--output_dir")
options.add_argument("--result")
options.add_argument("--resume_from_checkpoint")
options.add_argument("--managed", action="store_true")
given = options.parse_args()
count = int(os.environ["LASTGOOD_RESTARTS"])
case = Case("run", evaluate=True, args={{"max_steps": 12}})


class Trouble({base}):
    def on_step_end(self, args, state, control, **kwargs):
        if count == 0 and state.global_step == 5:
            os._exit(3)
        if count == 2 and state.global_step == 9:
            os.kill(os.getpid(), signal.SIGTERM)


trainer = case.trainer(Path(given.output_dir), Trouble())
if given.managed:
    trainer = lastgood.manage(trainer)
    trainer.train(resume_from_checkpoint="auto")
else:
    save = torch.save

    def killed(value, path, *rest, **more):
        if count == 1 and str(path).endswith("checkpoint-8/scheduler.pt"):
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, path, *rest, **more)

    torch.save = killed
    assert os.environ["LASTGOOD_RESUME"] == (given.resume_from_checkpoint or "")
    trainer.train(resume_from_checkpoint=given.resume_from_checkpoint)
Path(given.result).write_text(digest(dict(trainer.model.state_dict())))
"""


def script(where: Path) -> Path:
    path = where / "train.py"
    path.write_text(SCRIPT.format(here=str(HERE), base="__import__('transformers').TrainerCallback"))
    return path


def run(out: Path, *arguments: str, timeout: float = 240, **environment: str) -> Any:
    line = [sys.executable, "-m", "lastgood", "-C", str(out), "run", "--backoff", "0.1", *arguments]
    child = {**os.environ, "PYTHONPATH": f"{HERE.parent / 'src'}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(line, env=child, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a run that nothing happened to."""
    where = tmp_path_factory.mktemp("straight")
    line = [sys.executable, str(script(where)), "--output_dir", str(where / "out"), "--result", str(where / "result")]
    child = {**os.environ, "PYTHONPATH": f"{HERE.parent / 'src'}", "OMP_NUM_THREADS": "1"}
    subprocess.run(line, env={**child, "LASTGOOD_RESTARTS": "9", "LASTGOOD_RESUME": ""}, check=True, timeout=120)
    return (where / "result").read_text()


def test_a_stock_trainer_that_crashes_is_relaunched_and_ends_as_if_nothing_had_happened(
    straight: str, tmp_path: Path
) -> None:
    """A crash at step 5, SIGKILL inside the save of step 8, SIGTERM at step 9: the code of the script knows nothing."""
    train, out = script(tmp_path), tmp_path / "out"
    ended = run(
        out, "--keep-last", "2", "--", sys.executable, str(train), "--output_dir", str(out), "--result",
        str(tmp_path / "result"), "--resume_from_checkpoint", "{checkpoint}",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "result").read_text() == straight
    assert "launch 1 from the beginning" in ended.stderr
    assert "launch 2 from checkpoint-4" in ended.stderr
    assert "SIGKILL: perhaps out of memory" in ended.stderr
    assert "checkpoint-8 was half-written" in ended.stderr
    assert "launch 3 from checkpoint-6" in ended.stderr
    assert "launch 4 from checkpoint-8" in ended.stderr
    assert list((out / ".lastgood/quarantine").glob("checkpoint-8.*"))
    view = look(out)
    assert [record.step for record in view.records] == [10, 12], "the policy was applied as it went on"
    assert all(record.id for record in view.records), "and what stays is adopted"
    assert not [fault for record in view.records for fault in view.problems(record, full=True)]


def test_a_managed_trainer_is_relaunched_too(straight: str, tmp_path: Path) -> None:
    train, out = script(tmp_path), tmp_path / "out"
    ended = run(
        out, "--", sys.executable, str(train), "--managed", "--output_dir", str(out), "--result",
        str(tmp_path / "result"),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "result").read_text() == straight
    assert "status 3" in ended.stderr
    assert len(lastgood.open(out).checkpoints) == 6


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--", "no-such-command-anywhere"], 127, "not found"),
        (["--", sys.executable, "-c", "raise SystemExit(2)"], 2, "command line seems to be wrong"),
        (["--max-restarts", "1", "--", sys.executable, "-c", "raise SystemExit(9)"], 9, "crash 2 in a row"),
        (["--monitor", "eval_loss", "--", "true"], 2, "keep how many"),
        (["--keep-best", "2", "--monitor", "mystery", "--", "true"], 2, "lower or a higher"),
        ([], 2, "CMD"),
        (["--", "true"], 0, "launch 1"),
    ],
)
def test_what_it_leaves_with(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    ended = run(tmp_path / "out", *arguments)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_nothing_is_launched_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    """A fresh start over the ruins would look like the old run."""
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    ended = run(tmp_path / "out", "--", sys.executable, "-c", "print('launched')")
    assert "checkpoint-5 was half-written" in ended.stderr
    assert json.loads((tmp_path / "out/.lastgood/journal.jsonl").read_text().splitlines()[0])["event"] == "quarantined"
    assert ended.returncode == 0
    assert "launched" in ended.stdout, "an interrupted first save is no reason not to start"
