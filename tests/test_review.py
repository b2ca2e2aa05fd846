"""Ways to lose or misjudge a checkpoint with the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lastgood.cli import prune as pruning
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo import bin, metrics, pins
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records

from cli import call, flip, managed, stage

Make = Callable[[str], Path]


def named(root: Path, name: str) -> Record:
    return next(record for record in records(root) if record.name == name)


def test_strips_alone_hash_the_newest_too(tmp_path: Path) -> None:
    for options in (("--keep-last", 3, "--full", 1), ("--to-free", "5KB")):
        run = managed(tmp_path / str(options[0]).strip("-"))
        flip(run / "checkpoint-600/optimizer.safetensors")
        code, _, err = call("-C", run, "prune", *options, "--now", "-y")
        assert "checkpoint-600 is damaged" in err, (code, err)
        assert named(run, "checkpoint-400").state == "full"


def test_strip_leaves_the_last_good_one(tmp_path: Path) -> None:
    run = managed(tmp_path / "run")
    flip(run / "checkpoint-600/optimizer.safetensors")
    code, _, err = call("-C", run, "strip", 400, "--now", "-y")
    assert code != 0 and "checkpoint-400 is the last good" in err, err
    assert named(run, "checkpoint-400").state == "full"
    assert call("-C", run, "strip", 200, "--now", "-y")[0] == 0


def test_a_pinned_checkpoint_that_lost_a_file_is_no_leftover(tmp_path: Path) -> None:
    run = managed(tmp_path / "run")
    assert call("-C", run, "tag", "release", 400)[0] == 0
    (run / "checkpoint-400/config.json").unlink()
    call("-C", run, "prune", "--keep-last", 1, "--incomplete", "--now", "-y")
    assert (run / "checkpoint-400/model.safetensors").exists()


def test_a_damaged_newest_is_no_leftover_of_a_save(tmp_path: Path) -> None:
    run = managed(tmp_path / "run")
    flip(run / "checkpoint-600/optimizer.safetensors")
    call("-C", run, "prune", "--keep-last", 1, "--incomplete", "--now", "-y")
    assert (run / "checkpoint-600/model.safetensors").exists()


def test_a_name_given_while_prune_asks_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = managed(tmp_path / "run", dict.fromkeys((100, 200, 300)))

    def asked(question: str, yes: bool) -> None:
        pins.add(run, named(run, "checkpoint-100").id, "release")
        metrics.record(run, named(run, "checkpoint-200").id, 200, {"eval_loss": 0.1})

    monkeypatch.setattr(pruning, "confirm", asked)
    code, _, err = call("-C", run, "prune", "--keep-last", 1, "--monitor", "eval_loss", "--now")
    assert (run / "checkpoint-100").exists() and (run / "checkpoint-200").exists(), err
    assert code != 0 and "checkpoint-100" in err


def test_a_metric_that_nobody_has_keeps_no_best(tmp_path: Path) -> None:
    run = managed(tmp_path / "run")
    code, _, err = call("-C", run, "prune", "--keep-last", 1, "--monitor", "eval_los", "--mode", "min", "-y")
    assert code == 2 and "eval_loss" in err, err
    assert len(records(run)) == 3


def test_the_trash_is_not_emptied_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = managed(tmp_path / "run")
    assert call("-C", run, "prune", "--keep-last", 1, "--trash", "-y")[0] == 0
    made = Manager(root=run, keep=Keep(), on_error="warn")
    made.open()
    made.begin_from(records(run)[-1])
    monkeypatch.setattr("lastgood.store.local.free", lambda path: (0, -1))
    assert made.save(800, stage(800), estimate=1 << 40, environment={}, arguments={}, facts={}) is None
    made.close()
    assert bin.operations(run)


def test_a_supervised_stock_run_goes_on_from_its_newest(real: Make) -> None:
    run = real("trainer_full")
    names = sorted(p.name for p in run.glob("checkpoint-*"))
    shutil.move(run / names[-1], run.parent / names[-1])
    assert call("-C", run, "adopt", "-y")[0] == 0
    shutil.move(run.parent / names[-1], run / names[-1])
    seen = run.parent / "seen"
    code = call("-C", run, "run", "--", "sh", "-c", f"echo $LASTGOOD_RESUME > {seen}")[0]
    assert code == 0 and seen.read_text().strip().endswith(names[-1]), seen.read_text()


def test_resume_names_newer_checkpoints_that_are_not_adopted(real: Make) -> None:
    run = real("trainer_full")
    names = sorted(p.name for p in run.glob("checkpoint-*"))
    shutil.move(run / names[-1], run.parent / names[-1])
    assert call("-C", run, "adopt", "-y")[0] == 0
    shutil.move(run.parent / names[-1], run / names[-1])
    code, out, _ = call("-C", run, "resume")
    assert code == 0 and names[-1] in out and "adopt" in out, out


def test_checkouts_inside_what_lastgood_deletes_are_refused(tmp_path: Path) -> None:
    run = managed(tmp_path / "run")
    for place in (f"{HIDDEN}/tmp/best", f"{HIDDEN}/best", "checkpoint-200/hf", "checkpoint-700"):
        code, _, err = call("-C", run, "checkout", "best", run / place)
        assert code == 2 and not (run / place).exists(), (place, err)
    assert call("-C", run, "checkout", "best", run / "best")[0] == 0
    assert call("-C", run, "checkout", "best", tmp_path / "checkpoint-5")[0] == 0


def test_verify_sees_what_would_be_loaded_instead(tmp_path: Path, real: Make) -> None:
    run = managed(tmp_path / "run")
    (run / "checkpoint-200/adapter_config.json").write_text("{}")
    (run / "checkpoint-400/pytorch_model.bin").write_text("nobody looks at it beside model.safetensors")
    code, out, _ = call("-C", run, "verify", "--full")
    assert code == 1 and out.count("DAMAGED") == 1 and "adapter_config.json" in out, out
    stock = real("trainer_sharded")
    assert call("-C", stock, "adopt", "-y")[0] == 0
    assert call("-C", stock, "verify", "--full")[0] == 0
    newest = max(stock.glob("checkpoint-*"))
    shutil.copy(next(newest.glob("model-*.safetensors")), newest / "model.safetensors")
    assert call("-C", stock, "verify", "--full")[0] == 1
