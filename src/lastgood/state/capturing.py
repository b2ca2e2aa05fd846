"""An optimizer's state, captured save after save: as long as its tensors are the same ones, only their values change.

To name each tensor of thousands of parameters, and to say in JSON where it is, takes as long as to copy them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch

from lastgood.state.optimizer import capture, encoded_groups, parameter_names, plain

FIXED = frozenset({torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)})
"""Kinds of values that are another object when they are another value; of a tensor its name is all that is kept."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the last capture rests on, by the very objects: they are kept, so that no other one gets their number."""

    live: list[str]
    tensors: list[torch.Tensor]
    groups: list[list[Any]]
    parameters: list[Any]
    keys: list[Any]
    sizes: list[int]
    values: list[Any]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, live: Mapping[str, torch.Tensor]) -> Shape | None:
        """None for an optimizer that may hand out something else than it holds."""
        if getattr(type(optimizer), "state_dict", None) is not torch.optim.Optimizer.state_dict:
            return None
        if "state_dict" in vars(optimizer):
            return None
        if optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks:
            return None
        entries = list(optimizer.state.values())
        if set(map(type, entries)) - {dict}:
            return None
        return cls(
            list(live), list(live.values()), [list(group["params"]) for group in optimizer.param_groups],
            list(optimizer.state), list(chain.from_iterable(entries)), list(map(len, entries)),
            list(chain.from_iterable(entry.values() for entry in entries)),
        )  # fmt: skip

    @property
    def fixed(self) -> bool:
        return FIXED.issuperset(map(type, self.values))

    def same(self, other: Shape) -> bool:
        """Whether all of it is the same object, or the same text."""
        return (
            self.sizes == other.sizes
            and list(map(id, self.values)) == list(map(id, other.values))
            and list(map(id, self.keys)) == list(map(id, other.keys))
            and list(map(id, self.parameters)) == list(map(id, other.parameters))
            and [list(map(id, one)) for one in self.groups] == [list(map(id, one)) for one in other.groups]
            and list(map(id, self.tensors)) == list(map(id, other.tensors))
            and self.live == other.live
        )


class Taken(NamedTuple):
    """What a capture found: of the parameters their names, by group; of their states the JSON and the tensors."""

    shape: Shape
    names: list[list[str]]
    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@dataclass(slots=True)
class Capturing:
    """Of one optimizer. What is kept of its tensors is the tensors themselves, no copy of any."""

    _last: Taken | None = None
    _bytes: tuple[int, int] = (-1, 0)  # parameters with a state, and its bytes

    def bytes(self, optimizer: Any) -> int:
        """Of the tensors of its state; reckoned anew when more parameters, or fewer, have one."""
        state = plain(optimizer).state
        if self._bytes[0] != len(state):
            values = (value for entry in state.values() if isinstance(entry, Mapping) for value in entry.values())
            self._bytes = len(state), sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
        return self._bytes[1]

    def capture(
        self, optimizer: Any, live: Mapping[str, torch.Tensor], prefix: str = ""
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What `lastgood.state.optimizer.capture` gives. Always of the same prefix."""
        inner = plain(optimizer)
        shape, last = Shape.of(inner, live), self._last
        if shape is not None and last is not None and shape.same(last.shape):
            tensors = dict(last.tensors)
            groups = encoded_groups(inner.param_groups, last.names, tensors, prefix)
            return {**last.values, "groups": groups}, tensors
        self._last = None
        values, tensors = capture(optimizer, live, prefix)
        if shape is not None and shape.fixed:
            state = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}state.")}
            self._last = Taken(shape, parameter_names(inner, live), dict(values), state)
        return values, tensors
