"""Steps with a closure: the state is copied while that runs, if the step is torch's own; else before the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

import lazily
from lastgood.repo import journal
from lastgood.repo.read import records
from lastgood.state.closures import OWN, waits
from lazily import Gate, Net
from test_background_exact import content
from test_lazy_unsafe import SAFE, UNSAFE, Act, assigned, doubled, put_in, replaced
from test_lazy_unsafe import content as tensors

import forked

TORCHS = [
    one for one in vars(torch.optim).values()
    if isinstance(one, type) and issubclass(one, torch.optim.Optimizer) and one is not torch.optim.Optimizer
]  # fmt: skip


def bits(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a step may change: weights, state, numbers."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        found += [parameter.detach().numpy().tobytes() for parameter in group["params"]]
        found.append(repr({name: value for name, value in group.items() if name != "params"}))
        found += [repr(optimizer.state.get(parameter)) for parameter in group["params"]]
    return found


@pytest.mark.parametrize("kind", TORCHS, ids=lambda kind: kind.__name__)
def test_nothing_changes_before_the_closure_has_returned(kind: type[torch.optim.Optimizer]) -> None:
    """What is claimed of each of torch's optimizers, tried: in its first step and in one that has a state."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = kind([weight], lr=0.1)
    expected: list[Any] = []
    ended: list[list[Any]] = []

    def closure() -> torch.Tensor:
        if len(ended) < len(expected):
            ended.append(bits(optimizer))
        gradient = weight.detach() + 1
        weight.grad = gradient.to_sparse() if kind.__name__ == "SparseAdam" else gradient
        return weight.detach().sum()

    handle = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert waits(optimizer, handle.id) == (kind.__name__ in OWN)
        torch.optim.lr_scheduler.ConstantLR(optimizer)
        assert waits(optimizer, handle.id) == (kind.__name__ in OWN), "with a schedule of torch's as well"
        for _ in range(3):
            if kind.__name__ == "LBFGS" and not expected:
                optimizer.step(closure)  # before its first it has no state at all, and then two zeros
            expected.append(bits(optimizer))
            optimizer.step(closure=closure)
    finally:
        handle.remove()
    assert kind.__name__ not in OWN or ended == expected
    assert len({str(one) for one in expected}) == 3, "each step changes something"


def compiled_before(kind: str) -> None:
    """What torch.compile excludes it wraps, as soon as it is used for anything."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    optimizer = getattr(torch.optim, kind)([nn.Parameter(torch.randn(3))])
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    assert waits(optimizer, handle.id)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    assert not waits(optimizer, handle.id), "but one that is compiled calls no hook"


@pytest.mark.parametrize("kind", ["AdamW", "LBFGS", "SparseAdam"])
def test_a_program_that_compiles_something_else_changes_nothing_of_that(kind: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.run(compiled_before, kind, log=log) == 0, log.read_text()


class Seen:
    """What a closure does beside training, and whether the window of the last save was open then."""

    def __init__(self, act: Callable[[], object] = bool) -> None:
        self.act, self.open = act, list[bool]()
        self.ckpt: Any = None

    def step(self, model: nn.Module, optimizer: Any) -> torch.Tensor:
        def closure() -> torch.Tensor:
            window = lazily.window(self.ckpt)
            self.open.append(window is not None and window.open)
            found = lazily.loss(model)
            optimizer.zero_grad()
            found.backward()
            self.act()
            return found

        return optimizer.step(closure)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def scheduled(parameters: Any) -> torch.optim.Optimizer:
    found = adamw(parameters)
    torch.optim.lr_scheduler.StepLR(found, 1)
    return found


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS([one for one in parameters if one.is_contiguous()], lr=1e-2, max_iter=3)


class Before(torch.optim.SGD):
    """Changes weights behind torch's back, and then calls the closure."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(0.9)
        return super().step(closure)


class Ready(torch.optim.SGD):
    """torch's step, but not torch's class."""


def before(parameters: Any) -> torch.optim.Optimizer:
    return Before(parameters, lr=1e-2, momentum=0.9)


def ready(parameters: Any) -> torch.optim.Optimizer:
    return Ready(parameters, lr=1e-2, momentum=0.9)


def halve(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.5)


def hooked(parameters: list[Any]) -> torch.optim.Optimizer:
    """A hook of its own comes behind ours."""
    found = adamw(parameters)
    found.register_step_pre_hook(lambda *_: halve(parameters))
    return found


def replacing(parameters: list[Any]) -> torch.optim.Optimizer:
    """One that puts another closure in the place of ours."""
    found = adamw(parameters)

    def hook(one: Any, args: Any, kwargs: Any) -> Any:
        def other() -> Any:
            return args[1]()

        return (one, other), kwargs

    found.register_step_pre_hook(hook)
    return found


def patched(parameters: list[Any]) -> torch.optim.Optimizer:
    """A step that somebody put into the optimizer, and that looks like the one that was there."""
    found = adamw(parameters)
    inner = found.step

    @functools.wraps(inner)
    def step(closure: Any = None) -> Any:
        return inner(closure)

    found.step = step  # type: ignore[method-assign]
    return found


TRUSTED = [adamw, scheduled, lbfgs]
UNTRUSTED = [before, ready, hooked, replacing, patched]


def trained(
    root: Path,
    make: Callable[[Any], Any],
    seen: Seen,
    wait: Callable[[int], object] | None,
    around: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Three steps with a save behind each. around: each step, by its number."""
    torch.manual_seed(3)
    model = Net()
    optimizer = make(lazily.trained(model))
    with lazily.manager(root, wait, model=model, optimizer=optimizer) as ckpt:
        seen.ckpt = ckpt
        for number in range(ckpt.restore(), 3):
            with around(number):
                seen.step(model, optimizer)
            ckpt.step(number + 1)


@pytest.mark.parametrize("make", [*TRUSTED, *UNTRUSTED], ids=lambda make: make.__qualname__)
def test_I9_the_window_lasts_until_the_closure_is_over(make: Callable[[Any], Any], tmp_path: Path) -> None:
    """The writer copies nothing before that, so the window would be open for ever; afterwards it has nothing to do."""
    gates, seen = [Gate(), Gate()], Seen()
    seen.act = lambda: [gate.go.set() for gate in gates if gate.held.is_set()] if make not in TRUSTED else None
    trained(tmp_path / "a", make, Seen(), None)
    first = tmp_path / "b"

    def wait(left: int) -> None:
        """Not before the step has begun that comes behind the save."""
        gates[min(len(records(first)), 1)](left) if len(records(first)) < 2 else None

    @contextmanager
    def around(number: int) -> Iterator[None]:
        if not number:
            yield
            return
        window, before = lazily.window(seen.ckpt), len(seen.open)
        assert window is not None and window.open
        assert gates[number - 1].held.wait(120)
        yield
        assert not window.open, "nothing changed before it was copied"
        assert seen.open[before] == (make in TRUSTED)
        assert not any(seen.open[before + 1 :]), "closed behind the first call"
        gates[number - 1].go.set()

    trained(first, make, seen, wait, around)
    assert content(first) == content(tmp_path / "a") and len(content(first)) == 3


@pytest.mark.parametrize("name", ["class", "global hook"])
def test_what_comes_behind_the_hook_is_not_trusted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that somebody put into torch's class, with all names that `wraps` copies; a hook that was added later."""
    optimizer = adamw([nn.Parameter(torch.ones(2))])
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    assert waits(optimizer, handle.id)
    if name == "class":
        inner = torch.optim.AdamW.step

        @functools.wraps(inner)
        def step(*args: Any) -> Any:
            return inner(*args)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        assert not waits(optimizer, handle.id)
    else:
        other = register_optimizer_step_pre_hook(lambda *_: None)
        assert not waits(optimizer, handle.id) and waits(optimizer, other.id)
        other.remove()
        assert waits(optimizer, handle.id)
    handle.remove()
    assert handle.id not in _global_optimizer_pre_hooks


def acted(root: Path, act: Act, free: int | None) -> list[str]:
    """`act` inside of the closure of the second step, when so many pieces of the first one's save are copied."""
    torch.manual_seed(1)
    model, gate = Net(), Gate(free or 0)
    optimizer = torch.optim.AdamW(lazily.trained(model), lr=1e-2)
    seen = Seen()
    with lazily.manager(root, None if free is None else gate, model=model, optimizer=optimizer, trail=False) as ckpt:
        seen.ckpt = ckpt
        ckpt.restore()
        seen.step(model, optimizer)
        ckpt.step(1)
        assert free is None or gate.held.wait(120)
        seen.act = lambda: act(model, optimizer)
        seen.step(model, optimizer)
        assert free is None or seen.open == [False, True]
        gate.go.set()
        if act not in (replaced, put_in):  # those change what a loop would have to hand over anew
            ckpt.step(2)
    return [f"{e['event']} {e['step']}" for e in journal.read(root) if e["event"] in ("saved", "failed")]


@pytest.mark.parametrize(
    "act", [a for a in (*SAFE, *UNSAFE) if a not in (doubled, assigned) and a.__name__ != "rate"],
    ids=lambda act: act.__name__,
)  # fmt: skip
def test_what_a_closure_changes_is_captured_or_found_out(act: Act, tmp_path: Path) -> None:
    expected = acted(tmp_path / "a", act, None)
    told = acted(tmp_path / "b", act, 3)
    if told == expected:
        assert tensors(tmp_path / "b", 1) == tensors(tmp_path / "a", 1)
    else:
        assert act in UNSAFE and told == ["failed 1", "saved 2"]
    assert (act in SAFE) == (told == expected), "nothing that these change is copied within three pieces"
    if act not in (replaced, put_in):
        assert tensors(tmp_path / "b", 2) == tensors(tmp_path / "a", 2)


def saving_inside(root: Path, gate: Gate | None) -> None:
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.SGD(lazily.trained(model), lr=1e-2, momentum=0.9)
    wait = None if gate is None else lambda left: None
    with lazily.manager(root, wait, model=model, optimizer=optimizer, save_steps=None) as ckpt:
        ckpt.restore()
        lazily.step(model, optimizer)

        def closure() -> torch.Tensor:
            ckpt.step(1)
            ckpt._steps.pace = lazily.Pace(small=1, piece=lazily.PIECE, wait=gate)
            ckpt.save()
            assert gate is None or gate.held.wait(120)
            return torch.zeros(())

        optimizer.step(closure)
        window = lazily.window(ckpt)
        assert (window is None) == (gate is None)
        assert window is None or not window.open
        if gate is not None:
            gate.go.set()


def test_a_save_inside_of_a_closure(tmp_path: Path) -> None:
    """Its window ends with the closure, in front of the update that no hook announces any more."""
    saving_inside(tmp_path / "a", None)
    saving_inside(tmp_path / "b", Gate())
    assert content(tmp_path / "a") == content(tmp_path / "b") and len(content(tmp_path / "b")) == 1


def test_a_closure_that_fails_changes_nothing(tmp_path: Path) -> None:
    gate = Gate()
    model = Net()
    optimizer = torch.optim.AdamW(lazily.trained(model))

    def closure() -> torch.Tensor:
        raise ArithmeticError

    with lazily.manager(tmp_path, gate, model=model, optimizer=optimizer, save_steps=None) as ckpt:
        ckpt.restore()
        lazily.step(model, optimizer)
        ckpt.step(1)
        ckpt.save()
        window = lazily.window(ckpt)
        assert window is not None and gate.held.wait(120)
        with pytest.raises(ArithmeticError):
            optimizer.step(closure)
        assert window.open
        gate.go.set()
    assert [record.step for record in records(tmp_path)] == [1]
