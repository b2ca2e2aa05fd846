"""Every parameter and buffer of a model, in one walk; and whether the next walk would find the same.

torch's `named_parameters` hands each name up through a generator for every level of modules: of an adapter on a small
GPT-2 (526 modules) two such walks take 3 ms, several times in each save. This one gives the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

Members = tuple[dict[str, Tensor], dict[str, Tensor], tuple[nn.Module, ...]]
"""Parameters and buffers, by name, and the modules."""

_ROOT = ("named_modules", "named_parameters", "named_buffers", "_named_members")
_HELD = itemgetter("_parameters", "_buffers", "_modules")
_PLAIN = frozenset({dict, OrderedDict})


def members(model: nn.Module) -> Members:
    """As `named_parameters`, `named_buffers` and `modules` have them, in their order.

    A tensor that several modules share comes once, under its first name.
    """
    return _walked(model) or _asked(model)


def _asked(model: nn.Module) -> Members:
    return dict(model.named_parameters()), dict(model.named_buffers()), tuple(model.modules())


def _walked(model: nn.Module) -> Members | None:
    """None for one with a walk of its own."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: dict[nn.Module, None] = {}
    known: tuple[set[int], set[int]] = (set(), set())

    def walk(module: nn.Module, prefix: str) -> bool:
        """False where a module has a walk of its own: FSDP hides its wrappers."""
        if module in seen:
            return True
        seen[module] = None
        if type(module).named_modules is not nn.Module.named_modules or "named_modules" in module.__dict__:
            return False
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in known[0]:
                known[0].add(id(parameter))
                parameters[prefix + name] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in known[1]:
                known[1].add(id(buffer))
                buffers[prefix + name] = buffer
        for name, child in module._modules.items():
            if child is not None and not walk(child, f"{prefix}{name}."):
                return False
        return True

    return (parameters, buffers, tuple(seen)) if _ours(model) and walk(model, "") else None


def _ours(model: nn.Module) -> bool:
    own, kind = model.__dict__, type(model)
    return all(getattr(kind, name) is getattr(nn.Module, name) and name not in own for name in _ROOT)


@dataclass(slots=True)
class Walk:
    """The last walk through one model, which is the next one as long as each module has the same members by the same
    names: that takes a fifth of the time to see. What is returned is the same object then.

    _tables: of all modules, what they hold their members in; _kinds: of the modules; _names, _values: what the tables
    held, one behind the other. Values are kept, so that no other object gets the number of one.
    """

    _found: Members | None = None
    _kinds: list[type] = field(default_factory=list)
    _tables: list[dict[str, Any]] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _filled: list[dict[str, Any]] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _values: list[Any] = field(default_factory=list)

    def through(self, model: nn.Module) -> Members:
        """`members(model)`."""
        if self._found is None or not self._still(model, self._found[2]):
            self._found = None
            found = _walked(model)
            if found is None or not self._remembered(found):
                return found or _asked(model)
            self._found = found
        return self._found

    def _remembered(self, found: Members) -> bool:
        """False where a table may have its own idea of what it holds, as those of TorchScript have."""
        try:
            self._tables = list(_tables(list(map(vars, found[2]))))
        except KeyError:
            return False
        if not _PLAIN.issuperset(map(type, self._tables)):
            return False
        self._kinds = list(map(type, found[2]))
        self._sizes, self._filled = list(map(len, self._tables)), [table for table in self._tables if table]
        self._names, self._values = list(chain.from_iterable(self._filled)), list(_values(self._filled))
        return True

    def _still(self, model: nn.Module, modules: tuple[nn.Module, ...]) -> bool:
        """What is compared is the objects, not what they say of each other: two tensors of one element that are equal
        are two tensors all the same."""
        if modules[0] is not model or not _ours(model) or list(map(type, modules)) != self._kinds:
            return False
        own = list(map(vars, modules))
        if not all(map(is_, _tables(own), self._tables)) or any("named_modules" in one for one in own):
            return False
        if list(map(len, self._tables)) != self._sizes or list(chain.from_iterable(self._filled)) != self._names:
            return False
        return all(map(is_, _values(self._filled), self._values))


def _tables(own: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return chain.from_iterable(map(_HELD, own))


def _values(tables: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(table.values() for table in tables)
