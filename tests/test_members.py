"""One walk through a model finds what torch's own walks find."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lastgood.state.members import members


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
