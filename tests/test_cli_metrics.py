"""Several metrics, formulas and the Pareto view on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import lastgood
from lastgood.cli.main import cli
from lastgood.cli.metric import aims, named, split
from lastgood.errors import UsageError
from lastgood.policy import Keep
from test_leases import hold, saved, steps

VALUES = {1: (4.0, 0.2), 2: (3.0, 0.6), 3: (2.0, 0.5), 4: (5.0, 0.9), 5: (6.0, 0.1)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    saved(tmp_path, {step: loss for step, (loss, _) in VALUES.items()})
    for step, (_, mmlu) in VALUES.items():
        lastgood.open(tmp_path).at(step).record(mmlu=mmlu)
    return tmp_path


def run(root: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["-C", str(root), *words])


def test_prune_keeps_the_best_by_each_metric(root: Path) -> None:
    both = ("--monitor", "loss:min", "--monitor", "mmlu:max")
    done = run(root, "prune", "--keep-last", "1", "--keep-best", "1", *both, "--yes")
    assert done.exit_code == 0, done.output
    assert "best: loss = 2 · best 1/1 by loss" in done.stdout and "best: mmlu = 0.9" in done.stdout
    assert "loss 3 is 2nd of 5, mmlu 0.6 is 2nd of 5" in done.stdout
    assert steps(root) == [3, 4, 5]


def test_prune_goes_by_a_formula(root: Path) -> None:
    done = run(root, "prune", "--keep-last", "1", "--monitor", "eval_loss - 10*mmlu:min", "--yes")
    assert done.exit_code == 0, done.output
    assert "best: eval_loss - 10*mmlu = -4" in done.stdout
    assert steps(root) == [4, 5]


def test_another_metric_is_not_judged_by_the_direction_of_the_runs_own(root: Path) -> None:
    saved(root, {}, Keep(last=1, monitor="loss"), go_on=True)
    done = run(root, "prune", "--monitor", "mmlu:max", "--dry-run")
    assert "best: mmlu = 0.9" in done.stdout, done.output
    assert run(root, "prune", "--monitor", "mmlu", "--dry-run").exit_code != 0, "nothing says which is better"


def test_a_runs_own_metrics_count_where_other_rules_are_given(root: Path) -> None:
    saved(root, {}, Keep(last=5, monitor=("loss", "mmlu"), mode=("min", "max")), go_on=True)
    done = run(root, "prune", "--keep-last", "1", "--yes")
    assert done.exit_code == 0 and steps(root) == [3, 4, 5], done.output
    assert lastgood.open(root)["best:mmlu"].step == 4
    assert "best mmlu" in run(root, "log").stdout


def test_what_would_another_policy_have_left(root: Path) -> None:
    done = run(
        root, "plan", "--keep-last", "1", "--keep-best", "1", "--monitor", "loss", "--monitor", "mmlu:max", "--json"
    )
    assert done.exit_code == 0, done.output
    kept = {row["step"] for row in json.loads(done.stdout)["rows"] if row["then"] != "deleted"}
    assert kept == {3, 4, 5}


def test_log_marks_what_no_other_one_beats(root: Path) -> None:
    done = run(root, "log", "--pareto", "loss,mmlu:max")
    assert done.exit_code == 0, done.output
    marked = {int(line.split()[0]) for line in done.stdout.splitlines()[2:] if "  *  " in line and line[0].isdigit()}
    assert marked == {2, 3, 4} == {c.step for c in lastgood.open(root).pareto({"loss": "min", "mmlu": "max"})}
    assert "LOSS  MMLU" in done.stdout and "loss (lower), mmlu (higher)" in done.stdout
    found = json.loads(run(root, "log", "--pareto", "loss,mmlu:max", "--json").stdout)
    assert found["run"]["pareto"] == {"loss": "min", "mmlu": "max"}
    assert {row["step"] for row in found["checkpoints"] if row["pareto"]} == marked
    assert not any(key.startswith("metrics.") for row in found["checkpoints"] for key in row)
    assert {row["pareto"] for row in json.loads(run(root, "log", "--json").stdout)["checkpoints"]} == {None}
    sorted_by = run(root, "log", "--pareto", "loss,mmlu:max", "--sort=-metrics.mmlu", "-H", "-o", "step").stdout.split()
    assert sorted_by == ["4", "2", "3", "1", "5"]


def test_log_says_who_evaluates(root: Path) -> None:
    held = hold(root, 1)
    assert "being evaluated by" in run(root, "log", "-H", "-o", "step,why").stdout.splitlines()[-1]
    held.drop()


def test_words() -> None:
    assert (
        split("0.5*a + b:max") == ("0.5*a + b", "max")
        and split("x:y") == ("x:y", None)
        and split(":min") == (":min", None)
    )
    assert aims("min(a,b):max, loss") == {"min(a,b)": "max", "loss": "min"}
    assert named((), None) == {"monitor": None, "mode": None} == named((), None)
    assert named(("a",), "max") == {"monitor": "a", "mode": "max"} == named(("a:max",), None)
    assert named(("loss", "a:max"), None) == {"monitor": ("loss", "a"), "mode": (None, "max")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune", "--keep-last", "1", "--monitor", "bleu"), "no checkpoint has a bleu"),
        (("prune", "--keep-last", "1", "--monitor", "bleu + loss:max"), "no checkpoint has a bleu"),
        (("prune", "--keep-last", "1", "--monitor", "loss +:max"), "no formula"),
        (("prune", "--keep-last", "1", "--monitor", "loss", "--monitor", "mmlu", "--mode", "min"), "--mode is for one"),
        (("prune", "--keep-last", "1", "--monitor", "mmlu:max", "--mode", "min"), "disagree"),
        (("log", "--pareto", "loss"), "two or more"),
        (("log", "--pareto", "loss +,mmlu:max"), "no formula"),
        (("log", "--pareto", "loss,mmlu"), "lower or a higher mmlu"),
        (("plan", "--model", "13B", "--max-steps", "9", "--monitor", "a:min", "--monitor", "b:min"), "several metrics"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(root: Path, words: tuple[str, ...], message: str) -> None:
    # Named anew each time, for of a plan with a model there is no run.
    done: Any = CliRunner().invoke(cli, [*(["-C", str(root)] if "--model" not in words else []), *words])
    assert isinstance(done.exception, UsageError) and message in done.exception.message, done.output
