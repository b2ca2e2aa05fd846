"""What a loop does that nobody thought of: each of these once ended wrong."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lastgood
import loops
from lastgood.errors import Incompatible, NotSupported, UsageError
from lastgood.state.tensors import same_bits
from loops import Net, Recipe, simple


def manager(root: Path | str, recipe: Recipe, **options: Any) -> lastgood.CheckpointManager:
    return lastgood.CheckpointManager(root, **{"save_steps": 1, "on_error": "raise", **options}, **recipe.parts)


def trained(root: Path, recipe: Recipe, upto: int = 1, **options: Any) -> int:
    """Trains to that step; returns where it began."""
    with manager(root, recipe, **options) as ckpt:
        begin = ckpt.restore()
        for step in range(begin, upto):
            ckpt.step(step + 1, loss=recipe.step(step))
    return begin


def steps(root: Path) -> list[int]:
    return [record.step for record in lastgood.open(root).checkpoints]


# ---- where the run is --------------------------------------------------------------------------


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = simple(Net())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with manager("run", recipe) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            recipe.step(step)
            ckpt.step(step)
            os.chdir("elsewhere" if step == 1 else "..")
    assert steps(tmp_path / "run") == [1, 2]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_run_inside_a_checkpoint_is_refused(below: str, tmp_path: Path) -> None:
    trained(tmp_path, simple(Net()))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="lies in the checkpoint"):
        trained(tmp_path / "checkpoint-1" / below, simple(Net()))
    assert sorted(tmp_path.rglob("*")) == before


def test_another_thread_of_the_process_may_step(tmp_path: Path) -> None:
    recipe, failed = simple(Net()), []
    with manager(tmp_path, recipe) as ckpt:
        ckpt.restore()

        def work() -> None:
            try:
                ckpt.step(1)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failed
        assert steps(tmp_path) == [1]


# ---- numbers of steps --------------------------------------------------------------------------


def test_integers_of_any_library_count(tmp_path: Path) -> None:
    recipe = simple(Net())
    with manager(tmp_path, recipe) as ckpt:
        ckpt.restore()
        ckpt.step(np.int64(3))
        ckpt.record(torch.tensor(3), score=1.0)  # type: ignore[arg-type]
        for wrong, said in ((10**18, "counted upwards"), (True, "must be the number"), (4.0, "must be the number")):
            with pytest.raises(UsageError, match=said):
                ckpt.step(wrong)  # type: ignore[arg-type]
    assert lastgood.open(tmp_path).latest().metrics == {"score": 1.0}
    assert steps(tmp_path) == [3]


# ---- models and optimizers that change under way ------------------------------------------------


def grown(recipe: Recipe) -> None:
    recipe.parts["optimizer"].add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def replaced(recipe: Recipe) -> None:
    recipe.parts["model"].head.weight = nn.Parameter(torch.ones(256, 8))


@pytest.mark.parametrize("change", [grown, replaced])
def test_an_optimizer_whose_parameters_nobody_holds_any_more_is_refused(
    change: Callable[[Recipe], None], tmp_path: Path
) -> None:
    recipe = simple(Net())

    def loop() -> None:
        with manager(tmp_path, recipe) as ckpt:
            ckpt.restore()
            ckpt.step(1, loss=recipe.step(0))
            change(recipe)
            ckpt.step(2, loss=recipe.step(1))

    with pytest.raises(NotSupported, match="optimizer trains 1 parameters that belong to none of the parts"):
        loop()
    assert steps(tmp_path) == [1]


def test_a_replaced_parameter_counts_as_a_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = simple(Net())

    def loop() -> None:
        with manager(tmp_path, recipe, save_steps=100) as ckpt:
            ckpt.restore()
            ckpt.step(1, loss=recipe.step(0))
            replaced(recipe)
            raise ValueError("mine")

    with caplog.at_level("INFO", logger="lastgood"), pytest.raises(ValueError, match="mine"):
        loop()
    assert not steps(tmp_path)
    assert "not saved, because model changed since step 1" in caplog.text


def test_tensors_made_in_inference_mode_are_put_back(tmp_path: Path) -> None:
    def made() -> Recipe:
        with torch.inference_mode():
            frozen = Net()
        for parameter in frozen.parameters():
            parameter.requires_grad_(False)
        return Recipe(**simple(Net()).parts, teacher=frozen)

    first, second = made(), made()
    trained(tmp_path, first)
    assert trained(tmp_path, second) == 1
    assert same_bits(first.parts["teacher"].head.weight, second.parts["teacher"].head.weight)


def test_a_model_without_tensors_is_a_model(tmp_path: Path) -> None:
    for launch in range(2):
        with lastgood.CheckpointManager(tmp_path, save_steps=1, model=nn.ReLU()) as ckpt:
            assert ckpt.restore() == launch
            ckpt.step(launch + 1)


# ---- what is restored --------------------------------------------------------------------------


def test_patterns_are_about_names_in_a_model_for_its_optimizer_too(tmp_path: Path) -> None:
    class Inside(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = Net(width=width)

    old = loops.gan()
    trained(tmp_path, old)
    one, two = Inside(8), Inside(4)
    rate = torch.optim.AdamW(one.parameters(), lr=1e-2)
    other = torch.optim.SGD(two.parameters(), lr=1e-2, momentum=0.9)
    recipe = Recipe(generator=one, critic=two, optimizer_g=rate, optimizer_c=other)
    with manager(tmp_path, recipe) as ckpt:
        assert ckpt.restore(rename={"*": "inner.*"}) == 1
    for model, optimizer, key in (
        ("generator", "optimizer_g", "exp_avg"),
        ("critic", "optimizer_c", "momentum_buffer"),
    ):
        theirs = old.parts[optimizer].state[old.parts[model].head.weight][key]
        mine = recipe.parts[optimizer].state[recipe.parts[model].inner.head.weight][key]
        assert same_bits(mine, theirs)


def test_what_may_be_missing_may_be_another_one(tmp_path: Path) -> None:
    """The hint of the refusal says so."""
    trained(tmp_path, simple(Net()))
    with pytest.raises(Incompatible, match=r"allow_missing=\['optimizer'"):
        trained(tmp_path, simple(Net(), torch.optim.SGD))
    recipe = simple(Net(), torch.optim.SGD)
    with manager(tmp_path, recipe, allow_missing=["optimizer"]) as ckpt:
        assert ckpt.restore() == 1
        assert ckpt.report is not None and ckpt.report.missing == ("optimizer",)


def test_an_array_without_dimensions_comes_back_as_one(tmp_path: Path) -> None:
    first, second = np.array(5.0), np.array(0.0)
    trained(tmp_path, simple(Net(), value=first))
    assert trained(tmp_path, simple(Net(), value=second)) == 1
    assert second == 5.0


def test_an_array_that_nobody_may_write_is_refused_before_anything_changes(tmp_path: Path) -> None:
    trained(tmp_path, simple(Net(), value=np.zeros(3)))
    fixed, recipe = np.zeros(3), simple(Net())
    fixed.flags.writeable = False
    before = recipe.parts["model"].head.weight.clone()
    with pytest.raises(Incompatible, match="value is read-only here"):
        trained(tmp_path, Recipe(**recipe.parts, value=fixed))
    assert same_bits(before, recipe.parts["model"].head.weight)


def test_a_state_dict_that_fails_costs_a_save_and_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Fails:
        def state_dict(self) -> dict[str, int]:
            raise RuntimeError("not now")

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    recipe = simple(Net(), fails=Fails())
    with manager(tmp_path, recipe, on_error="warn") as ckpt:
        ckpt.restore()
        ckpt.step(1, loss=recipe.step(0))
    assert "NO CHECKPOINT at step 1" in caplog.text
    assert "not now" in caplog.text
    assert not steps(tmp_path)


# ---- optimizers --------------------------------------------------------------------------------


class Averaging(torch.optim.Optimizer):
    """As the schedule-free ones: its parameters are something else in eval() than in train()."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "train_mode": True})

    @torch.no_grad()
    def switch(self, train: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if group["train_mode"] != train and "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], -0.5 if train else 1 / 3)
            group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("z", p.clone()).sub_(p.grad, alpha=group["lr"])
                p.lerp_(state["z"], 0.5)


class Switching(Recipe):
    def step(self, number: int) -> torch.Tensor:
        self.parts["optimizer"].switch(True)
        loss = super().step(number)
        self.parts["optimizer"].switch(bool(number % 2))
        return loss


class Closure(Recipe):
    def step(self, number: int) -> torch.Tensor:
        model, optimizer, rows = self.parts["model"], self.parts["optimizer"], self.batch()

        def again() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss(model, rows)
            loss.backward()
            return loss

        return optimizer.step(again).detach()


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 8, sparse=True)
        self.head = nn.Linear(8, 256).requires_grad_(False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(rows[:, :-1]).flatten(0, 1))


def wide() -> Recipe:
    """Eight-bit state, which bitsandbytes keeps for large tensors only."""
    import bitsandbytes

    model = Net(width=16)
    return Recipe(model=model, optimizer=bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=16))


def adam(**how: Any) -> Recipe:
    model = Net()
    return Recipe(model=model, optimizer=torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, **how}))


def muon() -> Recipe:
    model = Net()
    flat = [p for p in model.parameters() if p.ndim == 2]
    return Recipe(model=model, optimizer=torch.optim.Muon(flat, lr=1e-2))


OPTIMIZERS: dict[str, Callable[[], Recipe]] = {
    "lbfgs": lambda: Closure(
        **simple(Net(), lambda ps, lr: torch.optim.LBFGS(ps, lr, max_iter=3, history_size=2)).parts
    ),
    "asgd": lambda: simple(Net(), torch.optim.ASGD),
    "rprop": lambda: simple(Net(), torch.optim.Rprop),
    "sparse adam": lambda: simple(Sparse(), torch.optim.SparseAdam),
    "muon": muon,
    "fused": lambda: adam(fused=True),
    "foreach, amsgrad": lambda: adam(foreach=True, amsgrad=True),
    "a rate that is a tensor": lambda: adam(lr=torch.tensor(1e-2)),
    "eight bits": wide,
    "train and eval": lambda: Switching(**simple(Net(), Averaging).parts),
    "a scaler that is off": lambda: loops.Scaled(
        **simple(Net()).parts, scaler=torch.amp.GradScaler("cpu", enabled=False)
    ),
    "data parallel": lambda: Recipe(**{**(parts := simple(Net()).parts), "model": nn.DataParallel(parts["model"])}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_I4_every_optimizer_goes_on_as_it_was(name: str, tmp_path: Path) -> None:
    def to(root: str, upto: int) -> str:
        torch.manual_seed(1)
        recipe = OPTIMIZERS[name]()
        trained(tmp_path / root, recipe, upto)
        return loops.state(recipe)

    expected = to("whole", 5)
    to("run", 3)
    assert to("run", 5) == expected


# ---- an evaluation behind a save ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["record", "apart"])
def test_I4_an_evaluation_that_a_resume_leaves_out_leaves_its_loader_alone(how: str, tmp_path: Path) -> None:
    """The checkpoint is older than the evaluation of its step; that is not made again."""

    def to(root: str, upto: int) -> list[float]:
        torch.manual_seed(1)
        recipe = simple(Net())
        own = torch.Generator().manual_seed(5)
        recipe.parts["evals"] = torch.utils.data.DataLoader(recipe.rows, batch_size=24, shuffle=True, generator=own)
        scores = []
        with manager(tmp_path / root, recipe) as ckpt:
            for step in range(ckpt.restore(), upto):
                ckpt.step(step + 1, loss=recipe.step(step))
                whole = list(recipe.parts["evals"])
                score = float(whole[0].double().mean())
                if how == "apart":
                    with ckpt.apart():
                        list(recipe.parts["evals"])
                ckpt.record(step + 1, score=score)
                scores.append(score)
        return [*scores, float(recipe.parts["model"].head.weight.detach().double().sum())]

    expected = to("whole", 4)
    to("run", 2)
    assert to("run", 4) == expected[2:]
