"""State that is copied while training goes on: the same checkpoints, of optimizers of every kind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import lazily
from lastgood.background import Background
from lastgood.format import tensors as safetensors
from lastgood.repo import journal
from lastgood.repo.read import records
from lastgood.state import lazy
from lastgood.state.lazy import Lazy, Pace
from lastgood.state.tensors import named
from lastgood.store.memory import Arena
from lazily import Gate, Late, Net
from test_background_exact import content

import forked

Step = Callable[[nn.Module, Any], torch.Tensor]


def with_closure(model: nn.Module, optimizer: Any) -> torch.Tensor:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        found = lazily.loss(model)
        found.backward()
        return found

    return optimizer.step(closure).detach()


def accumulating(model: nn.Module, optimizer: Any) -> torch.Tensor:
    optimizer.zero_grad()
    for _ in range(3):
        (found := lazily.loss(model)).backward()
    optimizer.step()
    return found.detach()


class Within:
    """An optimizer of each parameter that steps as soon as its gradient is there, inside of backward."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.each = {p: torch.optim.AdamW([p], lr=1e-2) for p in parameters}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.act)

    def act(self, parameter: torch.Tensor) -> None:
        self.each[parameter].step()  # type: ignore[index]
        self.each[parameter].zero_grad()  # type: ignore[index]


class Swapping(torch.optim.SGD):
    """As schedule-free ones: other weights in between, written behind torch's back."""

    def train(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(2)

    def eval(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)


class Scaled(torch.optim.SGD):
    """One that isn't torch's own, derives from one that is, and changes something before it calls that."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.data.mul_(0.999)
        return super().step(closure)


def eight_bit(parameters: Any) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="no bitsandbytes for this system")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=1)


def prepared(parameters: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW(parameters, lr=1e-2))


@pytest.fixture(autouse=True)
def no_accelerator() -> Iterator[None]:
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


KINDS: dict[str, tuple[Callable[[Any], Any], Step]] = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-2), lazily.step),
    "one by one": (lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False), lazily.step),
    "fused": (lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), lazily.step),
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), lazily.step),
    "no state": (lambda p: torch.optim.SGD(p, lr=1e-2), lazily.step),
    "accumulating": (lambda p: torch.optim.AdamW(p, lr=1e-2), accumulating),
    "closure": (lambda p: torch.optim.AdamW(p, lr=1e-2), with_closure),
    "lbfgs": (
        lambda p: torch.optim.LBFGS([q for q in p if q.is_contiguous()], lr=1e-2, max_iter=3),
        with_closure,
    ),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-2), lazily.step),
    "somebody's own": (lambda p: Scaled(p, lr=1e-2, momentum=0.9), lazily.step),
    "8 bit": (eight_bit, lazily.step),
    "accelerate": (prepared, lazily.step),
    "swapping": (lambda p: Swapping(p, lr=1e-2, momentum=0.9), lazily.step),
}
AT_ONCE = {"swapping"}
"""Those that can't be shown to be safe."""


def run(kind: str, root: Path, wait: Callable[[int], object] | None) -> int:
    """Returns how many of the saves were copied later."""
    make, step = KINDS[kind]
    torch.manual_seed(3)
    model, later = Net(), 0
    optimizer = make(lazily.trained(model))
    parts = {"optimizer": optimizer} if isinstance(optimizer, torch.optim.Optimizer) else {"wrapped": optimizer}
    if kind == "accelerate":
        parts = {"optimizer": optimizer.optimizer}
    with lazily.manager(root, wait, model=model, **parts) as ckpt:
        for number in range(ckpt.restore(), 4):
            found = step(model, optimizer)
            if kind == "swapping":
                optimizer.eval()
            ckpt.step(number + 1, loss=found)
            later += lazily.window(ckpt) is not None
            if kind == "swapping":
                optimizer.train()
    return later


@pytest.mark.parametrize("kind", KINDS)
def test_I9_the_same_checkpoints_as_copied_at_once(kind: str, tmp_path: Path) -> None:
    assert run(kind, tmp_path / "a", None) == 0
    assert run(kind, tmp_path / "b", lambda left: None) == (0 if kind in AT_ONCE else 4)
    assert content(tmp_path / "a") == content(tmp_path / "b") and len(content(tmp_path / "a")) == 4


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(sorted(set(KINDS) - {"8 bit", "accelerate"})),
    many=st.sampled_from([1, lazy.APART]),
)
def test_I9_whenever_the_writer_comes_to_it(
    seed: int, kind: str, many: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Alone, or with the threads that help it with a large state."""
    root = tmp_path_factory.mktemp("late")
    run(kind, root / "a", None)
    with patch.object(lazy, "APART", many):
        run(kind, root / "b", Late(seed))
    assert content(root / "a") == content(root / "b")


def test_whoever_trains_copies_what_the_writer_has_not(tmp_path: Path) -> None:
    model = Net()
    optimizer, gate = torch.optim.AdamW(lazily.trained(model)), Gate(free=3)
    with lazily.manager(tmp_path, gate, model=model, optimizer=optimizer, background=Background()) as ckpt:
        ckpt.restore()
        lazily.step(model, optimizer)
        before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        ckpt.step(1)
        assert gate.held.wait(120)
        open_ = lazily.window(ckpt)
        assert open_ is not None and open_.open
        lazily.step(model, optimizer)
        assert not open_.open and open_.waited > 0
        gate.go.set()
        ckpt.settle()
        (saved,) = [event for event in journal.read(tmp_path) if event["event"] == "saved"]
        assert saved["spent"]["stall"] >= round(open_.waited, 4), "what training waits for in its step counts, too"
    held = safetensors.load(tmp_path / "checkpoint-1" / "model.safetensors")
    for name, entry in held.items():
        assert bytes(entry.data) == before[name].contiguous().numpy().tobytes()


def test_an_optimizer_that_was_not_seen_is_not_relied_on(tmp_path: Path) -> None:
    """The first save before any step; two optimizers of which one rests; a step that is a compiled graph."""
    model = Net()
    optimizer = torch.optim.SGD(lazily.trained(model), lr=1e-2, momentum=0.9)
    other = torch.optim.SGD([model.frozen], lr=1e-2)
    with lazily.manager(tmp_path, lambda left: None, model=model, optimizer=optimizer, other=other) as ckpt:
        ckpt.restore()
        ckpt.step(1)
        assert lazily.window(ckpt) is None
        lazily.step(model, optimizer)
        ckpt.step(2)
        assert lazily.window(ckpt) is None
        lazily.step(model, optimizer)
        other.step()
        ckpt.step(3)
        assert lazily.window(ckpt) is not None
        lazily.step(model, optimizer)
        ckpt.step(4)
        assert lazily.window(ckpt) is None, "the other one may step in another way by now"
    assert len(records(tmp_path)) == 4


@pytest.mark.filterwarnings("ignore")  # torch.compile has warnings of its own
def test_a_compiled_step_is_copied_at_once(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with lazily.manager(tmp_path, lambda left: None, model=model, optimizer=optimizer) as ckpt:
        ckpt.restore()
        compiled = torch.compile(optimizer.step, backend="eager")
        for number in range(2):
            model(torch.ones(4)).sum().backward()
            compiled()
            ckpt.step(number + 1)
            assert lazily.window(ckpt) is None
    assert len(records(tmp_path)) == 2


def test_backward_that_steps(tmp_path: Path) -> None:
    for name, wait in (("a", None), ("b", Late(5))):
        torch.manual_seed(0)
        model = Net()
        within = Within(lazily.trained(model))
        optimizers = {f"o{number}": one for number, one in enumerate(within.each.values())}
        with lazily.manager(tmp_path / name, wait, model=model, **optimizers) as ckpt:
            ckpt.restore()
            for number in range(4):
                lazily.loss(model).backward()
                ckpt.step(number + 1)
                assert (lazily.window(ckpt) is None) == (wait is None)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    before = dict(_global_optimizer_pre_hooks)
    run("adamw", tmp_path, lambda left: None)
    assert dict(_global_optimizer_pre_hooks) == before


def test_a_fork_in_the_window(tmp_path: Path) -> None:
    """The child trains, saves nothing and copies nothing: the memory of the copy isn't there."""
    model = Net()
    optimizer, gate = torch.optim.AdamW(lazily.trained(model)), Gate(free=3)
    with lazily.manager(tmp_path, gate, model=model, optimizer=optimizer) as ckpt:
        ckpt.restore()
        lazily.step(model, optimizer)
        ckpt.step(1)
        assert gate.held.wait(120)
        log = tmp_path.with_suffix(".log")
        assert forked.run(lazily.step, model, optimizer, log=log) == 0, log.read_text()
        gate.go.set()
        ckpt.settle()
        assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_end_comes_in_the_window(error: type[BaseException] | None, tmp_path: Path) -> None:
    model = Net()
    optimizer, gate = torch.optim.AdamW(lazily.trained(model)), Gate(free=3)

    def loop() -> None:
        with lazily.manager(tmp_path, gate, model=model, optimizer=optimizer) as ckpt:
            ckpt.restore()
            lazily.step(model, optimizer)
            ckpt.step(1)
            assert gate.held.wait(120)
            gate.go.set()
            if error is not None:
                raise error

    if error is None:
        loop()
    else:
        with pytest.raises(error):
            loop()
    assert [record.state for record in records(tmp_path)] == ["full"]


def terminated(root: Path, steps: Path) -> None:
    """A loop whose second step lasts until the checkpoint of the first one is there, and a SIGTERM came meanwhile."""
    model = Net()
    optimizer = torch.optim.AdamW(lazily.trained(model))
    gate = Gate(free=3)
    with lazily.manager(root, gate, model=model, optimizer=optimizer) as ckpt:
        for number in range(ckpt.restore(), 4):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                gate.go.set()
                until = time.monotonic() + 100
                while not [e for e in journal.read(root) if e["event"] == "saved"]:
                    assert time.monotonic() < until, "the checkpoint under way waits for the step"
                    time.sleep(0.01)
                steps.write_text("inside the step: " + ", ".join(r.name for r in records(root)))
            lazily.step(model, optimizer)
            ckpt.step(number + 1)
            assert number != 0 or gate.held.wait(100)


def test_I20_what_is_in_memory_is_committed_inside_a_step(tmp_path: Path) -> None:
    log, steps = tmp_path / "log", tmp_path / "steps"
    assert forked.run(terminated, tmp_path / "run", steps, log=log) == 75, log.read_text()
    assert steps.read_text() == "inside the step: checkpoint-1"
    assert [record.step for record in records(tmp_path / "run")] == [1, 2]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_a_large_state_is_copied_by_several_threads() -> None:
    meet = threading.Barrier(2, timeout=30)
    met: set[int] = set()

    def wait(left: int) -> None:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            meet.wait()

    tensors = {name: torch.randn(lazy.APART // 8) for name in "abc"}
    window = Lazy({(one.data_ptr(), one.nbytes) for one in tensors.values()}, set(), pace=Pace(wait=wait))
    source = window.stage(named(tensors), Arena())
    window.begin()
    with patch.object(os, "cpu_count", lambda: 2):
        window.fill()
    window.prove()
    assert len(met) == 2
    copies = {entry.name: bytes(entry.data) for entry in source.tensors()}
    assert copies == {name: one.numpy().tobytes() for name, one in tensors.items()}


class Slow(set[int]):
    """Whoever isn't the main thread sees what it has added no sooner than it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.added, self.go = threading.Event(), threading.Event()

    def add(self, number: int) -> None:
        super().add(number)
        if threading.current_thread() is not threading.main_thread():
            self.added.set()
            assert self.go.wait(30)


def test_the_slower_one_of_two_that_copy_comes_when_training_has_gone_on() -> None:
    tensor, slow = torch.randn(1000), Slow()
    window = Lazy(set(), {(tensor.data_ptr(), tensor.nbytes)}, own={id(tensor)}, pace=Pace(small=1, piece=2000))
    source = window.stage(named({"moment": tensor}), Arena())
    before = tensor.numpy().tobytes()
    window.begin()
    window._copied = slow
    writer = threading.Thread(target=window.fill)
    writer.start()
    assert slow.added.wait(30)
    window.finish()
    tensor.mul_(2)  # the next step
    slow.go.set()
    writer.join()
    window.prove()
    (entry,) = source.tensors()
    assert bytes(entry.data) == before
