"""Exactness with saves in the background, under a writer that is late: every save, every tensor, every kill."""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import Trainer, TrainerCallback

import lastgood
import loops
from lastgood.format import tensors as safetensors
from lastgood.repo.read import records
from lastgood.state import lazy
from lastgood.state.lazy import Pace
from lastgood.store import fs
from lastgood.talk import say
from test_exactness import CASES

import forked
from training import Case, train

WRITER = "lastgood writer"


class Late(fs.FileSystem):
    """The writer is held up before some of its calls, as a disk or another process would; the seed says before which.

    kill: the process is killed before so many of the writer's calls that change the disk.
    """

    def __init__(self, seed: int, longest: float = 0.01, kill: int = 0) -> None:
        self.random, self.longest, self.left = random.Random(seed), longest, kill

    def _held_up(self) -> None:
        if threading.current_thread().name == WRITER:
            if self.random.random() < 0.5:
                time.sleep(self.random.random() * self.longest)
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path: fs.AnyPath, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_CREAT:
            self._held_up()
        return super().open(path, flags, mode)

    def write(self, handle: int, data: bytes | memoryview) -> int:
        self._held_up()
        return super().write(handle, data)

    def sync(self, handle: int) -> None:
        self._held_up()
        super().sync(handle)

    def rename(self, source: fs.AnyPath, target: fs.AnyPath) -> None:
        self._held_up()
        super().rename(source, target)

    def unlink(self, path: fs.AnyPath) -> None:
        self._held_up()
        super().unlink(path)


def late(seed: int) -> Pace:
    """Everything is copied later, in small pieces, each of them maybe not before training wants to go on."""
    late = random.Random(seed)

    def wait(left: int) -> None:
        if late.random() < 0.2:
            time.sleep(late.random() * 0.003)

    return Pace(small=1, piece=1009, wait=wait)


def several(seed: int) -> AbstractContextManager[object]:
    """Of a small state, too, the copy is made by several threads, at every second seed."""
    return patch.object(lazy, "APART", lazy.APART if seed % 2 else 1)


def content(root: Path) -> dict[str, Any]:
    """Every file of every checkpoint as hashes tell, beside what names the moment."""
    found: dict[str, Any] = {}
    for record in records(root):
        assert record.manifest is not None
        one = found[record.name] = {name: entry.hash for name, entry in record.manifest.files.items()}
        saved = (
            json.loads((root / record.name / "trainer_state.json").read_text()) if "trainer_state.json" in one else {}
        )
        for name in ("trainer_state.json", "resume.json"):  # seconds, and where the run lies
            one.pop(name, None)
        one["seq"], one["parts"] = record.seq, record.manifest.parts
        one["best"] = os.path.basename(str(saved.get("best_model_checkpoint")))
    return found


def trained(case: Case, out: Path, result: Path, seed: int, **more: Any) -> None:
    with fs.using(Late(seed)), several(seed):
        train(replace(case, options={**case.options, "background": True}), out, result, pace=late(seed), **more)


CHOSEN = {
    "lora with dropout", "evaluation at the step of the save", "two workers", "adafactor on bf16 weights",
    "save_strategy epoch",
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [c for c in CASES if os.environ.get("EVERY_POINT") or c.name in CHOSEN], ids=lambda case: case.name
)
def test_I1_I8_killed_and_resumed_equals_uninterrupted(case: Case, tmp_path: Path) -> None:
    straight, broken, log = tmp_path / "straight.json", tmp_path / "broken.json", tmp_path / "log"
    assert forked.run(train, case, tmp_path / "a", straight, log=log) == 0, log.read_text()
    assert forked.run(trained, case, tmp_path / "c", broken, 1, log=log) == 0, log.read_text()
    assert json.loads(broken.read_text()) == json.loads(straight.read_text())
    assert content(tmp_path / "c") == content(tmp_path / "a"), "and every checkpoint is the same"
    for number, kill in enumerate(case.kills):
        assert forked.run(trained, case, tmp_path / "b", broken, number, kill=kill, log=log) == -9, log.read_text()
    assert forked.run(trained, case, tmp_path / "b", broken, 9, log=log) == 0, log.read_text()
    assert json.loads(broken.read_text()) == json.loads(straight.read_text()), log.read_text()


class Adds(Trainer):
    """As trl's GRPO does where it controls entropy: something of its own goes into the checkpoint behind the save."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / "mine.json").write_text("{}")


class Uploads(TrainerCallback):
    """As a callback of a service does: reads what it is told of."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "lastgood.json").exists()


@pytest.mark.parametrize("who", ["trainer", "callback"])
def test_who_looks_into_a_checkpoint_finds_it(who: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer: Any = Case("looked at").trainer(tmp_path, *([Uploads()] if who == "callback" else []))
    if who == "trainer":
        trainer.__class__ = Adds
    with fs.using(Late(0)):
        lastgood.manage(trainer, background=True).train()
    assert [record.step for record in records(tmp_path)] == [2, 4, 6, 8]
    assert caplog.text.count("Adds._save_checkpoint" if who == "trainer" else "Uploads.on_save") == 1


def looped(name: str, root: Path, out: Path, seed: int, kill: int = -1, background: bool = True) -> None:
    with fs.using(Late(seed)), several(seed):
        loops.train(name, root, out, kill=kill, every=1, background=background, pace=late(seed))


FEW = ("every kind of tensor", "extra state", "batch norm", "averages of weights", "lora", "frozen layers")


@pytest.mark.parametrize("name", [n for n in loops.RECIPES if os.environ.get("EVERY_POINT") or n in FEW])
def test_I9_a_loop_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    plain, behind, log = tmp_path / "plain", tmp_path / "behind", tmp_path / "log"
    assert forked.run(looped, name, tmp_path / "a", plain, 0, background=False, log=log) == 0, log.read_text()
    assert forked.run(looped, name, tmp_path / "b", behind, 3, log=log) == 0, log.read_text()
    assert behind.read_text() == plain.read_text()
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert forked.run(looped, name, tmp_path / "c", behind, 4, kill=5, log=log) == -9, log.read_text()
    assert forked.run(looped, name, tmp_path / "c", behind, 5, log=log) == 0, log.read_text()
    assert behind.read_text() == plain.read_text()


def ended(root: Path, out: Path, kill: int) -> None:
    """A loop whose writer is killed at its n-th call."""
    with fs.using(Late(kill, longest=0.002, kill=kill)):
        loops.train("batch norm", root, out, every=2, background=True, keep=lastgood.Keep(last=1), pace=late(kill))
    say("done")


def state(out: Path) -> str:
    """Where the loop ended; its last loss isn't known to one that had nothing left to do."""
    return str(ast.literal_eval(out.read_text())["state"])


def test_I1_I3_killed_in_the_writer_it_goes_on_from_one_or_the_other(tmp_path: Path) -> None:
    expected, out, log = tmp_path / "expected", tmp_path / "out", tmp_path / "log"
    assert forked.run(ended, tmp_path / "whole", expected, 0, log=log) == 0, log.read_text()
    point, step, status = 1, 1 if os.environ.get("EVERY_POINT") else 17, -9
    while status == -9:
        root = tmp_path / f"at-{point}"
        status = forked.run(ended, root, out, point, log=log)
        assert forked.run(ended, root, out, 0, log=log) == 0, log.read_text()
        assert state(out) == state(expected), f"killed at {point}: {log.read_text()}"
        assert [record.state for record in records(root)] == ["full"] and not list((root / ".lastgood/tmp").iterdir())
        point += step
    assert status == 0, log.read_text()
    assert point > 1 + step, "the writer has calls that it can be killed at"


def test_what_changes_a_weight_while_it_is_written_changes_no_checkpoint(tmp_path: Path) -> None:
    """Outside of any step, in place and behind everybody's back: the copy is another memory."""
    model = torch.nn.Linear(64, 64)
    before = model.weight.detach().clone()
    with (
        fs.using(Late(0, longest=0.05)),
        lastgood.CheckpointManager(tmp_path, model=model, background=True, save_steps=1) as ckpt,
    ):
        ckpt.restore()
        ckpt.step(1)
        with torch.no_grad():
            model.weight.data.zero_()
        ckpt.settle()
    found = safetensors.load(tmp_path / "checkpoint-1" / "model.safetensors")
    assert bytes(found["weight"].data) == before.numpy().tobytes()
