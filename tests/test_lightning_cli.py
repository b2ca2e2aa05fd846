"""The command line on a run that Lightning wrote, what it exports, and the example."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
import forked
from lightnings import Case, Stop, StopAt
from training import digest

EXAMPLE = Path(__file__).parent.parent / "examples" / "lightning_loop.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(Stop):
        Case("cli").fit(root, StopAt(9))
    return root


def test_the_verbs_read_it(run: Path, tmp_path: Path) -> None:
    log = cli.call("log", run, "--json")
    assert log.code == 0, log.err
    assert [entry["step"] for entry in json.loads(log.out)["checkpoints"]] == [8, 6, 4, 2]
    resume = cli.call("resume", run, "--check")
    assert resume.code == 0
    assert "checkpoint-8" in resume.out
    assert "AdamW" in resume.out
    assert cli.call("-C", run, "verify", "--full").code == 0
    assert cli.call("doctor", run).code in (0, 1)
    assert cli.call("-C", run, "checkout", "last", tmp_path / "copy").code == 0
    assert (tmp_path / "copy" / "model.safetensors").is_file()


@pytest.mark.parametrize("step", [4, 6, 8])
def test_an_export_goes_on_in_lightning_alone(run: Path, tmp_path: Path, step: int) -> None:
    done = cli.call("-C", run, "export", step, tmp_path / "out.ckpt", "--to", "lightning")
    assert done.code == 0, done.err
    written = torch.load(tmp_path / "out.ckpt", weights_only=True)
    from safetensors.torch import load_file

    assert digest(dict(written["state_dict"])) == digest(load_file(run / f"checkpoint-{step}" / "model.safetensors"))
    trainer, logger, _ = Case("stock").fit(None, ckpt=tmp_path / "out.ckpt")
    assert trainer.global_step == 12
    assert logger.rows


def example(*arguments: Any) -> None:
    spec = importlib.util.spec_from_file_location("lightning_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    module.main([str(argument) for argument in arguments])


def killed_at(root: Path, *arguments: Any) -> None:
    """Dies as soon as a checkpoint is there."""
    import lightning.pytorch as pl

    original = pl.LightningModule.on_train_batch_end

    def die(self: Any, *args: Any) -> None:
        original(self, *args)
        if (root / "checkpoint-40").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)

    pl.LightningModule.on_train_batch_end = die  # type: ignore[method-assign]
    example(root, *arguments)


def test_the_example_goes_on(tmp_path: Path) -> None:
    whole, log = tmp_path / "whole", tmp_path / "log"
    assert forked.run(example, whole, log=tmp_path / "first") == 0, (tmp_path / "first").read_text()
    assert forked.run(killed_at, tmp_path / "run", log=tmp_path / "killed") == -signal.SIGKILL
    assert forked.run(example, tmp_path / "run", log=log) == 0, log.read_text()
    assert "resuming from checkpoint-" in log.read_text()
    said = [line for line in log.read_text().splitlines() if line.startswith("step ")]
    assert said == [line for line in (tmp_path / "first").read_text().splitlines() if line.startswith("step ")]
