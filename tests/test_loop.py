"""CheckpointManager: a loop that is killed goes on as if nothing had happened; what can't be stored is refused."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
import loops
from lastgood.errors import (
    Incompatible,
    IncompleteRestore,
    NoCheckpoint,
    NotSupported,
    Preempted,
    RunLocked,
    SaveFailed,
    UsageError,
)
from lastgood.model import Record
from lastgood.state.fingerprint import live_tensors
from lastgood.state.tensors import digest, same_bits
from loops import Net, Recipe, simple

import forked
import training
from cli import call, flip


@pytest.mark.parametrize("name", loops.RECIPES)
def test_I1_I4_killed_and_resumed_is_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    expected = loops.train(name, tmp_path / "whole", None)
    for kill in (5, 7):
        log = tmp_path / "log"
        assert forked.run(loops.train, name, tmp_path / "run", None, kill=kill, log=log) == -9, log.read_text()
    assert loops.train(name, tmp_path / "run", None) == expected


def test_I1_a_loader_that_had_not_begun_at_the_save(tmp_path: Path) -> None:
    """It begins first, and the others go on behind it under the generators that it has left."""
    expected, log = loops.train("three loaders", tmp_path / "whole", None), tmp_path / "log"
    assert forked.run(loops.train, "three loaders", tmp_path / "run", None, kill=3, log=log) == -9, log.read_text()
    assert loops.train("three loaders", tmp_path / "run", None) == expected


def trained(root: Path, recipe: Recipe, steps: int = 2, **options: Any) -> list[Record]:
    """So many steps with a save at each; what is on disk then."""
    with lastgood.CheckpointManager(root, save_steps=1, on_error="raise", **options, **recipe.parts) as ckpt:
        for step in range(ckpt.restore(), steps):
            ckpt.step(step + 1, loss=recipe.step(step))
    return [record for record in lastgood.open(root).checkpoints if record.ours]


# ---- what can't be stored -----------------------------------------------------------------


def holding(**tensors: Any) -> Recipe:
    recipe = simple(Net())
    for name, tensor in tensors.items():
        recipe.parts["model"].register_buffer(name, tensor)
    return recipe


@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("sparse", lambda: torch.eye(3).to_sparse()),
        ("csr", lambda: torch.eye(3).to_sparse_csr()),
        ("wide", lambda: torch.zeros(2, dtype=torch.complex128)),
        ("quantised", lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
        ("nested", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
        ("far", lambda: torch.empty(3, device="meta")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors.*", "ignore:.*[Ss]parse.*", "ignore:.*[Qq]uanti.*")
def test_I8_a_tensor_that_would_not_come_back_is_refused_by_name(what: str, make: Any, tmp_path: Path) -> None:
    recipe = holding(**{what: make()})
    with pytest.raises(UsageError if what == "far" else NotSupported, match=what):  # nothing fills "far" at the start
        trained(tmp_path / "run", recipe)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_state_that_only_pickle_could_hold_is_refused_with_its_place(tmp_path: Path) -> None:
    recipe = simple(Net(), mine={"a": [1, {"deep": print}]})
    with pytest.raises(NotSupported, match=r"mine\.a\.1\.deep holds a builtins.builtin_function"):
        trained(tmp_path / "run", recipe)


def test_an_optimizer_of_parameters_that_nobody_saves_is_refused(tmp_path: Path) -> None:
    recipe = simple(Net())
    with pytest.raises(UsageError, match="optimizer trains 4 parameters that belong to none of the parts"):
        lastgood.CheckpointManager(tmp_path, optimizer=recipe.parts["optimizer"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to save"),
        ({"model": 3}, "model must be a model, an optimizer"),
        ({"model": Net(), "resume": {}}, "'resume' can't name a part"),
        ({"model": Net(), "save_steps": 0}, "save_steps must be a whole number"),
        ({"model": Net(), "save_seconds": "soon"}, "save_seconds='soon' is not a time"),
        ({"model": Net(), "keep": 3}, "keep must be a lastgood.Keep"),
        ({"model": Net(), "save_best": True}, "best by which metric"),
        ({"model": Net(), "allow_missing": "ema"}, "allow_missing must be a list"),
        ({"model": Net(), "on_error": "ignore"}, "on_error must be 'warn' or 'raise'"),
        ({"model": nn.LazyLinear(3)}, "has no shape yet"),
        ({"model": Net(), "accelerator": 3}, "accelerator must be an accelerate.Accelerator"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_wrong_options_are_refused_at_once(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        lastgood.CheckpointManager(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_calls_in_the_wrong_order_say_which_is_right(tmp_path: Path) -> None:
    recipe = simple(Net())
    ckpt = lastgood.CheckpointManager(tmp_path, save_steps=2, **recipe.parts)
    for too_early in (lambda: ckpt.step(1), lambda: ckpt.record(1, a=1), ckpt.save):
        with pytest.raises(UsageError, match=r"before restore\(\)"):
            too_early()
    assert ckpt.restore() == 0
    with pytest.raises(UsageError, match="called already"):
        ckpt.restore()
    ckpt.step(3)
    with pytest.raises(UsageError, match="counted upwards"):
        ckpt.step(2)
    recipe.step(3)
    with pytest.raises(UsageError, match=r"save\(\) after model, optimizer changed since step\(3\)"):
        ckpt.save()
    ckpt.close()
    ckpt.close()
    with pytest.raises(UsageError, match=r"after close\(\)"):
        ckpt.step(4)


# ---- what is on disk ----------------------------------------------------------------------


def test_other_tools_open_the_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    recipe = loops.gan()
    (record,) = trained(tmp_path, recipe, steps=1)
    for name in ("generator", "critic"):
        state = load_file(tmp_path / record.name / f"{name}.safetensors")
        recipe.parts[name].load_state_dict(state)
    fine = loops.gpt2()
    trained(tmp_path / "hf", fine, steps=1)
    from transformers import GPT2LMHeadModel

    again = GPT2LMHeadModel.from_pretrained(tmp_path / "hf" / "checkpoint-1")
    assert all(same_bits(a, b) for a, b in zip(again.parameters(), fine.parts["model"].parameters(), strict=True))


def test_I26_no_pickle_and_no_secret_in_a_checkpoint(tmp_path: Path) -> None:
    trained(
        tmp_path, loops.keeping(), arguments={"lr": 0.1, "hub_token": "hf_canary", "url": "https://me:canary@host/x"}
    )
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"canary" not in data, path
            assert not data.startswith((b"\x80\x02", b"\x80\x04", b"PK")), path


def test_retention_is_the_policy_s_and_strips(tmp_path: Path) -> None:
    keep = lastgood.Keep(last=2, best=1, full=1, monitor="score", mode="max")
    recipe = simple(Net())
    with lastgood.CheckpointManager(tmp_path, save_steps=1, keep=keep, **recipe.parts) as ckpt:
        for step in range(ckpt.restore(), 6):
            ckpt.step(step + 1, loss=recipe.step(step))
            ckpt.record(step + 1, score=-abs(step - 2))
    run = lastgood.open(tmp_path)
    assert [(r.step, r.state) for r in run.checkpoints] == [(3, "weights"), (5, "weights"), (6, "full")]
    assert run.best("score", "max").step == 3


def test_the_command_line_reads_a_loop_s_run(tmp_path: Path) -> None:
    """What another tool has no place for is named; several models aren't taken for one."""
    recipe = loops.keeping()
    trained(tmp_path / "one", recipe, steps=1)
    for verb in (["log"], ["show", "latest"], ["verify", "--full"], ["doctor"], ["resume", "--check"], ["bisect"]):
        code, out, err = call("-C", tmp_path / "one", *verb)
        assert code == 0, (verb, out, err)
    code, out, err = call("-C", tmp_path / "one", "export", "latest", tmp_path / "acc", "--to", "accelerate")
    assert code == 0 and "not in it: counters of the source" in err, (out, err)
    trained(tmp_path / "two", loops.gan(), steps=1)
    code, out, err = call("-C", tmp_path / "two", "export", "latest", tmp_path / "x", "--to", "accelerate")
    assert code == 1 and "holds the models generator, critic of a loop" in err, (code, out, err)
    code, out, err = call("-C", tmp_path / "two", "checkout", "latest", tmp_path / "plain")
    assert code == 0 and sorted(p.name for p in (tmp_path / "plain").iterdir()) == [
        "critic.safetensors", "generator.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tied", "every kind of tensor", "extra state", "averages of weights"])
def test_what_load_gives_a_state_dict_takes(name: str, tmp_path: Path) -> None:
    recipe = loops.seeded(name)
    trained(tmp_path, recipe)
    best = lastgood.open(tmp_path).latest()
    fresh = loops.RECIPES[name]()
    for part in [part for part in recipe.parts if isinstance(recipe.parts[part], nn.Module)]:
        told = fresh.parts[part].load_state_dict(best.load(part))
        assert not told.unexpected_keys and not told.missing_keys
        expected = recipe.parts[part].state_dict()
        for key, tensor in fresh.parts[part].state_dict().items():
            if isinstance(tensor, torch.Tensor):
                assert same_bits(tensor, expected[key]), key
    if name == "extra state":
        assert fresh.parts["model"].history == recipe.parts["model"].history


# ---- what a restore refuses ----------------------------------------------------------------


def again(root: Path, recipe: Recipe, start: Any = "auto", **more: Any) -> int:
    match = {name: more.pop(name) for name in ("rename", "new", "gone", "cast") if name in more}
    with lastgood.CheckpointManager(root, **more, **recipe.parts) as ckpt:
        return ckpt.restore(start, **match)


def fingerprint(recipe: Recipe) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in live_tensors(recipe.parts["model"]).items()}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda r: r.parts.pop("scheduler"), IncompleteRestore, "holds scheduler, which this run doesn't have"),
        (lambda r: r.parts.update(counters={}), IncompleteRestore, "holds no counters"),
        (lambda r: r.parts.update(model=Net(width=16)), Incompatible, "another shape or dtype"),
        (lambda r: r.parts.update(model=Net(norm=True)), Incompatible, "tensors differ"),
        (lambda r: r.parts.update(model=r.parts["model"].to(torch.bfloat16)), Incompatible, "another shape or dtype"),
    ],
)
def test_I9_a_run_that_differs_is_refused_before_anything_changes(
    change: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    trained(tmp_path, loops.scheduled("cosine"))
    recipe = loops.scheduled("cosine")
    change(recipe)
    if recipe.parts["model"] is not None:
        recipe.parts["optimizer"] = torch.optim.AdamW(recipe.parts["model"].parameters(), lr=1e-2)
        if "scheduler" in recipe.parts:
            recipe.parts["scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(recipe.parts["optimizer"], 50)
    before = fingerprint(recipe)
    with pytest.raises(error, match=said):
        again(tmp_path, recipe)
    assert fingerprint(recipe) == before
    assert not recipe.parts["optimizer"].state


def test_I9_another_optimizer_or_other_parameters_are_named(tmp_path: Path) -> None:
    trained(tmp_path, simple(Net()))
    with pytest.raises(Incompatible, match=r"holds the state of torch\.optim\.adamw\.AdamW, the run uses"):
        again(tmp_path, simple(Net(), torch.optim.SGD))
    with pytest.raises(Incompatible, match=r"optimizer's parameters differ.*gone: embed.weight"):
        again(tmp_path, loops.frozen())
    assert again(tmp_path, simple(Net())) == 2


def test_what_may_be_missing_is_named_by_the_caller(tmp_path: Path) -> None:
    trained(tmp_path, loops.scheduled("cosine"))
    recipe = simple(Net(), counters={"n": 1})
    with lastgood.CheckpointManager(tmp_path, allow_missing=["scheduler", "counters"], **recipe.parts) as ckpt:
        assert ckpt.restore() == 2
        assert ckpt.report is not None and ckpt.report.missing == ("counters",)


def test_I2_I3_a_damaged_one_is_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, simple(Net()), steps=3)
    flip(tmp_path / "checkpoint-3" / "optimizer.safetensors")
    with caplog.at_level("INFO", logger="lastgood"):
        assert again(tmp_path, simple(Net())) == 2
    assert "skipped checkpoint-3: " in caplog.text
    assert [p.name.partition(".")[0] for p in (tmp_path / ".lastgood" / "quarantine").iterdir()] == ["checkpoint-3"]


def test_a_trainer_s_checkpoint_is_not_taken_for_a_loop_s(tmp_path: Path) -> None:
    training.train(training.Case("short", args={"max_steps": 2}), tmp_path / "run", tmp_path / "out.json")
    with pytest.raises(NotSupported, match="was written by a Trainer, whose loop this isn't"):
        again(tmp_path / "run", simple(Net()))


def test_tied_weights_load_by_every_name_without_the_model_s_own_reader(tmp_path: Path) -> None:
    first, second = loops.gpt2().parts["model"], Net(tied=True)
    with lastgood.CheckpointManager(tmp_path, model=first, second=second) as ckpt:
        ckpt.restore()
        ckpt.step(1)
        ckpt.save()
    found = lastgood.open(tmp_path).latest()
    for part, model in (("model", loops.gpt2().parts["model"]), ("second", Net(tied=True))):
        model.load_state_dict(found.load(part))
        live = first if part == "model" else second
        assert all(same_bits(tensor, live.state_dict()[name]) for name, tensor in model.state_dict().items())
    case = training.Case("tied", args={"max_steps": 1, "save_steps": 1})
    training.train(case, tmp_path / "trainer", tmp_path / "out.json")
    model = training.tiny_gpt2(seed=3)
    model.load_state_dict(lastgood.open(tmp_path / "trainer").latest().load())
    assert model.lm_head.weight is model.transformer.wte.weight


# ---- models that aren't quite the same -------------------------------------------------------


class Wrapped(nn.Module):
    """The same model with other names, a head of its own, and without the old head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Net()
        del self.backbone.head
        self.classifier = nn.Linear(8, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.backbone.norm(self.backbone.embed(rows[:, :-1]).flatten(0, 1)))


def test_names_that_differ_are_matched_by_pattern_and_optimizers_follow(tmp_path: Path) -> None:
    old = simple(Net())
    trained(tmp_path, old)
    names = {"rename": {"*": "backbone.*"}, "new": ["classifier.*"], "gone": ["head.*"]}
    with pytest.raises(Incompatible, match=r"new: classifier.bias, classifier.weight; gone: head.weight"):
        again(tmp_path, simple(Wrapped()), rename={"*": "backbone.*"})
    recipe = simple(Wrapped())
    fresh = recipe.parts["model"].classifier.weight.clone()
    assert again(tmp_path, recipe, **names) == 2
    model = recipe.parts["model"]
    assert same_bits(model.backbone.embed.weight, old.parts["model"].embed.weight)
    assert same_bits(model.classifier.weight, fresh)
    mine, theirs = recipe.parts["optimizer"].state, old.parts["optimizer"].state
    assert same_bits(mine[model.backbone.embed.weight]["exp_avg"], theirs[old.parts["model"].embed.weight]["exp_avg"])
    assert model.classifier.weight not in mine


def test_another_dtype_has_to_be_asked_for(tmp_path: Path) -> None:
    old = simple(Net())
    trained(tmp_path, old)
    recipe = simple(Net().to(torch.bfloat16))
    assert again(tmp_path, recipe, cast=True) == 2
    assert same_bits(recipe.parts["model"].head.weight, old.parts["model"].head.weight.to(torch.bfloat16))


def test_a_new_run_begins_with_another_s_weights_and_remembers_it(tmp_path: Path) -> None:
    old = simple(Net())
    trained(tmp_path / "old", old)
    source = lastgood.open(tmp_path / "old").latest()
    for launch in range(2):
        recipe = simple(Net())
        with lastgood.CheckpointManager(
            tmp_path / "new", save_steps=1, init=tmp_path / "old" / source.name, **recipe.parts
        ) as ckpt:
            assert ckpt.restore() == launch
            if not launch:
                assert same_bits(recipe.parts["model"].head.weight, old.parts["model"].head.weight)
                assert not recipe.parts["optimizer"].state
            ckpt.step(launch + 1, loss=recipe.step(launch))
    for record in lastgood.open(tmp_path / "new").checkpoints:
        assert record.manifest is not None
        assert record.manifest.facts["init"] == {
            "run": source.manifest and source.manifest.run, "id": source.id, "step": 2, "name": "checkpoint-2",
        }  # fmt: skip


# ---- when it saves, and how it ends -----------------------------------------------------------


def test_a_loop_s_own_error_saves_the_last_whole_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = simple(nn.Sequential(nn.Embedding(256, 4), nn.Flatten(0, 1), nn.Linear(4, 256)))
    recipe.loss = lambda model, rows: model(rows).square().mean()  # type: ignore[method-assign]

    def loop() -> None:
        with lastgood.CheckpointManager(tmp_path, save_steps=100, **recipe.parts) as ckpt:
            for step in range(ckpt.restore(), 9):
                if step == 5:
                    recipe.loss(recipe.parts["model"], recipe.batch())
                    raise ValueError("mine")
                ckpt.step(step + 1, loss=recipe.step(step))

    with caplog.at_level("INFO", logger="lastgood"), pytest.raises(ValueError, match="mine"):
        loop()
    assert [r.step for r in lastgood.open(tmp_path).checkpoints] == [5]
    assert "ValueError after step 5: saved as step 5" in caplog.text


class Copying(loops.Average):
    """Its state dict is made of copies, and takes its time."""

    def state_dict(self) -> dict[str, Any]:
        sum(range(3_000_000))
        return {"shadow": {name: tensor.clone() for name, tensor in self.shadow.items()}}


def test_of_a_state_that_costs_too_much_to_look_at_only_an_error_is_in_doubt(tmp_path: Path) -> None:
    recipe = simple(nn.Sequential(nn.Embedding(256, 4), nn.Flatten(0, 1), nn.Linear(4, 256)))
    recipe.loss = lambda model, rows: model(rows).square().mean()  # type: ignore[method-assign]
    recipe.parts["average"] = Copying(recipe.parts["model"])

    def loop(until: int, fail: int = -1) -> None:
        with lastgood.CheckpointManager(tmp_path, save_steps=100, **recipe.parts) as ckpt:
            for step in range(ckpt.restore(), until):
                ckpt.step(step + 1, loss=recipe.step(step))
                if step == 1:
                    assert ckpt.save() is not None
                if step == fail:
                    raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        loop(5, fail=3)
    assert [r.step for r in lastgood.open(tmp_path).checkpoints] == [2]
    loop(5)
    assert [r.step for r in lastgood.open(tmp_path).checkpoints] == [2, 5]


def test_an_error_inside_an_update_saves_nothing_half_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = simple(Net())

    def loop() -> None:
        with lastgood.CheckpointManager(tmp_path, save_steps=100, **recipe.parts) as ckpt:
            for step in range(ckpt.restore(), 9):
                loss = recipe.step(step)
                if step == 5:
                    raise ValueError("mine")
                ckpt.step(step + 1, loss=loss)

    with caplog.at_level("INFO", logger="lastgood"), pytest.raises(ValueError, match="mine"):
        loop()
    assert not lastgood.open(tmp_path).checkpoints
    assert "ValueError after step 5: not saved, because model, optimizer changed since step 5" in caplog.text


def test_the_last_step_of_a_loop_is_saved(tmp_path: Path) -> None:
    recipe = simple(Net())
    with lastgood.CheckpointManager(tmp_path, save_steps=4, **recipe.parts) as ckpt:
        for step in range(ckpt.restore(), 6):
            ckpt.step(step + 1, loss=recipe.step(step))
    assert [r.step for r in lastgood.open(tmp_path).checkpoints] == [4, 6]
    assert again(tmp_path, simple(Net())) == 6


def endless(root: Path, number: int, at: int = 3) -> None:
    recipe = simple(Net())
    with lastgood.CheckpointManager(root, save_steps=1000, **recipe.parts) as ckpt:
        for step in range(ckpt.restore(), 10_000):
            if step == at:
                os.kill(os.getpid(), number)
            ckpt.step(step + 1, loss=recipe.step(step))
            if number == signal.SIGUSR1 and step == at + 2:
                return


@pytest.mark.parametrize(
    ("number", "status", "steps"),
    [(signal.SIGTERM, 75, [4]), (signal.SIGUSR2, 75, [4]), (signal.SIGUSR1, 0, [4, 6])],
)
def test_signals_save_and_leave_with_75_or_go_on(number: int, status: int, steps: list[int], tmp_path: Path) -> None:
    assert forked.run(endless, tmp_path / "run", number, log=tmp_path / "log") == status, (tmp_path / "log").read_text()
    assert [r.step for r in lastgood.open(tmp_path / "run").checkpoints] == steps


def test_an_evaluation_changes_nothing_of_the_training(tmp_path: Path) -> None:
    ends = []
    for often in (0, 1):
        torch.manual_seed(3)
        recipe = simple(Net())
        with lastgood.CheckpointManager(tmp_path / str(often), save_steps=2, **recipe.parts) as ckpt:
            for step in range(ckpt.restore(), 4):
                ckpt.step(step + 1, loss=recipe.step(step))
                if often:
                    with ckpt.apart():
                        torch.rand(100)
                    ckpt.record(step + 1, score=float(torch.rand(5).sum()))
        ends.append(loops.state(recipe))
    assert ends[0] == ends[1]


def test_what_a_resume_will_cost_is_said_at_a_save_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lastgood.integrations.torch.loader.LONG", 0.0)
    for kind, said in (("stream", 1), ("shuffled", 0)):
        caplog.clear()
        recipe = loops.loading(kind)
        with lastgood.CheckpointManager(tmp_path / kind, save_steps=1, **recipe.parts) as ckpt:
            start = ckpt.restore()
            recipe.begin(ckpt)
            for step in range(start, 3):
                ckpt.step(step + 1, loss=recipe.step(step))
        assert caplog.text.count("batches are loaded again") == said, caplog.text
    facts = lastgood.open(tmp_path / "stream").latest().facts
    assert "3 batches are loaded again" in facts["to_resume"]["dataloader"]  # type: ignore[index]


def test_metrics_of_earlier_steps_and_launches_find_their_checkpoint(tmp_path: Path) -> None:
    keep = lastgood.Keep(monitor="acc", mode="max")
    trained(tmp_path, simple(Net()), steps=3, keep=keep)
    recipe = simple(Net())
    with lastgood.CheckpointManager(tmp_path, save_steps=10, save_best=True, keep=keep, **recipe.parts) as ckpt:
        assert ckpt.restore() == 3
        ckpt.record(2, acc=0.5)
        for step in range(3, 6):
            ckpt.step(step + 1, loss=recipe.step(step))
            ckpt.record(step + 1, acc=torch.tensor([0.4, 0.9, 0.7][step - 3]))
        assert ckpt.load_best().step == 5
    run = lastgood.open(tmp_path)
    assert run.best("acc", "max").step == 5
    assert {r.step: r.metrics.get("acc") for r in run.checkpoints}[2] == 0.5


def test_I15_a_second_loop_fails_fast(tmp_path: Path) -> None:
    with lastgood.CheckpointManager(tmp_path, **simple(Net()).parts) as first:
        first.restore()
        with pytest.raises(RunLocked, match=f"process {os.getpid()} "):
            lastgood.CheckpointManager(tmp_path, **simple(Net()).parts).restore()
    assert again(tmp_path, simple(Net())) == 0


def test_a_disk_that_is_full_warns_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = simple(Net())
    trained(tmp_path, recipe, steps=1)
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoint-1").iterdir()}
    os.chmod(tmp_path / ".lastgood" / "tmp", 0o755)
    blocked = tmp_path / ".lastgood" / "tmp"
    blocked.rmdir()
    blocked.write_text("in the way")
    with lastgood.CheckpointManager(tmp_path, save_steps=1, **recipe.parts) as ckpt:
        for step in range(ckpt.restore(), 3):
            ckpt.step(step + 1, loss=recipe.step(step))
    assert "NO CHECKPOINT at step 2" in caplog.text
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoint-1").iterdir()} == before
    with pytest.raises(SaveFailed):
        trained(tmp_path, simple(Net()), steps=4)


def test_a_checkpoint_that_is_named_and_not_there(tmp_path: Path) -> None:
    trained(tmp_path, simple(Net()))
    with pytest.raises(NoCheckpoint, match="no good checkpoint for 7"):
        again(tmp_path, simple(Net()), 7)
    assert again(tmp_path, simple(Net()), 1) == 1
    assert again(tmp_path, simple(Net()), str(tmp_path / "checkpoint-2")) == 2
    assert again(tmp_path, simple(Net()), False) == 0


def test_preempted_cannot_be_swallowed_by_accident() -> None:
    assert issubclass(Preempted, SystemExit) and not issubclass(Preempted, Exception)
    assert json.loads("75") == Preempted("x").code
