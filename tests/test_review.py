"""Ways to lose or misjudge a checkpoint with the command line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lastgood import policy
from lastgood.cli import prune as pruning
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo import bin, gc, metrics, pins
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from lastgood.view import look

from cli import branched, call, environment, flip, managed, stage

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


def test_imports_lie_beside_a_run_that_has_trained(tmp_path: Path, real: Make) -> None:
    run, source = managed(tmp_path / "run"), real("accelerate_run")
    code, _, err = call("import", source, run, "-y")
    assert code == 0 and "goes on from checkpoint-600" in err
    assert call("-C", run, "resume", "--print-path")[1].strip().endswith("checkpoint-600")
    made = Manager(root=run, keep=Keep(last=1), on_error="raise")
    made.open()
    found = made.find("last").record
    assert found.step == 600
    made.begin_from(found)
    made.save(800, stage(800), estimate=1, environment={}, arguments={}, facts={})
    made.retain()
    made.close()
    current = [record.step for record in records(run) if record.ours and record.current]
    assert current == [800]
    assert sum(not record.current for record in records(run)) == 3
    fresh = tmp_path / "fresh"
    assert call("import", source, fresh, "-y")[0] == 0 == call("import", source, fresh, "-y")[0]
    assert all(record.current for record in records(fresh))


def test_imports_into_a_stock_run_are_refused(real: Make) -> None:
    run = real("trainer_full")
    before = call("-C", run, "resume", "--print-path")
    code, _, err = call("import", real("accelerate_run"), run, "-y")
    assert code != 0 and "adopt" in err
    assert call("-C", run, "resume", "--print-path") == before


@pytest.mark.parametrize("make", [managed, branched])
def test_a_lost_identity_is_recognised(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    run = make(tmp_path / "run")
    expected = call("-C", run, "resume", "--print-path")
    (run / HIDDEN / "run.json").unlink()
    assert call("-C", run, "resume", "--print-path") == expected
    assert look(run).run is not None
    made = Manager(root=run, keep=Keep(), on_error="raise")
    made.open()
    assert str(run / made.find("last").record.name) == expected[1].strip()
    made.close()


def resaved(checkpoint: Path, *names: str) -> None:
    """As a Trainer leaves it that saves the step again: other bytes of the same number."""
    later = time.time() + 10
    for name in names:
        flip(checkpoint / name) if name != "trainer_state.json" else _other_log(checkpoint / name)
        os.utime(checkpoint / name, (later, later))


def _other_log(path: Path) -> None:
    old = path.read_text()
    new = old.replace('"train_batch_size"', '"train_batch_Size"')
    assert new != old
    path.write_text(new)


def test_an_adopted_checkpoint_that_was_saved_again_is_a_stock_one(real: Make) -> None:
    run = real("trainer_full")
    assert call("-C", run, "adopt", "-y")[0] == 0
    newest = max(run.glob("checkpoint-*"))
    resaved(newest, "optimizer.pt", "trainer_state.json")
    assert named(run, newest.name).state == "stock"
    assert newest.name in call("-C", run, "resume")[1]
    made = Manager(root=run, keep=Keep(), on_error="raise")
    made.open()
    assert newest.name in dict(made.find("last").skipped) and newest.exists()
    made.close()
    assert call("-C", run, "prune", "--keep-last", 1, "--now", "-y")[0] == 0 and newest.exists()


def test_saved_again_and_whole_it_can_be_adopted_again(real: Make) -> None:
    run = real("trainer_full")
    assert call("-C", run, "adopt", "-y")[0] == 0
    newest = max(run.glob("checkpoint-*"))
    resaved(newest, "trainer_state.json")
    seen = run.parent / "seen"
    assert call("-C", run, "run", "--", "sh", "-c", f"echo $LASTGOOD_RESUME > {seen}")[0] == 0
    assert seen.read_text().strip() == str(newest)
    assert call("-C", run, "adopt", "-y")[0] == 0
    assert call("-C", run, "verify", "--full")[0] == 0
    assert all(record.current and record.id for record in records(run))
    assert call("-C", run, "resume", "--print-path")[1].strip() == str(newest)


def test_a_resave_cut_short_is_not_handed_out(real: Make) -> None:
    run = real("trainer_full")
    assert call("-C", run, "adopt", "-y")[0] == 0
    *_, before, newest = sorted(run.glob("checkpoint-*"))
    resaved(newest, "optimizer.pt")
    assert call("-C", run, "resume", "--print-path")[1].strip() == str(before)


def test_copies_with_new_times_stay_adopted(real: Make, tmp_path: Path) -> None:
    run = real("trainer_full")
    assert call("-C", run, "adopt", "-y")[0] == 0
    copy = shutil.copytree(run, tmp_path / "copy", copy_function=shutil.copyfile)
    for file in copy.glob("checkpoint-*/*"):
        os.utime(file, (2e9, 2e9) if file.name != "lastgood.json" else (1e9, 1e9))
    assert {record.state for record in records(copy)} == {"full"}
    assert call("-C", copy, "resume", "--print-path")[0] == 0


def supervised(run: Path, *words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "lastgood", "-C", str(run), "run", "--max-restarts", "0", "--", *words]
    return subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)


def test_one_supervisor_per_directory(tmp_path: Path) -> None:
    run = managed(tmp_path / "run")
    with supervised(run, "sleep", "60") as first:
        assert first.stderr is not None
        assert "launch 1" in first.stderr.readline()
        code, _, err = call("-C", run, "run", "--", "true")
        first.send_signal(signal.SIGTERM)
        first.wait(30)
    assert code != 0 and "another `lastgood run`" in err, err
    assert call("-C", run, "run", "--", "true")[0] == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only /proc tells of them")
def test_workers_with_a_session_of_their_own_end_with_a_crash(tmp_path: Path) -> None:
    number = tmp_path / "pid"
    script = f"setsid sh -c 'echo $$ > {number}; exec sleep 60' & while [ ! -s {number} ]; do sleep 0.05; done; exit 7"
    with supervised(managed(tmp_path / "run"), "sh", "-c", script) as process:
        assert process.wait(30) == 7
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_what_a_trainer_is_writing_is_no_leftover(real: Make) -> None:
    run = real("trainer_full")
    writing = run / "checkpoint-8"
    writing.mkdir()
    shutil.copy(run / "checkpoint-6/model.safetensors", writing)
    options = ("prune", "--keep-last", 9, "--stock", "--incomplete", "--now", "-y")
    code, _, err = call("-C", run, *options)
    assert code == 0 and writing.exists() and "being written" in err, err
    for path in (writing / "model.safetensors", writing):
        os.utime(path, (1e9, 1e9))
    assert call("-C", run, *options)[0] == 0 and not writing.exists()


def test_a_run_of_weights_alone_can_be_pruned(tmp_path: Path) -> None:
    run = managed(tmp_path / "run")
    assert call("-C", run, "strip", 200, 400, "--now", "-y")[0] == 0
    shutil.rmtree(run / "checkpoint-600")
    code, _, err = call("-C", run, "prune", "--keep-last", 1, "-y")
    assert code == 0 and [record.step for record in records(run)] == [400], err


def test_exports_of_adopted_and_stripped_ones(real: Make, tmp_path: Path) -> None:
    run = real("trainer_full")
    assert call("-C", run, "adopt", "-y")[0] == 0 == call("-C", run, "strip", 2, "--now", "-y")[0]
    for step in (2, 6):
        code, _, err = call("-C", run, "export", step, tmp_path / str(step), "--to", "accelerate")
        assert code == 0 and (tmp_path / str(step) / "model.safetensors").exists(), err
        assert not (tmp_path / str(step) / "lastgood.json").exists()
    assert (tmp_path / "6/optimizer.bin").exists() and not (tmp_path / "2/optimizer.bin").exists()


def test_what_undo_brings_back_has_its_number_alone(tmp_path: Path) -> None:
    run = managed(tmp_path / "run", {200: 1.5, 400: 1.1, 601: 1.2})
    newest = named(run, "checkpoint-601")
    gc.execute(run, gc.plan(records(run), [policy.Decision(newest, "strip", ("as save_only_model has it",))]))
    assert call("-C", run, "prune", "--keep-every", 200, "--trash", "-y")[0] == 0
    assert call("-C", run, "resume", "--print-path")[1].strip().endswith("checkpoint-400")
    made = Manager(root=run, keep=Keep(), on_error="raise")
    made.open()
    made.begin_from(made.find("last").record)
    made.save(500, stage(500), estimate=1, environment={}, arguments={}, facts={})
    made.close()
    assert call("-C", run, "undo")[0] == 0
    assert sorted(record.seq for record in records(run)) == [1, 2, 3, 4]
    assert {record.step for record in records(run) if not record.current} == {601}


def test_undo_finds_a_free_name(tmp_path: Path) -> None:
    run = managed(tmp_path / "run")
    identity = named(run, "checkpoint-200").id
    assert call("-C", run, "prune", "--keep-last", 1, "--trash", "-y")[0] == 0
    (run / "checkpoint-200").mkdir()
    (run / f"checkpoint-200.{identity[:8]}").mkdir()
    assert call("-C", run, "undo")[0] == 0
    assert identity in {record.id for record in records(run)}
