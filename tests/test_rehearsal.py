"""The first save is rehearsed behind an earlier step: it takes as long as all others, and nothing else is different."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback

import lastgood
import loops
from lastgood import CheckpointManager, SaveFailed
from lastgood.behind import REHEARSED
from lastgood.repo.read import records
from lastgood.state.layout import Layout
from test_adapters import LORA
from test_background_exact import content

import forked
from training import Case, outcome, tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()


def adapter() -> tuple[Any, torch.optim.Optimizer]:
    model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**LORA))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def looped(manager: CheckpointManager, model: Any, optimizer: Any, steps: int) -> None:
    """From the start, with the writer done behind each step."""
    manager.restore()
    for number in range(1, steps + 1):
        trained(model, optimizer)
        manager.step(number)
        manager.settle()


def left(root: Path) -> list[str]:
    return sorted(os.listdir(root / ".lastgood" / "tmp")) if (root / ".lastgood" / "tmp").exists() else []


def run(root: Path, out: Path, name: str, **options: Any) -> None:
    loops.train(name, root, out, every=4, **options)


@pytest.mark.parametrize("name", ["every kind of tensor", "lora", "averages of weights", "batch norm", "extra state"])
def test_I9_a_rehearsed_run_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.run(run, tmp_path / "a", tmp_path / "plain", name, log=log) == 0, log.read_text()
    assert forked.run(run, tmp_path / "b", tmp_path / "behind", name, background=True, log=log) == 0, log.read_text()
    assert (tmp_path / "plain").read_text() == (tmp_path / "behind").read_text()
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert not left(tmp_path / "b")


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    model, optimizer = adapter()
    with CheckpointManager(tmp_path, model=model, optimizer=optimizer, background=True) as manager:
        looped(manager, model, optimizer, 3)
        assert manager._run._warm == "rehearsed"
        assert records(tmp_path) == ()
        assert not left(tmp_path)
        lines = (tmp_path / ".lastgood" / "journal.jsonl").read_text().splitlines()
        assert [json.loads(line)["event"] for line in lines] == ["started"]


@pytest.mark.parametrize("background", [True, lastgood.Background(lazy=False)], ids=["lazy", "at once"])
def test_the_first_save_finds_out_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: Any) -> None:
    model, optimizer = adapter()
    laid, asked = [0], [0]
    whole, state_dict = Layout.of, type(model).state_dict

    def counting(cls: Any, *args: Any) -> Any:
        laid[0] += 1
        return whole(*args)

    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked[0] += self is model
        return state_dict(self, *args, **kwargs)

    monkeypatch.setattr(Layout, "of", classmethod(counting))
    monkeypatch.setattr(type(model), "state_dict", asking)
    with CheckpointManager(tmp_path, model=model, optimizer=optimizer, background=background, on_error="raise") as ckpt:
        ckpt.restore()
        for number in range(1, 8):
            trained(model, optimizer)
            ckpt.step(number)
            ckpt.settle()
            if number == 3:
                before = laid[0], asked[0]
            if number >= 3:
                ckpt.save()
    assert before[0] == 2
    assert before[1] > 0
    # PEFT names the base model in the configuration when it saves, so that the next save is of another one.
    assert laid[0] <= before[0] + 2
    assert asked[0] <= 2 * before[1]


def test_a_save_that_comes_first_is_no_rehearsal(tmp_path: Path) -> None:
    model, optimizer = adapter()
    saved = [0]
    original = model.save_pretrained
    model.save_pretrained = lambda *args, **kwargs: saved.__setitem__(0, saved[0] + 1) or original(*args, **kwargs)
    with CheckpointManager(tmp_path, model=model, optimizer=optimizer, save_steps=2, background=True) as manager:
        looped(manager, model, optimizer, 4)
    assert saved == [2]


def test_what_fails_in_it_is_told_by_the_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = adapter()
    failing = [True]
    original = model.save_pretrained

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        if failing[0]:
            raise RuntimeError("not today")
        return original(*args, **kwargs)

    model.save_pretrained = save_pretrained
    with CheckpointManager(tmp_path, model=model, optimizer=optimizer, background=True, on_error="raise") as manager:
        looped(manager, model, optimizer, 3)
        assert not caplog.records or "not today" not in caplog.text
        assert not left(tmp_path)
        with pytest.raises(SaveFailed, match="not today"):
            manager.save()
        failing[0] = False
        assert manager.save() is not None
    assert [record.step for record in records(tmp_path)] == [3]


def test_of_a_large_state_no_tensor_is_copied(tmp_path: Path) -> None:
    model = torch.nn.Linear(REHEARSED // 4 // 1024, 1024)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CheckpointManager(tmp_path, model=model, optimizer=optimizer, background=True) as manager:
        manager.restore()
        for number in range(1, 4):
            model(torch.ones(1, model.in_features)).sum().backward()
            optimizer.step()
            manager.step(number)
            manager.settle()
        assert manager._run._warm == "rehearsed"
        assert manager._run._arena.held >= REHEARSED
        assert manager._run._arena.used == 0
        manager.save()
    saved = torch.nn.Linear(model.in_features, 1024)
    with CheckpointManager(tmp_path, model=saved, optimizer=torch.optim.SGD(saved.parameters(), lr=0.1)) as manager:
        assert manager.restore() == 3
    assert torch.equal(saved.weight, model.weight)


def dying(root: Path) -> None:
    """Killed while the files of a rehearsal lie in its directory."""
    model, optimizer = adapter()
    original = model.save_pretrained

    def save_pretrained(place: str, **kwargs: Any) -> None:
        original(place, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    model.save_pretrained = save_pretrained
    with CheckpointManager(root, model=model, optimizer=optimizer, background=True) as manager:
        looped(manager, model, optimizer, 8)
    sys.exit(0)


def test_I1_killed_in_it_nothing_but_its_directory_is_left_until_the_next_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.run(dying, tmp_path / "run", log=log) == -signal.SIGKILL, log.read_text()
    root = tmp_path / "run"
    assert len(left(root)) == 1
    model, optimizer = adapter()
    with CheckpointManager(root, model=model, optimizer=optimizer, background=True) as manager:
        assert manager.restore() == 0
        assert not left(root)
        trained(model, optimizer)
        manager.step(1)
        manager.save()
    assert [record.step for record in records(root)] == [1]


# ---- in a Trainer ------------------------------------------------------------------------


def counted(kind: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which `save_model` of this class was called."""
    original, steps = kind.save_model, list[int]()

    @wraps(original)
    def save_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "save_model", save_model)
    return steps


class Own(Trainer):
    def save_model(self, *args: Any, **kwargs: Any) -> Any:
        return super().save_model(*args, **kwargs)


LATER = {"save_steps": 4, "max_steps": 8}


class Waits(TrainerCallback):
    """For the memory, which a test's steps are too short for."""

    busy: Callable[[], bool] = staticmethod(lambda: False)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        while self.busy():
            time.sleep(0.001)


@pytest.mark.parametrize("lora", [True, False])
def test_I9_a_trainer_rehearses_once_and_trains_the_same(
    lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("rehearsed", lora=lora, noise="torch python numpy", args=LATER)
    steps = counted(Trainer, monkeypatch)

    def trained(root: Path, **options: Any) -> tuple[list[int], dict[str, Any]]:
        steps.clear()
        trainer: Any = lastgood.manage(case.trainer(root, waits := Waits()), **options)
        waits.busy = lambda: trainer.lastgood.live.busy
        trainer.train()
        return list(steps), outcome(trainer)

    saved, plain = trained(tmp_path / "a")
    rehearsed, behind = trained(tmp_path / "b", background=True)
    assert (saved, rehearsed) == ([4, 8], [2, 4, 8])
    assert plain == behind
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert not left(tmp_path / "b")


@pytest.mark.parametrize(
    ("kind", "args"), [(Own, LATER), (Trainer, {**LATER, "save_steps": 2}), (Trainer, {**LATER, "save_steps": 1})]
)
def test_nor_code_of_ones_own_nor_where_a_save_is_due(
    kind: type[Trainer], args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = counted(kind, monkeypatch)
    trainer: Any = Case("own", args=args).trainer(tmp_path)
    trainer.__class__ = kind
    lastgood.manage(trainer, background=True).train()
    assert steps == list(range(args["save_steps"], 9, args["save_steps"]))
