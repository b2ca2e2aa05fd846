"""Pickles looked at, not executed: every class and function in them becomes an inert `Node`.

Other tools write pickles. Unpickling runs whatever they name; here a name is never
imported and never called, so a hostile file yields nothing but nodes. Enough to see the
steps, names, shapes and dtypes in a torch archive, on a machine without torch.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, NoReturn

from lastgood.errors import CorruptCheckpoint

LIMIT = 256 << 20
"""Largest pickle that is looked at (256 MiB)."""


class Node:
    """What a pickle would have built: `name` is module.qualname, `args` what it would have been called with.

    `state` is what its attributes would have been set to; items and pairs what would have been appended to it.
    """

    __slots__ = ("args", "items", "name", "pairs", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args = name, args
        self.state: Any = None
        self.items: list[Any] = []
        self.pairs: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def add(self, item: Any) -> None:
        self.items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs[key] = value

    def __reduce__(self) -> NoReturn:
        raise TypeError("an inert node is never pickled")

    def __repr__(self) -> str:
        return f"Node({self.name})"

    @property
    def fields(self) -> dict[str, Any]:
        """Attributes of the object, as far as the pickle says."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state if isinstance(state, dict) else {}


def _named(name: str) -> type:
    """A class whose calls make nodes: REDUCE, NEWOBJ and BUILD all work on it."""

    def __new__(cls: type, *args: Any, **_: Any) -> Node:
        return Node(name, args)

    return type("Inert", (), {"__new__": __new__, "inert": name, "__slots__": ()})


class _Dict(dict[Any, Any]):
    """A dict that attributes can be set on, as on an OrderedDict (state_dict() puts `_metadata` there)."""


_PLAIN: dict[str, Callable[..., Any]] = {"collections.OrderedDict": _Dict, "builtins.set": set, "builtins.slice": slice}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, persistent: Callable[[Any], Any]) -> None:
        super().__init__(file)
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        return _PLAIN.get(full) or _named(full)

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)


def loads(data: bytes, where: str, persistent: Callable[[Any], Any] = lambda pid: Node("persistent", (pid,))) -> Any:
    """The tree in a pickle. Raises CorruptCheckpoint for anything that isn't one."""
    try:
        return _Unpickler(io.BytesIO(data), persistent).load()
    except Exception as error:  # what a broken pickle raises is open-ended
        raise CorruptCheckpoint(f"{where}: not a readable pickle: {error}") from error
