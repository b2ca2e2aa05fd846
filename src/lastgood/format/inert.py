"""Pickles looked at, not executed: every class and function in them becomes an inert `Node`.

Other tools write pickles. Unpickling runs whatever they name; here a name is never
imported and never called, so a hostile file yields nothing but nodes. Enough to see the
steps, names, shapes and dtypes in a torch archive, on a machine without torch.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
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


class _Sealed(type):
    """A pickle can name a class and set attributes on it (BUILD): here that would change what later files become."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise TypeError("a pickle sets attributes on a class")


class _Dict(dict[Any, Any], metaclass=_Sealed):
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
        _check_memo(data)
        return _Unpickler(io.BytesIO(data), persistent).load()
    except Exception as error:  # what a broken pickle raises is open-ended
        reason = f"{error}"[:200] or type(error).__name__
        raise CorruptCheckpoint(f"{where}: not a readable pickle: {reason}") from error


_FAR = re.compile(rb"r..(?:.[^\x00]|[^\x00-\x0f].)|p[0-9]{7}", re.DOTALL)
"""What may put something at a number above 2**20 in the memo; mostly it is text that looks like it."""


def _check_memo(data: bytes) -> None:
    """Python makes a memo as long as the largest number in it: ten bytes could ask for 64 GiB, and get them.

    Nobody who writes a pickle counts beyond its length.
    """
    if _FAR.search(data) is None:
        return
    lengths, at, end = _lengths(), 0, len(data)
    while at < end and data[at] != 0x2E:  # STOP
        code, length = data[at], lengths[data[at]]
        at += 1
        if code in (0x70, 0x72):  # PUT, LONG_BINPUT
            number = (
                int(data[at : data.find(b"\n", at)]) if code == 0x70 else int.from_bytes(data[at : at + 4], "little")
            )
            if number > end:
                raise ValueError("a memo number beyond the length of the pickle")
        if length >= 0:
            at += length
        elif length == -1:
            for _ in range(2 if code in (0x63, 0x69) else 1):  # GLOBAL and INST have two lines
                at = data.find(b"\n", at) + 1
                if at == 0:
                    return
        else:
            width = {-2: 1, -3: 4, -4: 4, -5: 8}[length]
            at += width + int.from_bytes(data[at : at + width], "little")


@functools.lru_cache(maxsize=1)
def _lengths() -> list[int]:
    """Opcode -> bytes of its argument, or pickletools' number for a line or a counted string."""
    import pickletools

    table = [0] * 256
    for opcode in pickletools.opcodes:
        table[ord(opcode.code)] = opcode.arg.n if opcode.arg is not None else 0
    return table


FOLLOWED = ("torch._utils._rebuild_parameter",)


def bounded(value: Any, limit: int) -> Any:
    """The value, if it holds at most `limit` things when everything that it names twice is counted twice.

    Lists of one list ten times over, thirty deep, take a line of pickle, and more memory than there is once they are
    copied or printed. Of nodes only what `archive` follows is looked into. Raises CorruptCheckpoint.
    """
    pending, count = [iter((value,))], 0
    while pending:
        for item in pending[-1]:
            count += 1
            if count > limit:
                raise CorruptCheckpoint("a pickle in which the same things are named over and over")
            inner = (item.args if item.name in FOLLOWED else item.pairs) if isinstance(item, Node) else item
            if isinstance(inner, (dict, list, tuple, set)) and inner:
                pending.append(iter(inner.values() if isinstance(inner, dict) else inner))
                break
        else:
            pending.pop()
    return value
