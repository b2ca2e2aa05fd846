"""What is said about settings before the first step: every message complete, and silence where all is well."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood.doctor.diagnose import preflight
from lastgood.doctor.settings import Settings
from lastgood.policy import Keep
from lastgood.schedule import save_points

HEALTHY: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 10,
    "eval_strategy": "steps",
    "max_steps": 100,
    "num_train_epochs": 3,
    "steps_per_epoch": 50,
    "save_total_limit": 3,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "eval_metric_names": ("eval_loss", "eval_runtime"),
}
NO_LIMIT = {"save_total_limit": None, "metric_for_best_model": None, "greater_is_better": None}


def settings(**changes: Any) -> Settings:
    return Settings(**{**HEALTHY, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NO_LIMIT,
        {"metric_for_best_model": "loss"},
        {"metric_for_best_model": "accuracy", "greater_is_better": True, "eval_metric_names": None},
        {**NO_LIMIT, "keep": Keep(last=2, best=3, monitor="loss")},
        {**NO_LIMIT, "keep": Keep(last=2), "eval_strategy": "no", "eval_metric_names": None},
        {"save_strategy": "epoch", "max_steps": -1},
        {"persistent_workers": True, "num_workers": 0},
        {"save_strategy": "epoch", "steps_per_epoch": None},
    ],
)
def test_healthy_settings_yield_nothing(changes: dict[str, Any]) -> None:
    assert preflight(settings(**changes)) == ()


@pytest.mark.parametrize(
    ("changes", "code", "severity", "words"),
    [
        ({"metric_for_best_model": "perplexity", "greater_is_better": True, "eval_metric_names": None},
         "CKB005", "error", ("perplexity", "lower", "greater_is_better=False")),
        ({"metric_for_best_model": "f1", "greater_is_better": False, "eval_metric_names": None},
         "CKB005", "error", ("f1", "higher", "greater_is_better=True")),
        ({"metric_for_best_model": "mystery", "greater_is_better": True, "eval_metric_names": None},
         "CKB005", "warning", ("mystery", "make sure that a higher mystery is better")),
        ({"metric_for_best_model": "acc", "greater_is_better": True, "eval_metric_names": ("eval_accuracy",)},
         "CKB004", "error", ("metric_for_best_model='acc'", "metric_for_best_model='eval_accuracy'")),
        ({"metric_for_best_model": None, "greater_is_better": None},
         "CKB006", "warning", ("save_total_limit=3", "metric_for_best_model isn't set", "3 newest")),
        ({"eval_strategy": "no", "eval_metric_names": None},
         "CKB006", "warning", ("save_total_limit=3", "no evaluation", "not the best")),
        ({**NO_LIMIT, "keep": Keep(last=1, best=1, monitor="loss"), "eval_strategy": "no", "eval_metric_names": None},
         "CKB006", "warning", ("Keep(monitor='loss')", 'eval_strategy="steps"')),
        ({**NO_LIMIT, "keep": Keep(last=1, best=1, monitor="bleu")},
         "CKB004", "error", ("monitor='bleu', evaluation yields eval_loss", "none would be kept as the best")),
        ({"metric_for_best_model": "neg_log_loss", "greater_is_better": False, "eval_metric_names": None},
         "CKB005", "warning", ("make sure that a lower neg_log_loss is better",)),
        ({"save_strategy": "no"}, "CKB007", "warning", ("nothing is saved", 'save_strategy="steps"')),
        ({"save_strategy": "best"}, "CKB007", "warning", ("stops improving",)),
        ({"save_steps": 500}, "CKB007", "warning", ("save_steps=500", "100 steps", "save_steps=10")),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
         "CKB007", "warning", ("epoch", "50 steps", "save_steps=5")),
        ({"save_only_model": True}, "CKR016", "warning", ("none of them can be resumed", "save_only_model=False")),
        ({"foreign": ("checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5")},
         "CKR007", "warning", ("checkpoint-1", "and 2 more", "fresh output_dir")),
        ({"ignore_data_skip": True}, "CKL001", "warning", ("first samples", "ignore_data_skip=False")),
        ({"persistent_workers": True, "num_workers": 2}, "CKL008", "warning", ("persistent_workers=False",)),
    ],
)  # fmt: skip
def test_each_trap_is_found_alone_and_fully_explained(
    changes: dict[str, Any], code: str, severity: str, words: tuple[str, ...]
) -> None:
    (found,) = preflight(settings(**changes))
    assert (found.code, found.severity) == (code, severity)
    text = "\n".join(str(getattr(found, name)) for name in found.__struct_fields__)
    assert [word for word in words if word not in text] == []
    assert found.saw and found.means and found.fix


def test_errors_come_before_warnings() -> None:
    found = preflight(settings(ignore_data_skip=True, save_only_model=True, metric_for_best_model="eval_nll"))
    assert [finding.severity for finding in found] == ["error", "warning", "warning"]


@given(
    st.sampled_from(["steps", "epoch"]),
    st.integers(1, 300) | st.floats(0.01, 0.99),
    st.integers(1, 200),
    st.integers(1, 200),
)
def test_a_run_without_a_recovery_point_is_always_said(
    strategy: str, save_steps: float, max_steps: int, steps_per_epoch: int
) -> None:
    found = preflight(
        settings(save_strategy=strategy, save_steps=save_steps, max_steps=max_steps, steps_per_epoch=steps_per_epoch)
    )
    points = save_points(strategy, save_steps, max_steps=max_steps, steps_per_epoch=steps_per_epoch)
    before_the_end = any(point < max_steps for point in points)
    assert ("CKB007" in {finding.code for finding in found}) != before_the_end
