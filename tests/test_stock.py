"""The stock Trainer on our checkpoints, and we on the stock Trainer's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lastgood

import forked
from training import Case, outcome

CASES = [Case("full"), Case("lora", lora=True), Case("bf16 weights", model={"dtype": "bfloat16"})]


def train_stock(case: Case, out: Path, result: Path, **args: Any) -> None:
    trainer = Case(case.name, args=args, lora=case.lora, model=case.model).trainer(out)
    trainer.train()
    result.write_text(json.dumps(outcome(trainer)))


def train_on(case: Case, out: Path, result: Path, resume: Any = "auto") -> None:
    trainer = lastgood.manage(case.trainer(out))
    trainer.train(resume_from_checkpoint=resume)
    report = trainer.resume_report  # type: ignore[attr-defined]
    result.write_text(json.dumps({**outcome(trainer), "from": report.step, "skipped": report.skipped}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_stock_trainer_stops_loudly_at_a_managed_checkpoint(case: Case, tmp_path: Path) -> None:
    lastgood.manage(case.trainer(tmp_path)).train()
    stock = case.trainer(tmp_path)
    with pytest.raises(ValueError, match=r"managed by lastgood.*lastgood\.manage\(trainer\)"):
        stock.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_stock_run_goes_on_under_management(case: Case, resume: str, tmp_path: Path) -> None:
    run = forked.run(train_stock, case, tmp_path / "a", tmp_path / "a.json", log=tmp_path / "log")
    assert run == 0, (tmp_path / "log").read_text()
    shutil.rmtree(tmp_path / "a" / "checkpoint-6")
    shutil.rmtree(tmp_path / "a" / "checkpoint-8")
    before = files(tmp_path / "a")
    value = "auto" if resume == "auto" else str(tmp_path / "a" / "checkpoint-4")
    run = forked.run(train_on, case, tmp_path / "a", tmp_path / "b.json", resume=value, log=tmp_path / "log")
    assert run == 0, (tmp_path / "log").read_text()
    expected, found = json.loads((tmp_path / "a.json").read_text()), json.loads((tmp_path / "b.json").read_text())
    assert found["from"] == 4
    assert {key: found[key] for key in ("weights", "losses")} == {key: expected[key] for key in ("weights", "losses")}
    assert files(tmp_path / "a").items() >= before.items(), "checkpoints of the stock Trainer are never touched"


def files(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file() and ".lastgood" not in str(file)}


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_a_damaged_stock_checkpoint_is_passed_over(name: str, kind: str, tmp_path: Path) -> None:
    case = Case("full")
    assert forked.run(train_stock, case, tmp_path, tmp_path / "a.json", max_steps=4, log=tmp_path / "log") == 0
    path = tmp_path / "checkpoint-4" / name
    path.unlink() if kind == "missing" else path.write_bytes(path.read_bytes()[:50])
    assert forked.run(train_on, case, tmp_path, tmp_path / "b.json", log=tmp_path / "log") == 0, (
        tmp_path / "log"
    ).read_text()
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["from"] == 2
    assert (
        any(skipped == "checkpoint-4" and name.partition(".")[0] in why for skipped, why in found["skipped"])
        or kind == "missing"
    )


def test_two_stock_runs_in_one_directory_are_not_guessed_at(tmp_path: Path) -> None:
    Case("a", args={"max_steps": 4}).trainer(tmp_path / "a").train()
    Case("b", args={"max_steps": 6, "save_steps": 6, "seed": 1}).trainer(tmp_path / "b").train()
    shutil.copytree(tmp_path / "b" / "checkpoint-6", tmp_path / "a" / "checkpoint-1000")
    with pytest.raises(lastgood.NoCheckpoint, match="2 runs"):
        lastgood.manage(Case("a").trainer(tmp_path / "a")).train(resume_from_checkpoint="auto")


def test_I21_no_pickle_is_written(tmp_path: Path) -> None:
    import pickletools
    import zipfile

    for case in CASES[:2]:
        lastgood.manage(case.trainer(tmp_path / case.name)).train()
    for file in tmp_path.rglob("*"):
        if not file.is_file():
            continue
        assert file.name != "training_args.bin"
        data = file.read_bytes()
        if zipfile.is_zipfile(file):
            assert all("pkl" not in name for name in zipfile.ZipFile(file).namelist())
        with pytest.raises(Exception):  # noqa: B017, PT011 (anything but a clean parse)
            for _ in pickletools.genops(data):
                pass


def test_weights_load_without_lastgood(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    from training import tiny_gpt2

    full = lastgood.manage(Case("full").trainer(tmp_path / "full"))
    full.train()
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "full" / "checkpoint-8")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), full.model.parameters(), strict=True))
    lora = lastgood.manage(Case("lora", lora=True).trainer(tmp_path / "lora"))
    lora.train()
    adapter = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora" / "checkpoint-8")
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), lora.model.parameters(), strict=True))
