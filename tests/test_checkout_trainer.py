"""checkout --format trainer: a stock Trainer goes on bit for bit, evaluations that were due at the save included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import Trainer

import lastgood
from lastgood.cli.main import cli
from lastgood.repo import after
from lastgood.repo.read import records

from training import Case

CASES = [
    Case("plain", args={"save_steps": 3}),
    Case("evaluated", evaluate=True),
    Case("evaluated-lora", evaluate=True, lora=True),
    Case(
        "plateau", evaluate=True,
        args={
            "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
            "metric_for_best_model": "eval_loss", "learning_rate": 0.3,
        },
    ),
    Case("epochs", rows=8, evaluate=True, args={"save_steps": 4, "eval_steps": 4}),
]  # fmt: skip


def checked_out(run: Path, rev: str, target: Path) -> str:
    result = CliRunner().invoke(cli, ["-C", str(run), "checkout", rev, str(target), "--format", "trainer"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_I21_a_stock_trainer_goes_on_exactly(case: Case, tmp_path: Path) -> None:
    managed = lastgood.manage(case.trainer(tmp_path / "run"))
    managed.train()
    step = records(tmp_path / "run")[0].step if case.name == "plain" else 4
    said = checked_out(tmp_path / "run", str(step), tmp_path / "stock" / f"checkpoint-{step}")
    assert "note:" not in said
    stock = case.trainer(tmp_path / "stock")
    assert type(stock) is Trainer
    stock.train(resume_from_checkpoint=str(tmp_path / "stock" / f"checkpoint-{step}"))
    assert stock.state.global_step == managed.state.global_step == 8
    for mine, theirs in ((stock.model, managed.model), (stock.optimizer, managed.optimizer)):
        assert equal(mine.state_dict(), theirs.state_dict())  # type: ignore[union-attr]
    assert rows(stock) == rows(managed), "the log of the whole run is the same"


def test_without_the_evaluation_it_is_said_that_it_is_missing(tmp_path: Path) -> None:
    """A crash between the save and the end of its evaluation."""
    lastgood.manage(CASES[1].trainer(tmp_path / "run")).train()
    after.remove(tmp_path / "run", next(r.id for r in records(tmp_path / "run") if r.step == 4))
    assert "an evaluation was still due at step 4" in checked_out(tmp_path / "run", "4", tmp_path / "out")


def test_what_an_evaluation_changed_goes_with_its_checkpoint(tmp_path: Path) -> None:
    case = Case("few", evaluate=True, args={"save_total_limit": 1})
    lastgood.manage(case.trainer(tmp_path / "run")).train()
    kept = {record.id for record in records(tmp_path / "run")}
    files = {path.name.partition(".")[0] for path in (tmp_path / "run/.lastgood/metrics").glob("*.after.json")}
    assert files <= kept
    assert files, "the newest one has its own"


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def rows(trainer: Trainer) -> str:
    timing = ("runtime", "per_second", "total_flos", "train_loss")
    return json.dumps(
        [{k: v for k, v in row.items() if not any(word in k for word in timing)} for row in trainer.state.log_history],
        sort_keys=True,
    )
