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
import loops
from lastgood.format import manifest as codec
from lastgood.model import FORMAT

import cli
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


LOOPS = sorted((Path(__file__).parent / "data").glob("loop-format-*"))


@pytest.mark.parametrize("golden", LOOPS, ids=lambda path: path.name)
def test_I26_an_old_loop_opens_verifies_and_goes_on(golden: Path, tmp_path: Path) -> None:
    run = lastgood.open(golden)
    assert [(record.step, record.state) for record in run.checkpoints] == [(2, "weights"), (4, "full")]
    assert all(run.problems(record) == () for record in run.checkpoints)
    assert run.best("score", "max").step == 4
    shutil.copytree(golden, tmp_path / "run")
    recipe = loops.simple(loops.Net(width=2))
    with lastgood.CheckpointManager(tmp_path / "run", save_steps=2, **recipe.parts) as ckpt:
        assert ckpt.restore() == 4
        for step in range(4, 6):
            ckpt.step(step + 1, loss=recipe.step(step))
    assert [record.step for record in lastgood.open(tmp_path / "run").checkpoints][-1] == 6


def test_I26_both_digests_of_format_1_are_kept_for_later_releases() -> None:
    """That of the bytes, and that of the fields, which manifests from before the first release have."""
    manifests = [path.read_bytes() for golden in (*RUNS, *LOOPS) for path in golden.glob("*/lastgood.json")]
    assert {codec._sealed(data) for data in manifests} == {True, False}
    assert {json.loads(data)["format"] for data in manifests} == set(range(1, FORMAT + 1)), "one of each format"


def newer(path: Path) -> None:
    """As a later release might write it: a higher number, and fields that nobody here knows."""
    fields = {**json.loads(path.read_bytes()), "format": FORMAT + 1, "unheard": ["of"]}
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("file", "refused"),
    [
        ("checkpoint-4/lastgood.json", "no-checkpoint"),  # the other one holds the weights alone
        ("checkpoint-2/lastgood.json", ""),
        (".lastgood/run.json", "newer-format"),
    ],
)
def test_I26_what_a_newer_release_wrote_is_refused_and_stays_as_it_is(file: str, refused: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(LOOPS[0], root)
    newer(root / file)
    place = root / file if "run.json" in file else (root / file).parent
    before = cli.snapshot(place)
    code, out, err = cli.call("-C", root, "log", "--all")
    assert (code, err) == (0, "")
    if "run.json" not in file:
        assert f"has format {FORMAT + 1}" in out
    for words in (
        ("prune", "--keep-last", "1", "--stock", "--yes"), ("strip", "4", "--yes"), ("adopt", "--yes"),
        ("tag", "x", "4"),
        ("prune", "--keep-last", "1", "--incomplete", "--now", "--yes"), ("doctor", "--fix", "--yes"), ("undo",),
    ):  # fmt: skip
        code, _, err = cli.call("-C", root, *words)
        assert "Traceback" not in err
        assert code != 0 or "run.json" not in file or words[0] in ("tag", "doctor"), (words, err)
        assert cli.snapshot(place) == before, words
    recipe = loops.simple(loops.Net(width=2))
    said = ""
    try:
        with lastgood.CheckpointManager(root, save_steps=2, **recipe.parts) as ckpt:
            ckpt.restore()
            ckpt.step(4, loss=recipe.step(3))
    except lastgood.LastgoodError as error:
        said = error.code
    assert said == refused, said
    assert cli.snapshot(place) == before


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
