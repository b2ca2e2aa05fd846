"""CKB: which checkpoint counts as the best. Real errors of the real libraries, and silence where all is well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lastgood.doctor.diagnose import diagnose, serious

from sick import codes, log_of, the

Real = Callable[[str], Path]

HEALTHY: dict[str, Any] = {
    "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 10, "save_steps": 10, "max_steps": 100,
    "metric_for_best_model": "eval_loss", "save_total_limit": 2, "load_best_model_at_end": True,
}  # fmt: skip


def refused(tmp_path: Path, **arguments: Any) -> str:
    """The log of a script whose TrainingArguments aren't accepted."""
    return log_of(lambda: TrainingArguments(output_dir=str(tmp_path), report_to="none", **arguments))


def test_healthy_arguments(tmp_path: Path) -> None:
    assert codes(args=HEALTHY) == []
    assert codes(args=TrainingArguments(output_dir=str(tmp_path), report_to="none", **HEALTHY)) == []
    assert codes(args={**HEALTHY, "metric_for_best_model": "accuracy"}) == []


def test_CKB001(tmp_path: Path) -> None:
    wrong = {**HEALTHY, "eval_strategy": "epoch"}
    assert the("CKB001", log=refused(tmp_path, **wrong)).where == "log"
    assert the("CKB001", args=wrong).fix == ("eval_strategy='steps'",)


def test_CKB002(tmp_path: Path) -> None:
    wrong = {**HEALTHY, "save_steps": 15}
    the("CKB002", log=refused(tmp_path, **wrong))
    assert the("CKB002", args=wrong).fix == ("save_steps=20",)
    the("CKB002", args={**HEALTHY, "save_steps": 0.5})
    assert codes(args={**HEALTHY, "save_steps": 0.3, "eval_steps": 0.1}) == []


def test_CKB003(tmp_path: Path) -> None:
    wrong = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 10}
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", **wrong)
    the("CKB003", log=log_of(lambda: Trainer(torch.nn.Linear(1, 1), arguments, eval_dataset=[{"x": 1}])))
    the("CKB003", args=wrong)


def test_CKB004(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", metric_for_best_model="acuracy", eval_strategy="steps"
    )
    trainer = object.__new__(Trainer)
    trainer.args = arguments
    log = log_of(lambda: trainer._determine_best_metric({"eval_loss": 1.0, "eval_accuracy": 0.5}, None))
    found = the("CKB004", log=log)
    assert found.fix == ("metric_for_best_model='eval_accuracy'",) and "acuracy" in found.saw


@pytest.mark.parametrize("metric", ["perplexity", "wer", "mse", "eval_loss_de"])
def test_CKB005(metric: str, tmp_path: Path) -> None:
    wrong = {**HEALTHY, "metric_for_best_model": metric}
    assert (
        the("CKB005", args=TrainingArguments(output_dir=str(tmp_path), report_to="none", **wrong)).severity == "error"
    )
    assert "CKB005" not in codes(args={**wrong, "greater_is_better": False})
    assert the("CKB005", args={**HEALTHY, "metric_for_best_model": "mystery"}).severity == "warning"
    chosen = {**HEALTHY, "metric_for_best_model": "mystery", "greater_is_better": False}
    assert "CKB005" not in codes(args=chosen)  # nothing infers that: somebody wrote it


def test_CKB006() -> None:
    the("CKB006", args={"save_total_limit": 2, "max_steps": 1000, "save_steps": 100})
    assert codes(args={"max_steps": 1000, "save_steps": 100}) == []


def test_CKB007() -> None:
    the("CKB007", args={"save_strategy": "epoch", "num_train_epochs": 1})
    the("CKB007", args={"save_steps": 500, "max_steps": 400})
    the("CKB007", args={"save_strategy": False, "max_steps": 400})  # YAML's reading of a bare `no`
    assert codes(args={"save_strategy": "epoch", "num_train_epochs": 2}) == []


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"save_total_limit": 2}, "CKB006"),
        ({"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "eval_loss"}, "CKB007"),
        ({"save_only_model": True}, "CKR016"),
        ({"ignore_data_skip": True}, "CKL001"),
    ],
)
def test_settings_of_a_run_under_way_are_no_alarm(settings: dict[str, Any], code: str, real: Real) -> None:
    root = real("trainer_full")
    shutil.rmtree(root / "checkpoint-6")  # it isn't over
    for home in root.glob("checkpoint-*"):
        torch.save(TrainingArguments(str(root), max_steps=6, save_steps=2, **settings), home / "training_args.bin")
        file = home / "trainer_state.json"
        state = json.loads(file.read_text())
        state["log_history"] = [row for row in state["log_history"] if "loss" in row]
        file.write_text(json.dumps(state))
    assert the(code, root).severity == "info" and not serious(diagnose(root))
    assert the(code, args={"max_steps": 6, "save_steps": 2, **settings}).severity == "warning"


def rewritten(root: Path, values: list[float]) -> Path:
    """The run, with these evaluations in the newest checkpoint's log."""
    file = root / "checkpoint-6" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"] = [{"step": step, "eval_loss": value} for step, value in enumerate(values, 1)]
    file.write_text(json.dumps(state))
    for older in ("checkpoint-2", "checkpoint-4"):
        file = root / older / "trainer_state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "log_history": []}))
    return root


def test_CKB008(real: Real) -> None:
    root = real("trainer_full")
    assert codes(root) == []
    assert "at step 2" in the("CKB008", rewritten(root, [3.0, float("nan"), 2.0])).saw
    assert "each of 4" in the("CKB008", rewritten(root, [3.0] * 4)).saw


def test_CKB009(real: Real) -> None:
    root = rewritten(real("trainer_full"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert the("CKB009", root).severity == "info"
    assert codes(rewritten(root, [6.0, 5.0, 4.0, 3.0, 3.5, 3.6])) == []


def test_CKB010(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    the("CKB010", log=log_of(lambda: ModelCheckpoint(save_top_k=3, monitor=None)))
