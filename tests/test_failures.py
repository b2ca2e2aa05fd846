"""Disks that are full or read-only, options that are wrong: a typed error, and every earlier checkpoint untouched."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import lastgood

import forked
from training import Bytes, Case, Pad, arguments, tiny_gpt2


class Limit(TrainerCallback):
    """From a step on, files can't grow beyond some bytes: a disk that fills up in the middle of a save."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if state.global_step == self.step + 1:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def failing(out: Path, on_error: str, size: int) -> None:
    # The log is a file, too: a second warning, of the trail, is more than it takes.
    trainer = lastgood.manage(Case("x").trainer(out, Limit(4, size)), on_error=on_error, trail=size > 100)
    trainer.train()
    assert trainer.state.global_step == 8


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("size", [100, 5000, 60000])
def test_I3_I19_a_failed_save_under_warn_costs_that_checkpoint_alone(size: int, tmp_path: Path) -> None:
    assert forked.run(failing, tmp_path / "run", "warn", size, log=tmp_path / "log") == 0, (
        tmp_path / "log"
    ).read_text()
    assert "NO CHECKPOINT at step 4" in (tmp_path / "log").read_text()
    assert [record.step for record in lastgood.open(tmp_path / "run").checkpoints] == [2, 6, 8]
    assert not os.listdir(tmp_path / "run" / ".lastgood" / "tmp")


def test_I3_I19_under_raise_it_ends_the_run_with_a_typed_error(tmp_path: Path) -> None:
    # The log, a file under the same limit, has to hold the whole traceback.
    assert forked.run(failing, tmp_path / "run", "raise", 20_000, log=tmp_path / "log") == 1
    assert "lastgood.errors.SaveFailed" in (tmp_path / "log").read_text()
    records = lastgood.open(tmp_path / "run").checkpoints
    assert [record.step for record in records] == [2]
    assert lastgood.open(tmp_path / "run").problems(records[0]) == ()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of its own with 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_I14_I19_a_disk_without_room_is_refused_before_a_byte_is_written(small_disk: Path, caplog: Any) -> None:
    trainer = lastgood.manage(Case("x").trainer(small_disk / "run"))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(10 << 20))
    assert trainer.train().global_step == 8
    assert "no-space" in caplog.text and "nothing was written" in caplog.text
    assert lastgood.open(small_disk / "run").checkpoints == ()
    filler.unlink()
    again = lastgood.manage(Case("x").trainer(small_disk / "run"))
    again.train(resume_from_checkpoint="auto")
    assert [record.step for record in lastgood.open(small_disk / "run").checkpoints] == [2, 4, 6, 8]


def test_an_unwritable_output_dir_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = lastgood.manage(Case("x").trainer(tmp_path / "run"))
    trainer.args.output_dir = str(tmp_path / "file" / "run")
    with pytest.raises(lastgood.SaveFailed, match="output_dir"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": 3}, "keep"),
        ({"on_error": "ignore"}, "on_error"),
        ({"verify": True}, "verify"),
        ({"allow_missing": "optimizer"}, "allow_missing"),
        ({"allow_missing": ["optimiser"]}, "allow_missing"),
        ({"hyperparameters": "old"}, "hyperparameters"),
        ({"data_skip": 1}, "data_skip"),
        ({"takeover": "yes"}, "takeover"),
        ({"save_everything": True}, "save_everything"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(lastgood.UsageError, match=named):
        lastgood.manage(Case("x").trainer(tmp_path), **options)


def test_what_is_not_a_trainer_is_refused() -> None:
    with pytest.raises(lastgood.UsageError, match="trainer"):
        lastgood.manage(torch.nn.Linear(1, 1))


def test_keep_and_save_total_limit_together_are_refused(tmp_path: Path) -> None:
    trainer = Case("x", args={"save_total_limit": 2}).trainer(tmp_path)
    with pytest.raises(lastgood.UsageError, match="save_total_limit"):
        lastgood.manage(trainer, keep=lastgood.Keep(last=1))


def test_several_processes_fsdp_and_jit_checkpoints_are_refused(tmp_path: Path) -> None:
    for change in ({"fsdp": "full_shard"}, {"deepspeed": "config.json"}, {"enable_jit_checkpoint": True}):
        trainer = Case("x").trainer(tmp_path)
        for name, value in change.items():
            setattr(trainer.args, name, value)
        with pytest.raises(lastgood.NotSupported):
            lastgood.manage(trainer)
        assert type(trainer) is Trainer, "nothing was changed"


def test_the_worst_would_be_kept_is_an_error(tmp_path: Path) -> None:
    args = {"metric_for_best_model": "perplexity", "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(lastgood.UsageError, match="greater_is_better=False") as caught:
        lastgood.manage(Case("x", args=args, evaluate=True).trainer(tmp_path))
    assert "CKB005: metric_for_best_model='perplexity'" in caught.value.message
    assert caught.value.code == "CKB004"  # said first: the evaluation doesn't yield it at all


def test_a_metric_that_evaluation_does_not_yield_is_an_error(tmp_path: Path) -> None:
    args = {"metric_for_best_model": "eval_los", "greater_is_better": False, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(lastgood.UsageError, match="metric_for_best_model='eval_loss'") as caught:
        lastgood.manage(Case("x", args=args, evaluate=True).trainer(tmp_path))
    assert caught.value.code == "CKB004"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ({"save_total_limit": 2}, "CKB006"),
        ({"save_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1}, "CKB007"),
        ({"save_steps": 500}, "CKB007"),
        ({"save_strategy": "no"}, "CKB007"),
        ({"save_only_model": True}, "CKR016"),
        ({"ignore_data_skip": True}, "CKL001"),
        ({}, ""),
    ],
)
def test_traps_are_said_at_manage_time(args: dict[str, Any], code: str, tmp_path: Path, caplog: Any) -> None:
    lastgood.manage(Case("x", args=args).trainer(tmp_path))
    assert code in caplog.text if code else caplog.text == ""


def test_I23_secrets_reach_no_byte_on_disk(tmp_path: Path, monkeypatch: Any) -> None:
    canary = "hf_canary0123456789"
    monkeypatch.setenv("HF_TOKEN", canary)
    args = arguments(tmp_path / "run", hub_token=canary, run_name=f"https://me:{canary}@host/x")
    trainer = lastgood.manage(Trainer(model=tiny_gpt2(), args=args, train_dataset=Bytes(64), data_collator=Pad()))
    trainer.train()
    assert not [name for name, data in contents(tmp_path).items() if canary.encode() in data]


def test_files_have_one_mode_by_umask(tmp_path: Path) -> None:
    lastgood.manage(Case("lora", lora=True).trainer(tmp_path / "run")).train()
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "run").rglob("checkpoint-*/*") if file.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


def test_a_tensor_that_cannot_be_stored_is_named_at_the_save(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.register_buffer("strange", torch.zeros(2, dtype=torch.complex128))
    trainer = lastgood.manage(
        Trainer(model=model, args=arguments(tmp_path), train_dataset=Bytes(64), data_collator=Pad())
    )
    with pytest.raises(lastgood.NotSupported, match="strange"):
        trainer.train()
