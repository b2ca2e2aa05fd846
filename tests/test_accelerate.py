"""CheckpointManager(accelerator=...): what an Accelerator prepared goes on as if it had never been killed."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, DistributedType, GradientAccumulationPlugin
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lastgood
import loops
from lastgood.errors import LastgoodError, NotSupported, UsageError
from loops import Average, Net

import forked
from training import texts

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*optimizer.step.*:UserWarning")

ROWS = 14
"""Four batches an epoch, the last one smaller."""


class Flow(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(rows())


def rows() -> torch.Tensor:
    return torch.tensor([list(row) for row in texts(ROWS)])


def loader(**options: Any) -> Any:
    return DataLoader(TensorDataset(rows()), batch_size=4, **{"shuffle": True, **options})


@dataclass
class Training:
    """What a script has after accelerator.prepare. given: parts beside the accelerator. every: also inside a step."""

    accelerator: Accelerator
    models: list[Any]
    optimizers: list[Any]
    loader: Any
    schedulers: list[Any] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    every: bool = False

    def loss(self, model: Any, batch: Any) -> Any:
        batch = batch[0] if isinstance(batch, (list, tuple)) else batch
        return torch.nn.functional.cross_entropy(model(batch), batch[:, 1:].flatten())

    def train(self, batch: Any) -> Any:
        total = torch.zeros(())
        with self.accelerator.accumulate(*self.models):
            for model, optimizer in zip(self.models, self.optimizers, strict=True):
                loss = self.loss(model, batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                total += loss.detach()
            for scheduler in self.schedulers:
                scheduler.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        for other in self.others:
            if isinstance(other, Average) and self.accelerator.sync_gradients:
                other.update()
        return total


def made(models: int = 1, data: Any = None, scaler: bool = False, **how: Any) -> Training:
    accelerator = Accelerator(cpu=True, **how)
    if scaler:  # as mixed_precision="fp16" makes one on a GPU
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    nets = [Net(width=8 - 4 * place) for place in range(models)]
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in nets]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50) for optimizer in optimizers]
    prepared = accelerator.prepare(*nets, *optimizers, *schedulers, loader() if data is None else data)
    return Training(
        accelerator=accelerator,
        models=list(prepared[:models]),
        optimizers=list(prepared[models : 2 * models]),
        schedulers=list(prepared[2 * models : 3 * models]),
        loader=prepared[-1],
    )


def registered() -> Training:
    class Counter:
        def __init__(self) -> None:
            self.seen = 0

        def state_dict(self) -> dict[str, int]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    class Counted(Training):
        def train(self, batch: Any) -> Any:
            self.others[1].seen += 1
            return super().train(batch)

    training = made()
    training.others = [Average(training.models[0]), Counter()]
    # The second is the prepared one once more, as many scripts have it.
    training.accelerator.register_for_checkpointing(*training.others, training.schedulers[0])
    return Counted(**vars(training))


def evaluating() -> Training:
    """Another prepared loader, shuffled by a generator of its own, is gone through now and then."""
    training = made()
    other = training.accelerator.prepare(loader(generator=torch.Generator().manual_seed(3)))

    class Evaluating(Training):
        def train(self, batch: Any) -> Any:
            loss = super().train(batch)
            if random.random() < 0.5:
                with torch.no_grad():
                    loss += sum(self.loss(self.models[0], batch) * number for number, batch in enumerate(other))
            return loss

    return Evaluating(**vars(training))


def beside() -> Training:
    """Parts by names of one's own: what was prepared, and what prepare returned."""
    accelerator = Accelerator(cpu=True)
    net, critic = Net(), Net(width=4)
    one, two = (torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (net, critic))
    data = loader()
    models_and_more = accelerator.prepare(net, critic, one, two, data)
    training = Training(accelerator, list(models_and_more[:2]), list(models_and_more[2:4]), models_and_more[4])
    training.given = {"net": net, "critic": models_and_more[1], "net_optimizer": one, "train": data, "counts": [1, 2]}
    return training


def twice() -> Training:
    training = made()
    training.accelerator.prepare(training.models[0], training.optimizers[0], training.loader)
    training.accelerator.prepare(training.optimizers[0].optimizer)
    return training


def every_batch(**how: Any) -> Training:
    training = made(gradient_accumulation_steps=3, **how)
    training.every = True
    return training


def outside() -> Training:
    """Nothing of the loop's end goes into the accumulation: it may be half-way there."""
    plugin = GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=False)
    training = made(gradient_accumulation_plugin=plugin)
    training.every = True
    return training


TRAININGS: dict[str, Callable[[], Training]] = {
    "plain": made,
    "two models, optimizers, schedules": lambda: made(models=2),
    "seedable sampler": lambda: made(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)),
    "a generator of the loader": lambda: made(data=loader(generator=torch.Generator().manual_seed(7))),
    "a stream": lambda: made(data=DataLoader(Flow(), batch_size=4)),
    "a stream, not dispatched": lambda: made(
        data=DataLoader(Flow(), batch_size=4), dataloader_config=DataLoaderConfiguration(dispatch_batches=False)
    ),
    "accumulation": lambda: made(gradient_accumulation_steps=3),
    "accumulation, every batch a step": every_batch,
    "accumulation over epochs": outside,
    "bf16": lambda: made(mixed_precision="bf16"),
    "a scaler": lambda: made(scaler=True),
    "a scaler inside an accumulation": lambda: every_batch(scaler=True),
    "registered objects": registered,
    "a loader for evaluation": evaluating,
    "parts of one's own names": beside,
    "prepared twice": twice,
}


def begin(name: str) -> Training:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return TRAININGS[name]()


def train(name: str, root: Path, *, total: int = 10, kill: int = -1, **options: Any) -> dict[str, Any]:
    training = begin(name)
    accelerator, losses = training.accelerator, []
    with lastgood.CheckpointManager(
        root, accelerator=accelerator, save_steps=2, on_error="raise", **options, **training.given
    ) as ckpt:
        step = ckpt.restore()
        while step < total:
            for batch in training.loader:
                loss = training.train(batch)
                losses.append(float(loss))
                if not accelerator.sync_gradients and not training.every:
                    continue
                step += 1
                if step == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                ckpt.step(step, loss=loss)
                if step == total:
                    break
    return {"state": state(training), "last": losses[-2:]}


def state(training: Training) -> str:
    """A hash of everything that training goes on with."""
    things = [*training.models, *training.optimizers, *training.schedulers, *training.others]
    if training.accelerator.scaler is not None:
        things.append(training.accelerator.scaler)
    own = {str(place): getattr(thing, "_orig_mod", thing) for place, thing in enumerate(things)}
    grads = [p.grad for model in training.models for p in model.parameters()]
    grads = [] if training.accelerator.sync_gradients else grads
    return loops.state(loops.Recipe(**own, step_=[training.accelerator.step], grads=grads))


@pytest.mark.parametrize("name", TRAININGS)
def test_I1_I4_killed_and_resumed_is_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path / "whole")
    for kill in (5, 8):  # behind the last batch of an epoch, and in the middle of one
        log = tmp_path / "log"
        assert forked.run(train, name, tmp_path / "run", kill=kill, log=log) == -9, log.read_text()
    assert train(name, tmp_path / "run") == expected


# ---- what is held, and under which name --------------------------------------------------------


def names(**given: Any) -> list[str]:
    return [part.name for part in lastgood.CheckpointManager("nowhere", **given).parts]


def test_names_are_those_that_save_state_counts_by() -> None:
    training = begin("two models, optimizers, schedules")
    accelerator = training.accelerator
    counted = ["model", "model_1", "optimizer", "optimizer_1", "scheduler", "scheduler_1", "dataloader", "accelerator"]
    assert names(accelerator=accelerator) == counted
    critic, rate = training.models[1], training.optimizers[0].optimizer
    own = names(accelerator=accelerator, critic=critic, rate=rate, counts={})
    assert own == ["critic", "rate", "counts", *(name for name in counted if name not in ("model_1", "optimizer"))]
    assert names(accelerator=accelerator, model=training.models[0]) == counted
    with pytest.raises(UsageError, match="'model' is the name of what the accelerator prepared"):
        names(accelerator=accelerator, model=Net())


def test_a_compiled_model_is_the_one_that_was_given() -> None:
    AcceleratorState._reset_state(True)
    accelerator, net = Accelerator(cpu=True, dynamo_backend="eager"), Net()
    assert accelerator.prepare(net) is not net
    assert names(accelerator=accelerator, mine=net) == ["mine", "accelerator"]


def test_what_comes_too_late_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AcceleratorState._reset_state(True)
    with pytest.raises(UsageError, match="has prepared nothing yet"):
        names(accelerator=Accelerator(cpu=True))
    training = begin("plain")
    ckpt = lastgood.CheckpointManager(tmp_path, accelerator=training.accelerator, save_steps=1)
    with ckpt:
        ckpt.restore()
        training.accelerator.register_for_checkpointing(Average(training.models[0]))
        for step in (1, 2):
            ckpt.step(step)
    told = "custom of the accelerator came after the CheckpointManager was made"
    assert caplog.text.count(told) == 1
    training = begin("plain")
    ckpt = lastgood.CheckpointManager(tmp_path, accelerator=training.accelerator)
    training.accelerator.prepare(loader())
    with ckpt, pytest.raises(UsageError, match="dataloader_1 of the accelerator came after"):
        ckpt.restore()


def test_a_loader_that_skips_is_not_taken_for_the_one_that_is_followed(tmp_path: Path) -> None:
    for name in ("plain", "a stream, not dispatched"):
        training = begin(name)
        with lastgood.CheckpointManager(tmp_path / name, accelerator=training.accelerator) as ckpt:
            ckpt.restore()
            skipping = training.accelerator.skip_first_batches(training.loader, 1)
            for batch in skipping:
                training.train(batch)
                with pytest.raises(UsageError, match=r"iterates what accelerator\.skip_first_batches made"):
                    ckpt.step(1)
                break


def test_registered_in_another_order_is_refused(tmp_path: Path) -> None:
    train("registered objects", tmp_path, total=2)
    training = begin("plain")
    others = [torch.optim.swa_utils.AveragedModel(training.models[0]), Average(training.models[0])]
    training.accelerator.register_for_checkpointing(*others)
    before = loops.state(loops.Recipe(model=training.models[0]))
    ckpt = lastgood.CheckpointManager(tmp_path, accelerator=training.accelerator)
    with ckpt, pytest.raises(LastgoodError, match="custom"):
        ckpt.restore()
    assert loops.state(loops.Recipe(model=training.models[0])) == before


def test_hooks_of_save_state_are_not_called_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = begin("plain")
    called = []
    training.accelerator.register_save_state_pre_hook(lambda *args: called.append(args))
    with lastgood.CheckpointManager(tmp_path, accelerator=training.accelerator, save_steps=1) as ckpt:
        ckpt.restore()
        ckpt.step(1)
    assert "save_state hooks aren't called" in caplog.text
    assert not called
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()


def test_freed_memory_is_still_saved(tmp_path: Path) -> None:
    training = begin("plain")
    with lastgood.CheckpointManager(tmp_path, accelerator=training.accelerator, save_steps=1, on_error="raise") as ckpt:
        ckpt.restore()
        training.accelerator.free_memory()
        ckpt.step(1)
    assert [record.step for record in lastgood.open(tmp_path).checkpoints] == [1]


# ---- what can't be saved -----------------------------------------------------------------------


def ranks(place: Path, rank: int, port: int, fsdp: bool) -> None:
    """One of two processes of a real group."""
    AcceleratorState._reset_state(True)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
    if fsdp:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    with pytest.raises(NotSupported, match=r"an Accelerator of 2 processes \((FSDP|MULTI_CPU)\)") as error:
        lastgood.CheckpointManager(place, accelerator=accelerator)
    assert "keep accelerator.save_state; `lastgood import` reads" in error.value.hint
    print("refused", accelerator.distributed_type)


@pytest.mark.parametrize("fsdp", [False, True])
def test_I17_several_processes_commit_nothing_where_they_cannot_commit_together(fsdp: bool, tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = tmp_path / "log"
    children = [forked.start(ranks, tmp_path / "run", rank, port, fsdp, log=log) for rank in (0, 1)]
    assert [forked.wait(child) for child in children] == [0, 0], log.read_text()
    assert log.read_text().count("refused") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_engines_with_a_state_of_their_own_are_refused(kind: str, tmp_path: Path) -> None:
    training = begin("plain")
    training.accelerator.state.distributed_type = DistributedType[kind]
    with pytest.raises(NotSupported, match=rf"an Accelerator of 1 process \({kind}\) yet"):
        lastgood.CheckpointManager(tmp_path, accelerator=training.accelerator)
    AcceleratorState._reset_state(True)


def test_a_directory_of_save_state_is_left_alone_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = begin("plain")
    old = tmp_path / "checkpoint_0"
    training.accelerator.save_state(str(old))
    before = {path: path.read_bytes() for path in old.iterdir()}
    with lastgood.CheckpointManager(tmp_path, accelerator=training.accelerator) as ckpt:
        assert ckpt.restore() == 0
    ckpt = lastgood.CheckpointManager(tmp_path, accelerator=training.accelerator)
    with ckpt, pytest.raises(NotSupported, match=r"accelerator\.load_state"):
        ckpt.restore(old)
    assert {path: path.read_bytes() for path in old.iterdir()} == before
