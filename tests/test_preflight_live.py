"""The plan of a run from its live Trainer, against what the run then writes and where a small disk really ends."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback

import lastgood
from lastgood.integrations.transformers.outlook import saves_to_come
from lastgood.manager import RESERVE
from lastgood.planner.ahead import Coming, ahead
from lastgood.planner.live import model_of_module, model_of_trainer, optimizer_of
from lastgood.planner.sizes import Training, sizes
from lastgood.policy import Keep
from lastgood.simulate import simulate

from training import Bytes, Case, Pad, arguments, tiny_gpt2

WIDE = {"n_embd": 64, "n_layer": 2}
Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    """Makes a file system of its own with so many bytes."""
    mounted = []

    def make(size: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("a small disk can only be mounted by root")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def written(root: Path) -> dict[int, int]:
    """Step -> bytes of its checkpoint on disk."""
    return {
        int(path.name.split("-")[1]): sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in root.glob("checkpoint-*")
    }


def warned(caplog: Any) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.name == "lastgood" and r.levelname == "WARNING")


# ---- bytes -------------------------------------------------------------------------------


def half_frozen(trainer: Trainer) -> None:
    for parameter in trainer.model.transformer.h[0].parameters():
        parameter.requires_grad = False


def mixed(trainer: Trainer) -> None:
    trainer.model.transformer.h[1].to(torch.bfloat16)
    for block in trainer.model.transformer.h[1:]:
        block.register_forward_pre_hook(lambda _, args: (args[0].to(torch.bfloat16), *args[1:]))
        block.register_forward_hook(lambda _, args, out: out.float() if isinstance(out, torch.Tensor) else out)


def buffered(trainer: Trainer) -> None:
    trainer.model.register_buffer("kept", torch.zeros(3000, dtype=torch.int64))
    trainer.model.register_buffer("passing", torch.zeros(3000), persistent=False)


def momentum(trainer: Trainer) -> None:
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.01, momentum=0.9)


CASES: dict[str, tuple[Case, Callable[[Trainer], None] | None]] = {
    "plain": (Case("x", model=WIDE), None),
    "lora": (Case("x", model=WIDE, lora=True), None),
    "bf16": (Case("x", model={**WIDE, "dtype": "bfloat16"}), None),
    "adafactor": (Case("x", model=WIDE, args={"optim": "adafactor"}), None),
    "weights alone": (Case("x", model=WIDE, args={"save_only_model": True}), None),
    "epochs": (Case("x", rows=16, model={"n_embd": 256}, args={"max_steps": -1, "save_strategy": "epoch"}), None),
    "half frozen": (Case("x", model=WIDE), half_frozen),
    "two dtypes": (Case("x", model=WIDE), mixed),
    "buffers": (Case("x", model=WIDE), buffered),
    "an optimizer of one's own": (Case("x", model=WIDE), momentum),
}


class Ask(TrainerCallback):
    """What is foretold at the moment at which a managed Trainer looks ahead."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.coming: Coming | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.coming = saves_to_come(self.trainer, [], self.trainer.lastgood.updates_per_epoch)


@pytest.mark.parametrize("name", CASES)
def test_what_is_foretold_is_written(name: str, tmp_path: Path) -> None:
    """The newest checkpoint is a full one, the others were stripped to their weights."""
    case, change = CASES[name]
    ask = Ask()
    ask.trainer = trainer = case.trainer(tmp_path, ask)
    if change is not None:
        change(trainer)
    lastgood.manage(trainer, keep=Keep(full=1)).train()
    coming, found = ask.coming, written(tmp_path)
    assert coming is not None
    assert [coming.step(place) for place in range(len(coming.steps))] == sorted(found)
    last = found.pop(max(found))
    assert coming.size == pytest.approx(last, rel=0.02)
    # A tiny adapter is smaller than the README beside it.
    assert coming.weights * len(found) == pytest.approx(sum(found.values()), rel=0.02, abs=1000 * len(found))


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit", "paged_adamw_32bit", "rmsprop_bnb_8bit", "ademamix"])
def test_optimizers_are_known_by_their_objects(optim: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes has no package for this system")
    trainer = Case("x", model=WIDE, args={"optim": optim}).trainer(tmp_path)
    model = model_of_trainer(trainer)
    asked = sizes(model, Training(optim=optimizer_of(trainer)))
    trainer.create_optimizer()
    assert sizes(model, Training(optim=optimizer_of(trainer))).parts == asked.parts


# ---- the disk ----------------------------------------------------------------------------


def step_of(text: str) -> int:
    match = re.search(r"the save at step (\d+) won't fit", text)
    assert match is not None, text
    return int(match[1])


@pytest.mark.parametrize(
    ("saves", "keep"),
    [(3.5, None), (0.5, None), (3.5, Keep(last=4)), (4.2, Keep(every=6, last=1)), (4.6, Keep(full=2))],
)
def test_a_disk_that_is_too_small(saves: float, keep: Keep | None, disk: Disk, tmp_path: Path, caplog: Any) -> None:
    """The step that is named is the one whose save fails; the policy that is suggested gets through."""
    case = Case("x", model=WIDE, args={"max_steps": 24})
    size = _size(case, tmp_path)
    root = disk(RESERVE + int(saves * size)) / "run"
    lastgood.manage(case.trainer(root), keep=keep).train()
    text = warned(caplog)
    assert text.count("CKS005") == 1 and "are free" in text
    failed = re.search(r"NO CHECKPOINT at step (\d+)", text)
    assert failed is not None and abs(step_of(text) - int(failed[1])) <= 2, text
    caplog.clear()
    again = re.search(r"fix: keep=lastgood\.(Keep\([^)]*\))", text)
    if saves < 2:
        assert again is None and "make room" in text
        return
    assert again is not None
    root = disk(RESERVE + int(saves * size)) / "run"
    chosen = eval(again[1], {"Keep": Keep})
    lastgood.manage(case.trainer(root), keep=chosen).train()
    assert warned(caplog) == ""


def _size(case: Case, tmp_path: Path) -> int:
    """Bytes of a save on a disk of pages."""
    trainer = case.trainer(tmp_path / "unused")
    return sizes(model_of_trainer(trainer), Training(optim=optimizer_of(trainer))).full + (20 << 10)


def test_a_resumed_run_counts_what_it_has(disk: Disk, tmp_path: Path, caplog: Any) -> None:
    case = Case("x", model=WIDE, args={"max_steps": 24})
    root = disk(RESERVE + int(7.5 * _size(case, tmp_path))) / "run"
    with pytest.raises(KeyboardInterrupt):
        lastgood.manage(case.trainer(root, Stop(7))).train()
    first = step_of(warned(caplog))
    caplog.clear()
    lastgood.manage(case.trainer(root)).train(resume_from_checkpoint="auto")
    text = warned(caplog)
    assert step_of(text) == first and "besides" in text and f"NO CHECKPOINT at step {first}" in text


def test_a_resumed_run_lets_go_of_what_it_has(disk: Disk, tmp_path: Path, caplog: Any) -> None:
    case = Case("x", model=WIDE, args={"max_steps": 24})
    root = disk(RESERVE + int(4.5 * _size(case, tmp_path))) / "run"
    with pytest.raises(KeyboardInterrupt):
        lastgood.manage(case.trainer(root, Stop(7))).train()
    assert step_of(warned(caplog)) == 10
    caplog.clear()
    lastgood.manage(case.trainer(root), keep=Keep(last=2)).train(resume_from_checkpoint="auto")
    assert warned(caplog) == ""


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            raise KeyboardInterrupt


def test_a_share_of_the_disk_is_said_once_and_little_is_not(disk: Disk, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "lastgood")
    case = Case("x", model=WIDE)
    lastgood.manage(case.trainer(disk(24 << 20) / "run"), keep=Keep(last=3)).train()
    assert "plan: 4 checkpoints of" in caplog.text and "at most 4 at a time" in caplog.text
    assert warned(caplog) == "" and caplog.text.count("plan:") == 1
    caplog.clear()
    lastgood.manage(Case("x").trainer(disk(200 << 20) / "run")).train()
    assert caplog.text == ""


class Own(torch.optim.AdamW):
    """An optimizer that nobody knows."""


def lazily(trainer: Trainer) -> None:
    trainer.model.register_parameter("later", torch.nn.UninitializedParameter(requires_grad=False))


def test_an_unknown_optimizer_trains_without_a_plan(disk: Disk, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG, "lastgood")
    root = disk(RESERVE + (500 << 10)) / "run"
    trainer = Case("x", model=WIDE).trainer(root)
    trainer.optimizer = Own(trainer.model.parameters(), lr=0.01)
    assert lastgood.manage(trainer).train().global_step == 8
    assert "no plan: the state of" in caplog.text and "CKS005" not in caplog.text


def test_without_a_known_optimizer_the_newest_checkpoint_tells(disk: Disk, tmp_path: Path, caplog: Any) -> None:
    case = Case("x", model=WIDE, args={"max_steps": 24})
    root = disk(RESERVE + int(5.5 * _size(case, tmp_path))) / "run"

    def train(*callbacks: TrainerCallback) -> None:
        trainer = case.trainer(root, *callbacks)
        trainer.optimizer = Own(trainer.model.parameters(), lr=0.01)
        lastgood.manage(trainer).train(resume_from_checkpoint="auto")

    with pytest.raises(KeyboardInterrupt):
        train(Stop(7))
    assert "CKS005" not in caplog.text
    train()
    assert f"NO CHECKPOINT at step {step_of(warned(caplog))}" in caplog.text


@pytest.mark.parametrize("kind", ["meta", "lazy", "nothing"])
def test_what_cannot_be_told_is_a_usage_error(kind: str) -> None:
    with torch.device("meta"):
        meta = torch.nn.Linear(2, 2)
    module = {"meta": meta, "lazy": torch.nn.LazyLinear(3), "nothing": torch.nn.ReLU()}[kind]
    with pytest.raises(lastgood.UsageError):
        model_of_module(module)


# ---- playing ahead -----------------------------------------------------------------------

number = st.one_of(st.none(), st.integers(1, 6))


@given(
    number,
    number,
    number,
    st.sampled_from([None, 10, 15, 20, 70]),
    st.sampled_from([None, 10, 20, 30]),
    st.integers(0, 400),
    st.integers(1, 400_000),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_what_is_not_played_through_is_reckoned_right(
    last: int | None, best: int | None, full: int | None, every: int | None, evaluated: int | None,
    length: int, room: int, larger: bool,
) -> None:  # fmt: skip
    """The whole run, save by save, says the same as the shortened one."""
    mode: Any = "max" if larger else "min"
    keep = Keep(last=last, best=best, full=full, every=every, monitor="x", mode=mode)
    coming = Coming(
        steps=range(10, 10 + 10 * length, 10), end=10 * length, full=3000, weights=1000, evaluated=evaluated
    )
    moments = simulate(list(coming.events(keep, falling=False)), keep)
    found = ahead(coming, keep, room)
    assert found.peak == max((moment.peak for moment in moments), default=0)
    assert found.count == max((len(moment.before) for moment in moments), default=0)
    assert found.full_at == next((moment.step for moment in moments if moment.peak > room), None)


def test_a_large_model_costs_next_to_nothing(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(500)))
    taken = []
    for keep in (Keep(), Keep(last=2, best=2, full=1, monitor="loss"), Keep(last=1, every=700, monitor="loss")):
        for _ in range(3):
            started = time.process_time()
            found = sizes(model_of_module(model), Training(optim="adamw"))
            coming = Coming(
                steps=range(10, 10_010, 10), end=10_000, full=found.full, weights=found.weights, evaluated=10
            )
            ahead(coming, keep, 1 << 50)
            taken.append(time.process_time() - started)
    assert max(taken) < 2, taken  # every save played through would take a minute


# ---- what is there already ---------------------------------------------------------------


def test_a_directory_that_is_healthy_is_silent_and_one_that_is_not_is_said_once(tmp_path: Path, caplog: Any) -> None:
    lastgood.manage(Case("x").trainer(tmp_path / "run")).train()
    lastgood.manage(Case("x").trainer(tmp_path / "run"))
    assert caplog.text == ""
    Case("x", args={"max_steps": 12, "save_steps": 12}).trainer(tmp_path / "run").train()  # without lastgood
    lastgood.manage(Case("x").trainer(tmp_path / "run"))
    assert warned(caplog).count("checkpoint-12") == 1 and "CKR017" in caplog.text and "adopt" in caplog.text


def test_NaN_in_what_would_be_resumed_from_is_said(tmp_path: Path, caplog: Any) -> None:
    trainer = Case("x").trainer(tmp_path / "run", Spoil(5))
    lastgood.manage(trainer).train()
    caplog.clear()
    lastgood.manage(Case("x").trainer(tmp_path / "run"))
    assert "CKC011" in warned(caplog) and "checkpoint-4" in warned(caplog)


class Spoil(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.transformer.wte.weight.fill_(float("nan"))


def test_other_runs_are_said_once(tmp_path: Path, caplog: Any) -> None:
    lastgood.manage(Case("x").trainer(tmp_path / "run")).train()
    lastgood.manage(Case("x", args={"max_steps": 2}).trainer(tmp_path / "run")).train(resume_from_checkpoint=False)
    caplog.clear()
    lastgood.manage(Case("x").trainer(tmp_path / "run"))
    assert warned(caplog).count("CKR007") == 1


def test_a_hundred_checkpoints_are_looked_at_quickly(tmp_path: Path) -> None:
    args = {"max_steps": 100, "save_steps": 1}
    lastgood.manage(Case("x", rows=200, args=args).trainer(tmp_path / "run")).train()
    trainer = Case("x", rows=200, args=args).trainer(tmp_path / "run")
    taken = []
    for _ in range(3):
        started = time.process_time()
        lastgood.manage(trainer)
        taken.append(time.process_time() - started)
    assert min(taken) < 3, taken


# ---- live objects ------------------------------------------------------------------------


def test_plan_takes_a_trainer(tmp_path: Path) -> None:
    case = Case("x", model=WIDE, args={"save_total_limit": 3, "metric_for_best_model": "loss"}, evaluate=True)
    trainer = case.trainer(tmp_path)
    plan = lastgood.plan(trainer)
    assert [use.step for use in plan.lastgood.uses] == [2, 4, 6, 8, 8]
    assert (plan.keep.total, plan.keep.monitor, plan.keep.mode) == (3, "eval_loss", "min")
    assert plan.source == "the live model" and plan.fits and plan.machine.disk is not None
    lastgood.manage(trainer)
    trainer.train()
    found = written(tmp_path)
    assert plan.lastgood.end == pytest.approx(sum(found.values()), rel=0.02) and len(found) == 3
    other = lastgood.plan(trainer, keep_last=1, max_steps=100, save_steps=10, disk=1 << 20)
    assert other.keep.last == 1 and other.schedule.max_steps == 100 and other.machine.disk == 1 << 20
    managed = lastgood.manage(Case("x", model=WIDE).trainer(tmp_path / "b"), keep=Keep(last=2, full=1))
    assert lastgood.plan(managed).keep == Keep(last=2, full=1)


def test_plan_takes_a_module() -> None:
    model = tiny_gpt2(**WIDE)
    plan = lastgood.plan(model, max_steps=10, save_steps=5, train="lora", lora_r=4)
    by_config = lastgood.plan(model.config, max_steps=10, save_steps=5, train="lora", lora_r=4)
    assert plan.sizes.parts == {**by_config.sizes.parts, "beside": plan.sizes.parts["beside"]}
    linear = lastgood.plan(torch.nn.Linear(300, 300), max_steps=10)
    assert linear.sizes.parts["weights"] == pytest.approx(4 * 300 * 301, rel=0.01)


def test_diagnose_takes_live_arguments(tmp_path: Path) -> None:
    found = lastgood.diagnose(args=arguments(tmp_path, save_only_model=True, save_steps=500))
    assert {finding.code for finding in found} == {"CKR016", "CKB007"}
    trainer = Trainer(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=Bytes(8), data_collator=Pad())
    assert lastgood.diagnose(args=trainer.args) == ()
