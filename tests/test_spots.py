"""Tensors whose places are remembered: whether they lie where they did, in the same form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lastgood.state.spots import SMALL, Spots

LARGE = SMALL // 4 + 1

MADE: dict[str, Callable[[], torch.Tensor]] = {
    "small": lambda: torch.randn(4, 4),
    "trained": lambda: torch.nn.Parameter(torch.randn(4, 4)),
    "scalar": lambda: torch.tensor(1.0),
    "large": lambda: torch.randn(2, LARGE),
    "turned": lambda: torch.randn(4, 5).t(),
    "complex": lambda: torch.view_as_complex(torch.randn(4, 2)),
    "empty": lambda: torch.empty(0, 3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "negated": lambda: torch._neg_view(torch.randn(3)),
}


def elsewhere(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


def another_dtype(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.view(torch.bfloat16 if tensor.requires_grad else torch.int32)


def another_shape(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.view(-1)


def other_strides(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.t()


def further_on(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data[1:]


CHANGES = (elsewhere, another_dtype, another_shape, other_strides, further_on)


@given(st.lists(st.sampled_from(list(MADE)), max_size=8))
def test_values_may_change(kinds: list[str]) -> None:
    tensors = [MADE[kind]() for kind in kinds]
    spots = Spots.of(tensors)
    for tensor in tensors:
        if tensor.layout is torch.strided:
            tensor.data.mul_(2)
    assert spots.still()
    assert Spots.of(tensors).still()


@pytest.mark.parametrize("kind", ["small", "trained", "large"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_places_and_forms_may_not(kind: str, change: Callable[[torch.Tensor], None]) -> None:
    tensor = MADE[kind]()
    spots = Spots.of([MADE["small"](), tensor, MADE["large"]()])
    assert spots.still()
    change(tensor)
    assert not spots.still()


@pytest.mark.parametrize("kind", ["scalar", "turned", "complex"])
def test_so_with_others(kind: str) -> None:
    tensor = MADE[kind]()
    spots = Spots.of([tensor])
    elsewhere(tensor)
    assert not spots.still()
