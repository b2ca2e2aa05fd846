"""Lightning under lastgood: interrupted runs end bit for bit like uninterrupted ones; ModelCheckpoint's words hold."""

from __future__ import annotations

import json
import os
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lastgood
from lastgood.state import plain, tree

import forked
import lightnings
from lightnings import Case, Model, Signal, Stop, StopAt, Two, outcome
from training import digest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*swapping scheduler.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
]


def with_scheduler(kind: str) -> Any:
    return lambda: Model(scheduler=kind)


CASES = [
    Case("plain"),
    Case("draws", model=lambda: Model(draws=True), stops=(6,)),
    Case("noise", data="noise"),
    Case("own generator", loader={"own": True}, stops=(6,)),
    Case("no validation", validate=False, options={"monitor": "train_loss"}),
    Case("two optimizers", model=Two, every=4, stops=(12, 17)),
    Case("accumulation", trainer={"accumulate_grad_batches": 2}, every=1, stops=(2, 3)),
    Case("validation inside", trainer={"val_check_interval": 3}, every=1, stops=(3, 4)),
    Case("validation by default", options={"every_n_train_steps": None}, trainer={"val_check_interval": 0.5}),
    Case("every epoch", options={"every_n_train_steps": None}, stops=(7,)),
    Case("limited", trainer={"limit_train_batches": 4, "limit_val_batches": 1}, stops=(4, 5)),
    Case("max steps", trainer={"max_epochs": -1, "max_steps": 14}),
    Case("ema", callbacks=lightnings.ema),
    Case("swa", callbacks=lightnings.swa, trainer={"max_epochs": 4}, stops=(9, 13)),
    Case("bf16", trainer={"precision": "bf16-mixed"}),
    Case("bf16-true", trainer={"precision": "bf16-true"}),
    Case("plateau", model=with_scheduler("plateau"), stops=(6, 8)),
    Case("plateau by training loss", model=with_scheduler("train-plateau"), stops=(8,)),
    Case("several schedulers", model=with_scheduler("several")),
    Case("workers", loader={"num_workers": 2}, stops=(8,)),
    Case("noisy workers", loader={"num_workers": 2}, data="noise", stops=(8,)),
    Case("stream", data="flow"),
    Case("keeps state", data="keeper"),
    Case("two loaders", data="two", model=lightnings.Pair),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_resumed_run_is_the_same(case: Case, tmp_path: Path) -> None:
    trainer, logger, _ = case.fit(tmp_path / "whole")
    whole = outcome(trainer)
    for stop in case.stops:
        root = tmp_path / f"stop{stop}"
        with pytest.raises(Stop):
            case.fit(root, StopAt(stop))
        trainer, rows, callback = case.fit(root)
        assert callback.report is not None, stop
        assert outcome(trainer) == whole, stop
        assert rows.rows == logger.rows[-len(rows.rows) :], stop


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def steps(root: Path) -> list[int]:
    return [record.step for record in lastgood.open(root).checkpoints if record.current]


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=lambda case: case.name)
def test_i1_a_killed_process_goes_on(case: Case, tmp_path: Path) -> None:
    trainer, _, _ = case.fit(tmp_path / "whole")
    root = tmp_path / "run"
    kill = StopAt(8, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert forked.run(case.fit, root, kill, log=tmp_path / "log") == -signal.SIGKILL
    resumed, _, callback = case.fit(root)
    assert callback.report is not None
    assert outcome(resumed) == outcome(trainer)


def test_sigterm_saves_and_leaves_with_75(tmp_path: Path) -> None:
    case = Case("term", trainer={"accumulate_grad_batches": 2}, every=1000)
    whole, _, _ = case.fit(tmp_path / "whole")
    root = tmp_path / "run"
    term = Signal(3)
    assert forked.run(case.fit, root, term, log=tmp_path / "log") == 75, (tmp_path / "log").read_text()
    assert steps(root) == [1]
    assert json.loads((root / "checkpoint-1" / "resume.json").read_bytes())["lightning"]["gradients"]
    resumed, _, callback = case.fit(root)
    assert callback.report.step == 1
    assert outcome(resumed) == outcome(whole)


def test_an_exception_inside_a_step(tmp_path: Path) -> None:
    case = Case("exception", data="noise", every=1000, options={"save_on_exception": True})
    whole, _, _ = case.fit(tmp_path / "whole")
    with pytest.raises(Stop):
        case.fit(tmp_path / "run", StopAt(4))
    assert steps(tmp_path / "run") == [4]
    assert outcome(case.fit(tmp_path / "run")[0]) == outcome(whole)


def test_more_steps_go_on_inside_the_epoch(tmp_path: Path) -> None:
    longer = Case("longer", trainer={"max_epochs": -1, "max_steps": 10})
    whole, _, _ = longer.fit(tmp_path / "whole")
    Case("shorter", trainer={"max_epochs": -1, "max_steps": 4}).fit(tmp_path / "run")
    assert outcome(longer.fit(tmp_path / "run")[0]) == outcome(whole)


def test_a_finished_run_has_nothing_left(tmp_path: Path) -> None:
    case = Case("finished")
    whole, _, _ = case.fit(tmp_path / "run")
    again, logger, _ = case.fit(tmp_path / "run")
    assert {step for step, _ in logger.rows} == {11}  # the validation after the last save, once more
    assert outcome(again) == outcome(whole)


def test_resume_auto(tmp_path: Path) -> None:
    case = Case("auto", options={"resume": "auto"})
    with pytest.raises(Stop):
        case.fit(tmp_path / "run", StopAt(5), ckpt=None)
    resumed, _, callback = case.fit(tmp_path / "run", ckpt=None)
    assert callback.report.step == 4
    assert outcome(resumed) == outcome(case.fit(tmp_path / "whole", ckpt=None)[0])
    fresh, _, callback = Case("fresh").fit(tmp_path / "run", ckpt=None)
    assert callback.report is None
    assert fresh.global_step == 12


def test_i5_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    case = Case("damaged")
    whole, _, _ = case.fit(tmp_path / "whole")
    root = tmp_path / "run"
    with pytest.raises(Stop):
        case.fit(root, StopAt(7))
    flip(root / "checkpoint-6" / "model.safetensors")
    resumed, _, callback = case.fit(root)
    assert callback.report.step == 4
    assert [name for name, _ in callback.report.skipped] == ["checkpoint-6"]
    assert outcome(resumed) == outcome(whole)


def test_best_is_verified_and_loads(tmp_path: Path) -> None:
    root = tmp_path / "run"
    trainer, _, callback = Case("best").fit(root)
    module, val = trainer.lightning_module, trainer.val_dataloaders
    scores = callback.best_k_models
    assert set(map(Path, scores)) == {root / f"checkpoint-{n}" for n in (6, 12)}
    best = min(scores, key=scores.get)
    assert callback.best_model_path == best
    assert callback.best_model_score == scores[best]
    assert callback.last_model_path == str(root / "checkpoint-12")
    (metrics,) = trainer.validate(module, val, ckpt_path="best", verbose=False)
    assert metrics["val_loss"] == pytest.approx(float(scores[best]))
    loaded = Model.load_from_checkpoint(lastgood.lightning_file(best))
    assert digest(loaded.state_dict()) == digest(module.state_dict())
    assert dict(loaded.hparams) == dict(module.hparams)
    # The best one is damaged: the other one is evaluated, and that is said.
    other = max(scores, key=scores.get)
    flip(Path(best) / "model.safetensors")
    (metrics,) = trainer.validate(module, val, ckpt_path="best", verbose=False)
    assert metrics["val_loss"] == pytest.approx(float(scores[other]))
    with pytest.raises(lastgood.CorruptCheckpoint):
        lastgood.lightning_file(best)


class Scores(pl.LightningModule):
    """Its val_loss is the next of a list."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores, self.weight = scores, torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(self.scores[self.trainer.global_step - 1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_kept_is_what_model_checkpoint_keeps(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same steps for any metrics; the newest stays besides, for a recovery."""
    scores = data.draw(st.permutations([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    options = {
        "monitor": "val_loss",
        "mode": data.draw(st.sampled_from(["min", "max"])),
        "save_top_k": data.draw(st.sampled_from([1, 2, 3, -1])),
        "every_n_epochs": data.draw(st.sampled_from([1, 2])),
    }
    place = tmp_path_factory.mktemp("kept")
    found = []
    for callback in (
        ModelCheckpoint(place / "theirs", filename="{step}", **options),
        lastgood.LightningCheckpoint(place / "ours", **options),
    ):
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=6,
            logger=False,
            callbacks=[callback],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(Scores(scores), DataLoader([0]), DataLoader([0]))
        found.append(callback)
    theirs = {int(path.stem.removeprefix("step=")) for path in (place / "theirs").iterdir()}
    newest = 6
    assert set(steps(place / "ours")) == theirs | {newest}
    ranked = [
        [(int(re.findall(r"\d+", Path(p).name)[0]), round(float(v), 3)) for p, v in c.best_k_models.items()]
        for c in found
    ]
    assert sorted(ranked[0]) == sorted(ranked[1])
    assert float(found[0].best_model_score) == pytest.approx(float(found[1].best_model_score))


def test_options_are_checked() -> None:
    make = lastgood.LightningCheckpoint
    for wrong in (
        {"filename": "{epoch}"},
        {"enable_version_counter": False},
        {"auto_insert_metric_name": False},
        {"nonsense": 1},
        {"resume": "yes"},
        {"on_error": "ignore"},
        {"save_last": "copy"},
        {"keep": 3},
        {"keep": lastgood.Keep(last=2), "save_top_k": 3},
        {"keep": lastgood.Keep(best=2, monitor="val_loss"), "monitor": "train_loss"},
    ):
        with pytest.raises(lastgood.UsageError):
            make("run", **wrong)
    with pytest.raises(Exception, match="save_top_k"):
        make("run", save_top_k=3)
    assert make("run", save_top_k=0).keep is None
    assert make("run", save_top_k=0, save_last=True).keep == lastgood.Keep(last=1)
    assert isinstance(make("run"), ModelCheckpoint)


def test_several_devices_are_refused(tmp_path: Path) -> None:
    callback = lastgood.LightningCheckpoint(tmp_path)
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy="ddp", max_epochs=1, logger=False, callbacks=[callback])
    with pytest.raises(lastgood.NotSupported, match="DDPStrategy"):
        trainer.fit(Model(), DataLoader([0]), DataLoader([0]))


def test_hyperparameters_and_states_without_pickle(tmp_path: Path) -> None:
    import argparse
    import datetime
    import pathlib

    tensors: dict[str, torch.Tensor] = {}
    values = {
        "path": pathlib.Path("a/b"),
        "time": datetime.timedelta(seconds=3),
        "space": argparse.Namespace(depth=2),
        "many": (1, {2, 3}, None),
        "make": torch.nn.ReLU,
        "api_key": "abc",
    }
    kept, left = plain.hyperparameters(values, tensors, "hyper")
    assert tree.decode(kept, tensors) == {"path": "a/b", "time": 3.0, "space": {"depth": 2}, "many": (1, {2, 3}, None)}
    assert set(left) == {"make", "api_key"}
    assert "abc" not in repr((kept, left))
    with pytest.raises(lastgood.NotSupported, match=r"callbacks\.Mine\.what"):
        plain.state({"Mine": {"what": object()}}, tensors, "callbacks")


def test_the_other_files_are_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "run"
    beside = ModelCheckpoint(tmp_path / "theirs", save_last=True)
    trainer, _, _ = Case("beside", every=1, options={"save_top_k": 1}).fit(root, beside)
    assert (tmp_path / "theirs" / "last.ckpt").is_file()
    (root / "mine.txt").write_text("mine")
    trainer.save_checkpoint(root / "by-hand.ckpt")
    assert (root / "by-hand.ckpt").is_file()
    with pytest.raises(lastgood.LastgoodError, match="retention"):
        trainer.strategy.remove_checkpoint(root / "checkpoint-12")
    Case("beside", every=1, options={"save_top_k": 1}).fit(root, ckpt=None)
    assert (root / "mine.txt").read_text() == "mine"
    assert (root / "by-hand.ckpt").is_file()
    stock, _, _ = Case("stock").fit(None, ckpt=root / "by-hand.ckpt")
    assert stock.global_step == 12
