"""An optimizer's state that is captured again: what comes is what a first capture would find."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lastgood.state.capturing import Capturing
from lastgood.state.optimizer import capture
from lastgood.state.spots import KEPT

Net = nn.Module


def net() -> Net:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD without a state": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "a rate in a tensor": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1)),
}


def step(model: Net, optimizer: Any) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.arange(8.0).view(4, 2)).square().mean()
        loss.backward()
        return loss  # type: ignore[no-any-return]

    optimizer.step(closure)


def one_without(model: Net, optimizer: Any) -> None:
    optimizer.state.pop(next(iter(optimizer.state), None), None)


def whole_number(model: Net, optimizer: Any) -> None:
    for entry in optimizer.state.values():
        entry["counted"] = entry.get("counted", 10**6) + 1


def in_a_list(model: Net, optimizer: Any) -> None:
    """Changed in place: it is the same object still."""
    for entry in optimizer.state.values():
        entry.setdefault("history", []).append(torch.ones(1))


def replaced(model: Net, optimizer: Any) -> None:
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                entry[key] = value.clone()
                return


def swapped(model: Net, optimizer: Any) -> None:
    """Two names that exchange their tensors."""
    for entry in optimizer.state.values():
        if "exp_avg" in entry:
            entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg_sq"], entry["exp_avg"]
            return


def renamed(model: Net, optimizer: Any) -> None:
    """One that the optimizer doesn't ask for."""
    for entry in optimizer.state.values():
        spare = [key for key in entry if key.startswith("spare")]
        entry[f"spare{len(spare[0])}" if spare else "spare"] = entry.pop(spare[0]) if spare else torch.ones(1)
        return


def other_rate(model: Net, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5


def rate_in_place(model: Net, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].mul_(0.5)


def another_group(model: Net, optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.LBFGS):
        name = f"more{len(optimizer.param_groups)}"
        model.register_parameter(name, nn.Parameter(torch.ones(2)))
        optimizer.add_param_group({"params": [getattr(model, name)]})


def other_order(model: Net, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].reverse()


def loaded(model: Net, optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def other_names(model: Net, optimizer: Any) -> None:
    model.add_module("around", nn.Sequential(*model.children()))
    for name in [name for name in model._modules if name != "around"]:
        del model._modules[name]


def hooked(model: Net, optimizer: Any) -> None:
    def marked(_: Any, state: dict[str, Any]) -> None:
        state["mark"] = state.get("mark", 0) + 1

    optimizer.register_state_dict_post_hook(marked)


def own_state_dict(model: Net, optimizer: Any) -> None:
    kind = type(optimizer)
    optimizer.state_dict = lambda: {**kind.state_dict(optimizer), "mine": len(optimizer.state)}


CHANGES = (
    step, one_without, whole_number, in_a_list, replaced, swapped, renamed, other_rate, rate_in_place, another_group,
    other_order, loaded, other_names, hooked, own_state_dict,
)  # fmt: skip


def live(model: Net) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(one: Capturing, model: Net, optimizer: Any, prefix: str) -> None:
    (mine, held), (theirs, tensors) = (f(optimizer, live(model), prefix) for f in (one.capture, capture))
    assert mine == theirs
    assert list(held) == list(tensors)
    assert all(held[name] is tensors[name] for name in tensors)
    held["extra"] = torch.ones(1)  # whoever gets them may add to them
    mine["extra"] = 1


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.sampled_from(CHANGES), max_size=7), st.sampled_from([KEPT, 0]))
@settings(deadline=None, max_examples=60)
def test_I9_captured_again_is_what_is_captured_anew(kind: str, changes: list[Callable[..., None]], kept: int) -> None:
    model = net()
    optimizer, capturing = KINDS[kind](model.parameters()), Capturing(kept)
    for change in (lambda *_: None, step, *changes):
        change(model, optimizer)
        for _ in range(2):
            same(capturing, model, optimizer, "first.")


@pytest.mark.parametrize("kept", [KEPT, 0])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_I9_after_each_change_alone(change: Callable[..., None], kept: int) -> None:
    model = net()
    optimizer, capturing = KINDS["AdamW"](model.parameters()), Capturing(kept)
    step(model, optimizer)
    for _ in range(3):
        same(capturing, model, optimizer, "")
        change(model, optimizer)
    same(capturing, model, optimizer, "")


def test_its_size_is_that_of_its_tensors() -> None:
    model = net()
    optimizer, capturing = KINDS["AdamW"](model.parameters()), Capturing()
    assert capturing.bytes(optimizer) == 0
    step(model, optimizer)
    size = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    assert capturing.bytes(optimizer) == size > 0
    one_without(model, optimizer)
    assert 0 < capturing.bytes(optimizer) < size


def test_the_names_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lastgood.state import capturing as module

    asked, model = [], net()
    optimizer, capturing = KINDS["AdamW"](model.parameters()), Capturing()
    monkeypatch.setattr(module, "capture", lambda *args: asked.append(1) or capture(*args))  # type: ignore[func-returns-value]
    for _ in range(4):
        step(model, optimizer)
        capturing.capture(optimizer, live(model))
    assert asked == [1]


@pytest.mark.parametrize("kept", [KEPT, 0])
def test_tensors_that_an_optimizer_gave_up_are_nobodys_unless_they_are_few_bytes(kept: int) -> None:
    model = net()
    optimizer, capturing = KINDS["AdamW"](model.parameters()), Capturing(kept)
    step(model, optimizer)
    capturing.capture(optimizer, live(model))
    given_up = [weakref.ref(value) for entry in optimizer.state.values() for value in entry.values()]
    for entry in optimizer.state.values():
        entry.update({key: value.clone() for key, value in entry.items()})
    gc.collect()
    assert [reference() is not None for reference in given_up] == [bool(kept)] * len(given_up)
