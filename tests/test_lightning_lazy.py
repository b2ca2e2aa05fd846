"""Lightning's saves in the background: copied while forward and backward run inside of the optimizer's step."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lastgood
from lastgood.repo import journal
from lastgood.repo.read import records
from lastgood.state.lazy import Lazy, Pace
from lastgood.store import fs
from lazily import Gate
from test_background_exact import Late, content, late

import forked
import lightnings
from lightnings import Case, Model, Rows, Signal, Stop, StopAt, Two, outcome

pytestmark = [pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*")]


class Paced(pl.Callback):
    """Everything is copied later, by a writer as late as `pace` has it. later: the saves for which that was so."""

    def __init__(self, pace: Pace) -> None:
        self.pace, self.later = pace, set[int]()

    def on_fit_start(self, trainer: Any, *args: Any) -> None:
        trainer.checkpoint_callback._session.pace = self.pace

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        session = trainer.checkpoint_callback._session
        window = session.manager._window
        if isinstance(window, Lazy) and window._pieces > 0:
            self.later.add(session.saved_step)


def whole(root: Path) -> dict[str, Any]:
    """`content`, and what a resume reads beside the tensors."""
    found = content(root)
    for name, one in found.items():
        one["resume.json"] = json.loads((root / name / "resume.json").read_text())
    return found


def behind(case: Case, **options: Any) -> Case:
    return replace(case, options={**case.options, "background": True, **options})


def with_scheduler() -> Model:
    return Model(scheduler="several")


class Lbfgs(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=2, history_size=2)


CASES = [
    Case("plain"),
    Case("two optimizers", model=Two, every=4, stops=(12,)),
    Case(
        "accumulation", model=with_scheduler, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, every=1,
        stops=(3,),
    ),
    Case("lbfgs", model=Lbfgs, stops=()),
    Case("bf16", trainer={"precision": "bf16-mixed"}),
    Case("ema", callbacks=lightnings.ema, stops=()),
    Case("swa", callbacks=lightnings.swa, trainer={"max_epochs": 4}, stops=(9,)),
]  # fmt: skip
CHOSEN = {"two optimizers", "accumulation", "lbfgs", "ema"}
AT_ONCE = {"ema", "swa"}


@pytest.mark.parametrize(
    "case", [c for c in CASES if os.environ.get("EVERY_POINT") or c.name in CHOSEN], ids=lambda case: case.name
)
def test_I9_the_same_checkpoints_and_the_same_training(case: Case, tmp_path: Path) -> None:
    plain, rows, _ = case.fit(tmp_path / "a")
    paced = Paced(late(1))
    with fs.using(Late(1)):
        trainer, told, _ = behind(case).fit(tmp_path / "b", paced)
    assert outcome(trainer) == outcome(plain) and told.rows == rows.rows
    assert whole(tmp_path / "b") == whole(tmp_path / "a") and len(whole(tmp_path / "a")) > 4
    assert bool(paced.later) == (case.name not in AT_ONCE)
    for stop in case.stops[:1]:
        with pytest.raises(Stop), fs.using(Late(stop)):
            behind(case).fit(tmp_path / "c", StopAt(stop), Paced(late(stop)))
        with fs.using(Late(stop + 1)):
            resumed, _, callback = behind(case).fit(tmp_path / "c", Paced(late(stop + 1)))
        assert callback.report is not None and outcome(resumed) == outcome(plain)


class Asks(pl.Callback):
    """What a program reads of the callback while training goes on."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.told.append(Path(trainer.checkpoint_callback.best_model_path).name)


def test_which_one_is_the_best_is_answered_by_the_disk(tmp_path: Path) -> None:
    case, before, now = Case("asked", options={"monitor": "train_loss", "save_top_k": 2}, every=1), Asks(), Asks()
    case.fit(tmp_path / "a", before)
    with fs.using(Late(3)):
        behind(case).fit(tmp_path / "b", now, Paced(late(3)))
    assert now.told == before.told and len(set(before.told)) > 3


def killed(case: Case, root: Path, seed: int, at: int) -> None:
    with fs.using(Late(seed)):
        case.fit(root, StopAt(at, lambda: os.kill(os.getpid(), signal.SIGKILL)), Paced(late(seed)))


def test_I1_I8_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    case = behind(Case("killed", data="noise", every=1))
    expected, _, _ = case.fit(tmp_path / "whole")
    for number, at in enumerate((3, 8)):
        status = forked.run(killed, case, tmp_path / "run", number, at, log=tmp_path / "log")
        assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
    with fs.using(Late(5)):
        resumed, _, callback = case.fit(tmp_path / "run", Paced(late(5)))
    assert callback.report is not None and outcome(resumed) == outcome(expected)


class Fails(Model):
    """Raises inside of the closure of a step, behind backward."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 4:
            raise Stop


def term(case: Case, root: Path) -> None:
    with fs.using(Late(7)):
        case.fit(root, Signal(4), Paced(late(7)))


def test_I20_what_is_in_memory_is_committed_on_the_way_out(tmp_path: Path) -> None:
    """A SIGTERM, and an error inside of a closure: the window of the save before is open, and nothing has changed."""
    case = behind(Case("term", every=1))
    expected, _, _ = case.fit(tmp_path / "whole")
    assert forked.run(term, case, tmp_path / "a", log=tmp_path / "log") == 75, (tmp_path / "log").read_text()
    with pytest.raises(Stop), fs.using(Late(8)):
        replace(case, model=Fails).fit(tmp_path / "b", Paced(late(8)))
    assert [record.step for record in records(tmp_path / "b")] == [1, 2, 3, 4]
    for root in (tmp_path / "a", tmp_path / "b"):
        there = whole(root)
        assert {name: tensors({name: one}) for name, one in there.items()} == {
            name: tensors({name: one}) for name, one in whole(tmp_path / "whole").items() if name in there
        }
        resumed, _, _ = case.fit(root)
        assert outcome(resumed) == outcome(expected)


class Acting(pl.Callback):
    """Lets the writer go on inside of the training step behind the save of step 4, when `act` was done."""

    def __init__(self, act: Callable[[Any], object], gate: Gate) -> None:
        self.act, self.gate, self.open = act, gate, list[bool]()

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        session = trainer.checkpoint_callback._session
        if trainer.global_step == 4 and session is not None and not self.open:
            window = session.manager._window
            self.open.append(isinstance(window, Lazy) and window.open)
            assert not self.open[0] or self.gate.held.wait(120)
            self.act(module)
            self.gate.go.set()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            until = time.monotonic() + 100
            while trainer.checkpoint_callback._session.manager.busy:  # what became of it is known at the end of step 5
                assert time.monotonic() < until
                time.sleep(0.005)


def nothing(module: Any) -> None: ...


def clamped(module: Any) -> None:
    module.head.weight.data.clamp_(-1e-3, 1e-3)


def moments(module: Any) -> None:
    next(iter(module.optimizers().optimizer.state.values()))["exp_avg"].zero_()


def watched(root: Path, act: Callable[[Any], object], background: Any, model: Any = Model) -> Any:
    gate = Gate()
    acting = Acting(act, gate)
    case = Case("acted", model=model, options={"background": background, "monitor": "train_loss"}, validate=False)

    def wait(left: int) -> None:
        if [event for event in journal.read(root) if event["event"] == "saved"]:  # the one of step 2
            gate(left)

    try:
        trainer, _, _ = case.fit(root, acting, Paced(Pace(small=1, piece=1009, wait=wait)))
    finally:
        gate.go.set()
    return outcome(trainer), acting.open


LATE = lastgood.Background()
AT_FIRST = lastgood.Background(lazy=False)


@pytest.mark.parametrize("act", [nothing, clamped, moments], ids=lambda act: act.__name__)
def test_what_a_training_step_changes_is_found_out(
    act: Callable[[Any], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, was_open = watched(tmp_path / "a", act, AT_FIRST)
    assert was_open == [False]
    found, was_open = watched(tmp_path / "b", act, LATE)
    assert was_open == [True], "nothing of it is copied before the update"
    assert found == expected
    steps = [record.step for record in records(tmp_path / "b")]
    a, b = whole(tmp_path / "a"), whole(tmp_path / "b")
    if act is nothing:
        assert steps == [2, 4, 6, 8, 10, 12] and tensors(b) == tensors(a)
    else:
        assert caplog.text.count("step 4 was not saved") == 1
        assert steps == [2, 5, 6, 8, 10, 12], "5 in the place of 4"
        for name in set(a) & set(b):
            assert tensors({name: b[name]}) == tensors({name: a[name]})


def tensors(found: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in one.items() if k.endswith(".safetensors")} for name, one in found.items()}


class Shrinks(torch.optim.AdamW):
    """Changes weights behind torch's back, and then calls the closure."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(0.9)
        return super().step(closure)


class Shrinking(Model):
    def configure_optimizers(self) -> Any:
        return Shrinks(self.parameters(), lr=0.05)


def test_an_optimizer_that_changes_weights_before_the_closure(tmp_path: Path) -> None:
    """What it changes is copied before its step, whatever the writer has time for."""
    expected, _ = watched(tmp_path / "a", nothing, AT_FIRST, Shrinking)
    found, was_open = watched(tmp_path / "b", nothing, LATE, Shrinking)
    assert found == expected and was_open == [False]
    assert whole(tmp_path / "b") == whole(tmp_path / "a") and len(whole(tmp_path / "a")) == 6


class Swapped(Model):
    """An average of its own is put in the place of the weights for each validation."""

    def on_validation_start(self) -> None:
        self.kept = [p.detach().clone() for p in self.parameters()]
        for parameter in self.parameters():
            parameter.data.mul_(0.5)

    def on_validation_end(self) -> None:
        for parameter, kept in zip(self.parameters(), self.kept, strict=True):
            parameter.data.copy_(kept)


def test_weights_that_are_replaced_for_a_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The save before a validation has its metric: it is made at once, and none is lost."""
    case = Case("swapped", model=Swapped, trainer={"val_check_interval": 2}, every=2)
    case.fit(tmp_path / "a")
    paced = Paced(late(2))
    with fs.using(Late(2)):
        behind(case).fit(tmp_path / "b", paced)
    assert not paced.later and "was not saved" not in caplog.text
    assert whole(tmp_path / "b") == whole(tmp_path / "a") and len(whole(tmp_path / "a")) == 6


class Spoils(pl.Callback):
    """Weights change in the last hooks of a fit, behind the save of its last step."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == 12:
            assert self.gate.held.wait(120)
            module.head.weight.data.mul_(2)
            self.gate.go.set()


def test_a_last_save_that_was_spoilt_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    def wait(left: int) -> None:
        if [event for event in journal.read(tmp_path / "run") if event["event"] == "saved"]:
            gate(left)

    case = behind(Case("last", trainer={"val_check_interval": 6}, every=6))
    try:
        trainer, _, _ = case.fit(tmp_path / "run", Spoils(gate), Paced(Pace(small=1, piece=1009, wait=wait)))
    finally:
        gate.go.set()
    assert caplog.text.count("step 12 was not saved") == 1
    assert [record.step for record in records(tmp_path / "run")] == [6, 12]
    kept = lastgood.lightning_file(tmp_path / "run" / "checkpoint-12")
    saved = torch.load(kept, weights_only=False)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in trainer.lightning_module.state_dict().items())
    assert len(Rows()) == 24, "of four a batch: six steps an epoch"
