"""Runs written by earlier releases open forever. `data/run-format-N` was written by the release that introduced N."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import lastgood

from training import Case

RUNS = sorted((Path(__file__).parent / "data").glob("run-format-*"))


@pytest.mark.parametrize("golden", RUNS, ids=lambda path: path.name)
def test_I26_an_old_run_opens_verifies_and_goes_on(golden: Path, tmp_path: Path) -> None:
    run = lastgood.open(golden)
    assert [(record.step, record.state) for record in run.checkpoints] == [(2, "weights"), (4, "full")]
    assert all(run.problems(record) == () for record in run.checkpoints)
    assert run.best("eval_loss").step == 4
    assert [event["event"] for event in run.history if event["event"] == "saved"] == ["saved", "saved"]

    shutil.copytree(golden, tmp_path / "run")
    case = Case("golden", lora=True, evaluate=True)
    # Another version of torch may draw another base model from the same seed: what counts here is the format.
    trainer = lastgood.manage(case.trainer(tmp_path / "run"), allow_missing=["base_model"])
    assert trainer.train(resume_from_checkpoint="auto").global_step == 8
    assert trainer.resume_report.step == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("golden", RUNS, ids=lambda path: path.name)
def test_the_format_needs_json_and_safetensors_alone(golden: Path) -> None:
    directory = golden / "checkpoint-4"
    manifest = json.loads((directory / "lastgood.json").read_text())
    assert {name: (directory / name).stat().st_size for name in manifest["files"]} == {
        name: entry["size"] for name, entry in manifest["files"].items()
    }
    resume = json.loads((directory / "resume.json").read_text())
    with safe_open(directory / "optimizer.safetensors", "np") as file:
        names = set(file.keys())
    for parameter, state in resume["optimizer"]["state"].items():
        assert {f"state.{parameter}.{key}" for key in state} <= names
    assert resume["progress"]["global_step"] == manifest["step"] == 4


def test_the_table_of_versions_is_what_was_run() -> None:
    script = Path(__file__).parent.parent / "scripts" / "compat"
    compat: dict[str, Any] = runpy.run_path(str(script), run_name="compat")
    found = json.loads(compat["RESULTS"].read_text())
    assert compat["PAGE"].read_text() == compat["page"](found)
    assert found[compat["REFERENCE"]]["failed"] == []
