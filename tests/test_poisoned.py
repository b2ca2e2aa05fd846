"""The guard in real trainings: what is saved while a run is unhealthy is marked, and nothing falls back onto it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import lastgood
from lastgood.errors import CorruptCheckpoint
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import poison
from lastgood.repo.read import records

import cli
import forked
from training import Case, train

ARGS = {"max_steps": 12, "save_steps": 2, "logging_steps": 3, "save_total_limit": 2}
CASE = Case("guarded", args=ARGS)


class Spoil(TrainerCallback):
    """Puts NaN into one weight, or into the gradients of a step; heals: takes it away before it counts."""

    def __init__(self, step: int, where: str, heals: bool = False) -> None:
        self.step, self.where, self.heals = step, where, heals

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step and self.where == "weight":
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = torch.nan

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step and self.where == "gradient":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(0.0 if self.heals else torch.nan)


def spoiled(case: Case, out: Path, step: int, where: str, resume: Any = "auto", **options: Any) -> None:
    trainer = lastgood.manage(case.trainer(out, Spoil(step, where)), **{**case.options, **options})
    trainer.train(resume_from_checkpoint=resume)


def state(out: Path) -> list[tuple[int, bool]]:
    return [(record.step, bool(record.poisoned)) for record in lastgood.open(out).checkpoints]


@pytest.mark.parametrize("trail", [True, False])
def test_nothing_falls_back_onto_a_nan_and_the_next_launch_takes_the_last_healthy_one(
    trail: bool, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    assert forked.run(spoiled, CASE, out, 6, "weight", trail=trail, log=log) == 0, log.read_text()
    # Saved at 2, 4, 6, 8, 10, 12, of which two stay: those are the healthy ones, and the newest bad one for a look.
    assert state(out) == [(4, False), (6, False), (12, True)]
    found = lastgood.open(out)
    assert found.latest().step == 6
    assert found.checkpoints[-1].poisoned == "loss is nan since step 7"
    assert found.checkpoints[-1].manifest is not None
    assert found.checkpoints[-1].manifest.facts["poisoned"] == "loss is nan since step 7"
    assert "POISONED: loss is nan since step 7" in log.read_text()

    said = cli.call("log", out)
    assert "poisoned: loss is nan since step 7" in said.out
    assert "poisoned  " in cli.call("show", 12, "-C", out).out
    assert "poisoned: loss is nan" in cli.call("prune", out, "--keep-last", 1, "--dry-run").out
    resumed = cli.call("resume", out, "--check")
    assert resumed.code == 0 and "checkpoint-12  PASSED OVER  poisoned: loss is nan" in resumed.out
    assert "checkpoint-6 " in resumed.out.splitlines()[1]

    assert forked.run(train, CASE, out, tmp_path / "r.json", log=tmp_path / "log2") == 0
    assert "checkpoint-12: poisoned: loss is nan since step 7" in (tmp_path / "log2").read_text()
    assert forked.run(train, CASE, tmp_path / "straight", tmp_path / "s.json", log=log) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads((tmp_path / "s.json").read_text())
    assert state(out) == [(10, False), (12, False)], "on the branch that was left it went, a newer healthy one is there"


def test_named_by_its_step_it_is_resumed_from_and_said_aloud(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    short = Case("short", args={**ARGS, "max_steps": 8})
    assert forked.run(spoiled, short, out, 6, "weight", log=log) == 0, log.read_text()
    for number, kind in enumerate((int, str)):
        out = shutil.copytree(tmp_path / "run", tmp_path / f"run{number}")
        named = 8 if kind is int else os.fspath(out / "checkpoint-8")
        said = tmp_path / f"log{number}"
        assert forked.run(spoiled, CASE, out, 99, "", named, log=said) == 0, said.read_text()
        assert "checkpoint-8 is POISONED (loss is nan since step 7); it is resumed from" in said.read_text()
        assert lastgood.open(out).latest().step == 6
        assert state(out)[-1] == (12, True), "what comes of it is poisoned as well"


def test_a_gradient_that_somebody_clears_in_time_is_no_poison(tmp_path: Path) -> None:
    class Shield(Spoil):
        """What many scripts have: NaN gradients are thrown away."""

    out, log = tmp_path / "run", tmp_path / "log"

    def shielded() -> None:
        trainer = CASE.trainer(out, Shield(5, "gradient", heals=True))
        inner = trainer._get_grad_norm
        trainer._get_grad_norm = lambda *a, **k: (  # type: ignore[method-assign]
            torch.tensor(torch.nan) if trainer.state.global_step == 5 else inner(*a, **k)
        )
        lastgood.manage(trainer).train(resume_from_checkpoint="auto")

    assert forked.run(shielded, log=log) == 0, log.read_text()
    assert not any(bad for _, bad in state(out)), log.read_text()


def test_gradients_that_are_none_count_at_the_very_step(tmp_path: Path) -> None:
    """The loss of that step is a number still; the weights after it aren't."""
    out, log = tmp_path / "run", tmp_path / "log"

    def run() -> None:
        trainer = CASE.trainer(out)
        step = trainer.training_step

        def spoil(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            if trainer.state.global_step == 7:
                next(p for p in trainer.model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
            return loss

        trainer.training_step = spoil  # type: ignore[method-assign]
        lastgood.manage(trainer).train(resume_from_checkpoint="auto")

    assert forked.run(run, log=log) == 0, log.read_text()
    assert state(out) == [(4, False), (6, False), (12, True)]
    assert "gradient norm is" in lastgood.open(out).checkpoints[-1].poisoned


def test_guard_off_marks_nothing(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    assert forked.run(spoiled, CASE, out, 6, "weight", guard="off", log=log) == 0, log.read_text()
    assert state(out) == [(10, False), (12, False)]


def test_a_blown_up_loss_marks_what_was_saved_before_it_was_known(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    case = Case("up", args={**ARGS, "max_steps": 60, "save_steps": 2, "logging_steps": 1, "save_total_limit": None})

    def run() -> None:
        trainer = lastgood.manage(case.trainer(out))
        step = trainer.training_step

        def blow(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 45:
                with torch.no_grad():
                    for parameter in trainer.model.parameters():
                        parameter.mul_(-40.0)
            return step(*args, **kwargs)

        trainer.training_step = blow  # type: ignore[method-assign]
        trainer.args.learning_rate = 1e-4
        trainer.train(resume_from_checkpoint="auto")

    assert forked.run(run, log=log) == 0, log.read_text()
    found = state(out)
    assert [step for step, bad in found if not bad] == list(range(2, 45, 2)), log.read_text()
    assert json.loads((out / ".lastgood" / "poisoned.json").read_text()), "the first ones were marked later"
    assert cli.call("bisect", "-C", out).out.splitlines()[-1] == "checkpoint-44 is the last healthy one"


# ---- the file of marks -------------------------------------------------------------------


def test_marks_that_can_not_be_read_heal_nothing_and_delete_nothing(tmp_path: Path) -> None:
    root = cli.managed(tmp_path)
    first = records(root)[0]
    poison.mark(root, {first.id: "bad"})
    assert [r.poisoned for r in records(root)] == ["bad", "", ""]
    for damage in (b"[", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000):
        (root / ".lastgood" / poison.NAME).write_bytes(damage)
        assert all("can't be read" in r.poisoned for r in records(root)), damage
        with pytest.raises(CorruptCheckpoint, match="no mark is added"):
            poison.mark(root, {first.id: ""})
        made = Manager(root=root, keep=Keep(last=1))
        with pytest.raises(lastgood.NoCheckpoint, match=r"poisoned.json can't be read: repair or delete it"):
            made.find("last")
        assert cli.call("resume", root).code == 3
    made.open()
    made.retain()
    made.close()
    assert [r.state for r in records(root)] == ["full"] * 3, "nobody knows which ones are the healthy ones"
    assert "nothing to remove" in cli.call("prune", root, "--keep-last", 1, "--yes").err
    (root / ".lastgood" / poison.NAME).unlink()
    made.open()
    made.retain()
    made.close()
    assert [r.step for r in records(root)] == [600]


def test_a_mark_overrules_the_manifest_and_back(tmp_path: Path) -> None:
    root = cli.managed(tmp_path)
    made = Manager(root=root, keep=Keep(monitor="eval_loss"))
    made.open()
    made.begin_from(records(root)[-1])
    made.save(
        700, cli.stage(700), estimate=1, environment={}, arguments={}, facts={poison.FACT: "loss is nan since step 650"}
    )
    assert made.find("last").record.step == 600
    made.record(700, {"eval_loss": 0.0})
    assert made.find("best").record.step == 400
    assert made.find(700).record.poisoned == "loss is nan since step 650", "who names it gets it"
    made.close()
    assert cli.call("bisect", "-C", root, "--unmark", 700).code == 0
    assert records(root)[-1].poisoned == ""
    assert made.find("last").record.step == 700 and made.find("best").record.step == 700
    again = cli.call("bisect", "-C", root, "--unmark", 700)
    assert again.code == 2 and "isn't marked" in again.err
