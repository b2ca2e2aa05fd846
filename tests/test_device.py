"""Saves from an accelerator: on CUDA where there is one, else on the simulated one that `scripts/device` builds."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lastgood
from lastgood.format import tensors as safetensors
from lastgood.state import device as copies
from lastgood.state.flying import SMALL, at_once
from lastgood.state.tensors import Named, from_bytes
from lastgood.store.memory import Arena

BUILT = os.environ.get("LASTGOOD_SIMULATED", "")


class Cuda:
    """A copy is held up by a kernel in front of it."""

    name = "cuda"

    def hold(self) -> None:
        for index in range(torch.cuda.device_count()):
            lane = copies._lane(torch.device("cuda", index))
            assert lane is not None
            with copies._on(lane):
                torch.cuda._sleep(1_000_000_000)  # half a second or so

    def release(self) -> None: ...

    def jitter(self, seed: int) -> None:
        if seed % 2:
            self.hold()

    def no_pinned_memory(self, yes: bool) -> None:
        if yes:
            pytest.skip("CUDA can't be kept from pinning memory")

    def pinned(self) -> int | None:
        return None


class Simulated:
    name = "sim"

    def __init__(self) -> None:
        import simulated

        self.device = simulated.built(Path(BUILT))
        simulated.register(self.device)

    def hold(self) -> None:
        self.device.hold(True, SMALL)  # training waits for what is smaller

    def release(self) -> None:
        self.device.hold(False, 0)

    def jitter(self, seed: int) -> None:
        self.device.delay(random.Random(seed).choice((0, 50, 1000)))

    def no_pinned_memory(self, yes: bool) -> None:
        self.device.limit_pinned(0 if yes else -1)

    def pinned(self) -> int | None:
        return int(self.device.counts()["pinned"])


@pytest.fixture(scope="session")
def found() -> Any:
    if BUILT:
        return Simulated()
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA, or the simulated accelerator: ./scripts/device")
    return Cuda()


@pytest.fixture
def kind(found: Any) -> Iterator[Any]:
    yield found
    found.release()
    if found.name == "sim":
        found.device.delay(0)
        found.no_pinned_memory(False)


WIDTH = 256  # a weight of 256 KiB is guarded, a bias is copied first


def model_on(device: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)
    ).to(device)


def batch(step: int, device: str) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step)).to(device)


def forward(model: torch.nn.Module, step: int, device: str) -> None:
    model(batch(step, device)).square().mean().backward()


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    state = {f"state.{names[id(p)]}.{k}": v for p, entry in optimizer.state.items() for k, v in entry.items()}
    both = {**model.state_dict(), **{k: v for k, v in state.items() if isinstance(v, torch.Tensor)}}
    return {name: tensor.detach().cpu().clone() for name, tensor in both.items()}


def on_disk(root: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in (root / f"checkpoint-{step}").glob("*.safetensors"):
        found |= {name: from_bytes(entry) for name, entry in safetensors.load(path).items()}
    return found


def same(root: Path, step: int, wanted: dict[str, torch.Tensor]) -> None:
    there = on_disk(root, step)
    assert wanted.keys() <= there.keys()
    torn = [name for name, tensor in wanted.items() if not torch.equal(there[name].reshape(tensor.shape), tensor)]
    assert not torn, f"step {step}: {torn}"


KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}


@pytest.mark.parametrize("name", KINDS)
def test_I2_each_checkpoint_is_that_of_its_step_however_late_its_copies_are(
    kind: Any, tmp_path: Path, name: str
) -> None:
    model = model_on(kind.name)
    optimizer = KINDS[name](model.parameters())
    wanted = {}
    with lastgood.CheckpointManager(tmp_path, model=model, optimizer=optimizer, save_steps=1, trail=False) as ckpt:
        assert ckpt._run.background is not None, "on an accelerator that is the default"
        for step in range(ckpt.restore(), 6):
            forward(model, step, kind.name)
            optimizer.step()
            optimizer.zero_grad()
            wanted[step + 1] = snapshot(model, optimizer)
            kind.jitter(step)
            ckpt.step(step + 1)
        ckpt.settle()
        for step, state in wanted.items():
            same(tmp_path, step, state)
    again = model_on(kind.name, seed=1)
    fresh = KINDS[name](again.parameters())
    with lastgood.CheckpointManager(tmp_path, model=again, optimizer=fresh, save_steps=1) as ckpt:
        assert ckpt.restore() == 6
        back = snapshot(again, fresh)
    assert all(torch.equal(back[key], tensor) for key, tensor in wanted[6].items())


def trained(kind: Any, tmp_path: Path, steps: int = 2, **options: Any) -> tuple[Any, ...]:
    """A run whose optimizer has a state, and was seen to step; nothing was saved at its last step."""
    model = model_on(kind.name)
    optimizer = options.pop("optimizer", KINDS["adamw"])(model.parameters())
    ckpt = lastgood.CheckpointManager(tmp_path, model=model, optimizer=optimizer, trail=False, **options)
    ckpt.restore()
    for step in range(steps):
        forward(model, step, kind.name)
        optimizer.step()
        optimizer.zero_grad()
        ckpt.step(step + 1)
        if step + 1 < steps:
            ckpt.save()  # what is proven of the optimizer is proven between two saves
    return model, optimizer, ckpt


def test_a_save_returns_while_its_copies_are_held_and_the_next_step_waits_on_the_accelerator(
    kind: Any, tmp_path: Path
) -> None:
    model, optimizer, ckpt = trained(kind, tmp_path)
    ckpt.settle()
    wanted = snapshot(model, optimizer)
    kind.hold()
    ckpt.save()
    assert not (tmp_path / "checkpoint-2").exists()
    forward(model, 2, kind.name)  # would wait for ever if training waited for the copy of a weight here
    threading.Timer(0.2, kind.release).start()
    optimizer.step()
    ckpt.step(3)
    ckpt.close()
    same(tmp_path, 2, wanted)


def test_what_no_hook_announces_is_waited_for_at_once(kind: Any, tmp_path: Path) -> None:
    """A step that is replayed from a CUDA graph calls no hook: an optimizer that may be in one is not lazy."""

    def capturable(parameters: Any) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        made.param_groups[0]["capturable"] = True
        return made

    model, optimizer, ckpt = trained(kind, tmp_path, optimizer=capturable)
    ckpt.settle()
    wanted = snapshot(model, optimizer)
    kind.hold()
    ckpt.save()
    threading.Timer(0.2, kind.release).start()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(v["momentum_buffer"] for v in optimizer.state.values())):
            tensor.mul_(0.5)
    ckpt.settle()
    same(tmp_path, 2, wanted)
    ckpt.close()


@pytest.mark.parametrize("how", ["data", "state"])
def test_I2_a_change_that_nothing_announces_is_found_out_and_torn_bytes_become_no_checkpoint(
    kind: Any, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer, ckpt = trained(kind, tmp_path)
    ckpt.settle()
    before = snapshot(model, optimizer)
    kind.hold()
    ckpt.save()
    weight = model[0].weight
    target = weight.data if how == "data" else optimizer.state[weight]["exp_avg"].data
    target.mul_(0.5)  # enqueued behind nothing: it may come before, in the middle of, or behind the copy
    kind.release()
    ckpt.settle()
    if (tmp_path / "checkpoint-2").exists():  # CUDA copied in time
        same(tmp_path, 2, before)
    else:
        assert "something changed" in caplog.text
    forward(model, 2, kind.name)
    optimizer.step()
    wanted = snapshot(model, optimizer)
    ckpt.step(3)
    ckpt.close()
    same(tmp_path, 3, wanted)


def test_a_tensor_that_is_replaced_while_it_is_copied_keeps_its_memory_until_then(kind: Any, tmp_path: Path) -> None:
    model, optimizer, ckpt = trained(kind, tmp_path)
    ckpt.settle()
    wanted = snapshot(model, optimizer)
    kind.hold()
    ckpt.save()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)
    rubbish = [torch.full_like(parameter, 7.0) for parameter in model.parameters() for _ in range(4)]
    kind.release()
    ckpt.settle()
    same(tmp_path, 2, wanted)
    assert len(rubbish) == 24
    ckpt.close()


def test_the_memory_is_taken_once_and_given_back(kind: Any, tmp_path: Path) -> None:
    gc.collect()
    before = kind.pinned()
    model, optimizer, ckpt = trained(kind, tmp_path)
    ckpt.save()
    ckpt.settle()
    held, seen = ckpt._run._arena.held, kind.pinned()
    assert held > 0
    for step in range(2, 6):
        forward(model, step, kind.name)
        optimizer.step()
        ckpt.step(step + 1)
        ckpt.save()
    ckpt.settle()
    assert ckpt._run._arena.held == held
    assert kind.pinned() == seen and (seen is None or seen == before + held)
    ckpt.close()
    assert kind.pinned() == before


def test_without_pinned_memory_the_host_waits_and_the_checkpoint_is_the_same(kind: Any, tmp_path: Path) -> None:
    kind.no_pinned_memory(True)
    model, optimizer, ckpt = trained(kind, tmp_path)
    wanted = snapshot(model, optimizer)
    ckpt.save()
    forward(model, 2, kind.name)
    optimizer.step()
    ckpt.settle()
    same(tmp_path, 2, wanted)
    ckpt.close()


def test_a_save_that_fails_half_way_leaves_the_next_one_whole(kind: Any, tmp_path: Path) -> None:
    model, optimizer, ckpt = trained(kind, tmp_path, on_error="warn")
    ckpt.settle()
    kind.hold()
    optimizer.state[model[0].weight]["odd"] = object()  # found out behind the weights, whose copies are under way
    with pytest.raises(lastgood.LastgoodError):
        ckpt.save()
    del optimizer.state[model[0].weight]["odd"]
    kind.release()
    wanted = snapshot(model, optimizer)
    assert ckpt.save() is not None
    ckpt.settle()
    same(tmp_path, 2, wanted)
    ckpt.close()


def test_a_copy_comes_behind_what_training_has_enqueued(kind: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(WIDTH, WIDTH, bias=False).to(kind.name)
    with lastgood.CheckpointManager(tmp_path, model=model, trail=False, guard="off") as ckpt:
        ckpt.restore()
        ckpt.step(1)
        other, held = torch.Stream(device=torch.device(kind.name, 0)), torch.zeros(WIDTH, WIDTH).to(kind.name)
        target = torch.empty(WIDTH, WIDTH, pin_memory=True)
        wanted = torch.full((WIDTH, WIDTH), 3.0).to(kind.name)
        kind.hold()
        with copies._on(other):
            target.copy_(held, non_blocking=True)
        event = torch.Event(device=torch.device(kind.name, 0))
        event.record(other)
        torch.accelerator.current_stream().wait_event(event)
        with torch.no_grad():
            model.weight.copy_(wanted, non_blocking=True)  # waits for the other stream, on the accelerator
        threading.Timer(0.2, kind.release).start()
        ckpt.step(2)
        ckpt.save()
    same(tmp_path, 2, {"weight": wanted.cpu()})


def test_memory_is_handed_out_again_only_when_no_copy_is_under_way_into_it(kind: Any) -> None:
    arena, weight = Arena(pin=copies.pinned), torch.ones(WIDTH, WIDTH).to(kind.name)
    kind.hold()
    at_once().stage(Named({"weight": weight}), arena)  # and then something went wrong: nobody waits for it
    threading.Timer(0.2, kind.release).start()
    arena.reset()
    kept = arena.keep(memoryview(bytes([7]) * weight.nbytes))
    torch.accelerator.synchronize()
    assert bytes(kept) == bytes([7]) * weight.nbytes


def test_a_model_on_two_devices(kind: Any, tmp_path: Path) -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip("needs two devices")
    torch.manual_seed(0)
    first, second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
    model = torch.nn.ModuleList([first.to(f"{kind.name}:0"), second.to(f"{kind.name}:1")])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    wanted = {}
    with lastgood.CheckpointManager(tmp_path, model=model, optimizer=optimizer, save_steps=1) as ckpt:
        for step in range(ckpt.restore(), 4):
            middle = first(batch(step, f"{kind.name}:0"))
            second(middle.to(f"{kind.name}:1")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            wanted[step + 1] = snapshot(model, optimizer)
            kind.jitter(step)
            ckpt.step(step + 1)
    for step, state in wanted.items():
        same(tmp_path, step, state)
