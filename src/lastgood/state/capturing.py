"""An optimizer's state, captured save after save: as long as its tensors are the same ones, only their values change.

To name each tensor of thousands of parameters, and to say in JSON where it is, takes as long as to copy them all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch

from lastgood.state.optimizer import capture, encoded_groups, parameter_names, plain
from lastgood.state.spots import KEPT

FIXED = frozenset({torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)})
"""Kinds of values that are another object when they are another value; of a tensor only its name is remembered."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a capture rests on, by the very objects. Parameters are kept, so that no other one gets their number; of the
    state's tensors only weak references where they are many bytes.
    """

    live: list[str]
    tensors: list[torch.Tensor]
    groups: list[list[Any]]
    parameters: list[Any]
    keys: list[Any]
    sizes: list[int]
    values: list[Any]
    weak: bool

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, live: Mapping[str, torch.Tensor], values: list[Any], *, weak: bool
    ) -> Shape:
        entries = list(optimizer.state.values())
        held = [weakref.ref(one) if isinstance(one, torch.Tensor) else one for one in values] if weak else values
        return cls(
            list(live), list(live.values()), [list(group["params"]) for group in optimizer.param_groups],
            list(optimizer.state), list(chain.from_iterable(entries)), list(map(len, entries)), held, weak,
        )  # fmt: skip

    def still(self, optimizer: torch.optim.Optimizer, live: Mapping[str, torch.Tensor], values: list[Any]) -> bool:
        """Whether all of it is the same object, or the same text."""
        entries, groups = optimizer.state.values(), [group["params"] for group in optimizer.param_groups]
        held = [one() if type(one) is weakref.ref else one for one in self.values] if self.weak else self.values
        return (
            list(map(len, entries)) == self.sizes
            and all(map(is_, values, held))
            and all(map(is_, chain.from_iterable(entries), self.keys))
            and all(map(is_, optimizer.state, self.parameters))
            and list(map(len, groups)) == list(map(len, self.groups))
            and all(map(is_, chain.from_iterable(groups), chain.from_iterable(self.groups)))
            and list(live) == self.live
            and all(map(is_, live.values(), self.tensors))
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
    """What a capture found. names: of the parameters, by group; values: JSON; tensors: those of the state, by name, or
    their names alone where they are many bytes."""

    shape: Shape
    names: list[list[str]]
    values: dict[str, Any]
    tensors: dict[str, torch.Tensor] | list[str]


@dataclass(slots=True)
class Capturing:
    """Of one optimizer. kept: bytes up to which the tensors of its state are kept."""

    kept: int = KEPT
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
            tensors = dict(last.tensors if isinstance(last.tensors, dict) else _named(last.tensors, held))
            groups = encoded_groups(inner.param_groups, last.names, tensors, prefix)
            return {**last.values, "groups": groups}, tensors
        self._last = None
        values, tensors = capture(optimizer, live, prefix)
        if held is not None and FIXED.issuperset(map(type, held)):
            self._last = self._taken(inner, live, held, values, [n for n in tensors if n.startswith(f"{prefix}state.")])
        return values, tensors

    def _taken(
        self, inner: torch.optim.Optimizer, live: Mapping[str, torch.Tensor], held: list[Any], values: dict[str, Any],
        names: list[str],
    ) -> Taken:  # fmt: skip
        weak = sum(tensor.nbytes for _, tensor in _named(names, held)) > self.kept
        shape = Shape.of(inner, live, held, weak=weak)
        tensors = names if weak else dict(_named(names, held))
        return Taken(shape, parameter_names(inner, live), dict(values), tensors)


def _named(names: list[str], held: list[Any]) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors among all that a state holds."""
    return zip(names, (value for value in held if isinstance(value, torch.Tensor)), strict=True)
