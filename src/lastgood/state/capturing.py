"""An optimizer's state, captured save after save: as long as its tensors are the same ones, only their values change.

To name each tensor of thousands of parameters, and to say in JSON where it is, takes as long as to copy them all.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch

from lastgood.state.optimizer import capture, encoded_groups, parameter_names, plain

FIXED = frozenset({torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)})
"""Kinds of values that are another object when they are another value; of a tensor only its name is remembered."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a capture rests on, by the very objects. Parameters are kept, so that no other one gets their number; of the
    state's tensors only weak references, or an optimizer that makes new ones would need room for the old ones as well.
    """

    live: list[str]
    tensors: list[torch.Tensor]
    groups: list[list[Any]]
    parameters: list[Any]
    keys: list[Any]
    sizes: list[int]
    values: list[Any]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, live: Mapping[str, torch.Tensor], values: list[Any]) -> Shape:
        entries = list(optimizer.state.values())
        return cls(
            list(live), list(live.values()), [list(group["params"]) for group in optimizer.param_groups],
            list(optimizer.state), list(chain.from_iterable(entries)), list(map(len, entries)),
            [weakref.ref(value) if isinstance(value, torch.Tensor) else value for value in values],
        )  # fmt: skip

    def still(self, optimizer: torch.optim.Optimizer, live: Mapping[str, torch.Tensor], values: list[Any]) -> bool:
        """Whether all of it is the same object, or the same text."""
        entries, groups = optimizer.state.values(), optimizer.param_groups
        return (
            list(map(len, entries)) == self.sizes
            and all(map(is_, values, [one() if type(one) is weakref.ref else one for one in self.values]))
            and list(map(id, chain.from_iterable(entries))) == list(map(id, self.keys))
            and list(map(id, optimizer.state)) == list(map(id, self.parameters))
            and [list(map(id, group["params"])) for group in groups] == [list(map(id, one)) for one in self.groups]
            and list(map(id, live.values())) == list(map(id, self.tensors))
            and list(live) == self.live
        )


def _values(optimizer: torch.optim.Optimizer) -> list[Any] | None:
    """All that its state holds; None where it may hand out something else than it holds."""
    if getattr(type(optimizer), "state_dict", None) is not torch.optim.Optimizer.state_dict:
        return None
    if "state_dict" in vars(optimizer):
        return None
    if optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks:
        return None
    entries = list(optimizer.state.values())
    if set(map(type, entries)) - {dict}:
        return None
    return list(chain.from_iterable(entry.values() for entry in entries))


class Taken(NamedTuple):
    """What a capture found. names: of the parameters, by group; values: JSON; tensors: names of those of the state."""

    shape: Shape
    names: list[list[str]]
    values: dict[str, Any]
    tensors: list[str]


@dataclass(slots=True)
class Capturing:
    """Of one optimizer."""

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
        inner, last = plain(optimizer), self._last
        held = _values(inner)
        if last is not None and held is not None and last.shape.still(inner, live, held):
            state = (value for value in held if isinstance(value, torch.Tensor))
            tensors = dict(zip(last.tensors, state, strict=True))
            groups = encoded_groups(inner.param_groups, last.names, tensors, prefix)
            return {**last.values, "groups": groups}, tensors
        self._last = None
        values, tensors = capture(optimizer, live, prefix)
        if held is not None and FIXED.issuperset(map(type, held)):
            names = [name for name in tensors if name.startswith(f"{prefix}state.")]
            self._last = Taken(Shape.of(inner, live, held), parameter_names(inner, live), dict(values), names)
        return values, tensors
