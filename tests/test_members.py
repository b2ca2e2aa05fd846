"""One walk through a model finds what torch's own walks find."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lastgood.state.members import Walk, members


class Hiding(nn.Module):
    """Names of its own, as FSDP has them."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = nn.Linear(2, 2)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.replace("wrapped.", ""), parameter


class Skipping(nn.Module):
    """Hides itself from whoever walks through the model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return iter(())


def same(model: nn.Module) -> None:
    parameters, buffers, modules = members(model)
    assert list(modules) == list(model.modules())
    for mine, torchs in ((parameters, dict(model.named_parameters())), (buffers, dict(model.named_buffers()))):
        assert list(mine) == list(torchs)
        assert all(mine[name] is torchs[name] for name in mine)


LEAVES = (
    lambda: nn.Linear(2, 3), lambda: nn.BatchNorm1d(2), lambda: nn.Linear(2, 2, bias=False), nn.ReLU, Hiding, Skipping,
    lambda: nn.Linear(2, 2, device="meta"),
)  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Trees of modules with shared modules, shared tensors, missing ones, and some that walk in their own way."""
    some: list[nn.Module] = [make() for make in draw(st.lists(st.sampled_from(LEAVES), min_size=1, max_size=5))]
    for _ in range(draw(st.integers(0, 5))):
        outer = nn.Module()
        for number, child in enumerate(draw(st.lists(st.sampled_from(some), max_size=4))):
            outer.add_module(f"part{number}", child)
        if draw(st.booleans()):
            outer.register_parameter("none", None)
            outer.register_buffer("count", torch.zeros(1), persistent=draw(st.booleans()))
        weights = [parameter for child in outer.children() for parameter in child._parameters.values()]
        if weights and draw(st.booleans()):
            outer.register_parameter("tied", draw(st.sampled_from(weights)))
            outer.register_buffer("both", draw(st.sampled_from(weights)))
        some.append(outer)
    return some[-1]


@settings(deadline=None)
@given(models())
def test_one_walk_finds_what_torch_finds(model: nn.Module) -> None:
    same(model)


def test_an_instance_with_a_walk_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].named_modules = lambda *args, **kwargs: iter(())  # type: ignore[method-assign]
    assert members(model)[:2] == ({}, {})


# ---- the next walk -----------------------------------------------------------------------


class Other(nn.Linear):
    """Another kind of module with the same members."""


def inner(model: nn.Module) -> nn.Module:
    while model._modules:
        model = next(reversed(model._modules.values()))  # type: ignore[assignment]
    return model


def with_parameter(model: nn.Module, number: int) -> None:
    setattr(inner(model), f"more{number}", nn.Parameter(torch.ones(1)))


def with_buffer(model: nn.Module, number: int) -> None:
    inner(model).register_buffer(f"held{number}", torch.ones(1))


def with_module(model: nn.Module, number: int) -> None:
    inner(model).add_module(f"part{number}", nn.BatchNorm1d(2))


def without(model: nn.Module, number: int) -> None:
    for module in model.modules():
        for table in (module._parameters, module._buffers, module._modules):
            if table:
                table.popitem()
                return


def equal_one(model: nn.Module, number: int) -> None:
    """A tensor of one element in the place of one that is equal: == says nothing of which it is."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel() == 1 and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
                return


def emptied(model: nn.Module, number: int) -> None:
    for module in model.modules():
        if module._parameters:
            module._parameters[next(iter(module._parameters))] = None
            return


def turned_round(model: nn.Module, number: int) -> None:
    module = inner(model)
    module._parameters = dict(reversed(module._parameters.items()))


def another_name(model: nn.Module, number: int) -> None:
    module = inner(model)
    for name, parameter in list(module._parameters.items()):
        del module._parameters[name]
        module._parameters[f"{name}{number}"] = parameter


def moved_on(model: nn.Module, number: int) -> None:
    """A parameter that goes from one module to the next, so that all of them in a row are the same."""
    found = [module for module in model.modules() if module._parameters]
    for one, other in pairwise(found):
        name, parameter = one._parameters.popitem()
        other._parameters = {name: parameter, **other._parameters}
        return


def another_class(model: nn.Module, number: int) -> None:
    for module in model.modules():
        if type(module) in (nn.Linear, Other):
            module.__class__ = Other if type(module) is nn.Linear else nn.Linear


def hides(model: nn.Module, number: int) -> None:
    inner(model).__dict__["named_modules"] = lambda *args, **kwargs: iter(())


CHANGES = (
    with_parameter, with_buffer, with_module, without, equal_one, emptied, turned_round, another_name, moved_on,
    another_class, hides,
)  # fmt: skip


@given(models(), st.lists(st.sampled_from(CHANGES), max_size=8))
@settings(deadline=None, max_examples=200)
def test_I9_a_walk_that_is_remembered_is_the_one_that_would_be_made(model: nn.Module, changes: list[Any]) -> None:
    walk = Walk()
    for number, change in enumerate((lambda *_: None, *changes)):
        change(model, number)
        for _ in range(2):
            mine, theirs = walk.through(model), members(model)
            assert mine[2] == theirs[2]
            for one, other in zip(mine[:2], theirs[:2], strict=True):
                assert list(one) == list(other)
                assert all(one[name] is other[name] for name in other)


def test_what_is_the_same_is_the_same_object() -> None:
    model, walk = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), Walk()
    found = walk.through(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert walk.through(model) is found
    assert walk.through(nn.Linear(2, 2)) is not found
    model[0].bias = nn.Parameter(model[0].bias.detach())
    assert walk.through(model) is not found
