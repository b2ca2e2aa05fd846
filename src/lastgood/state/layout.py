"""Where the copies of a file's tensors lie in memory: found once for all saves that have the same tensors.

To ask torch for the place, shape and memory of each of thousands of tensors takes longer than to copy them. What has
the same tensors at the same places as the save before is copied by what was found out then: small ones in rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch

from lastgood.format.tensors import Tensor, check
from lastgood.state.guarded import Guarded
from lastgood.state.proof import Bytes, raw
from lastgood.state.spots import KEPT, Spots, places, simple
from lastgood.state.stored import open_to
from lastgood.state.tensors import CODE_OF, Named, code_of, in_rows
from lastgood.store.memory import Arena


class Row(NamedTuple):
    """Small tensors of one dtype. flat: each again, in one dimension; target: all of them in a row."""

    flat: list[torch.Tensor]
    target: torch.Tensor


@dataclass(slots=True)
class Large:
    """tensor: gone when nobody else has it. entry: with its buffer, which is `target`, too; plain: whether its memory,
    in a row, is what is written; guard: of the last save, if it stays."""

    tensor: weakref.ref[torch.Tensor]
    entry: Tensor
    target: Bytes
    plain: bool
    guard: Guarded | None = None


@dataclass(slots=True)
class Layout:
    """entries: of the file, with their buffers. Small tensors are kept, and `copy` takes care of them; large: all
    others, which aren't, unless `keeps`: a model that has got other tensors doesn't keep its old ones for this.
    """

    entries: tuple[Tensor, ...]
    large: dict[str, Large]
    keeps: bool
    _names: list[str]
    _small: list[torch.Tensor]
    _spots: Spots
    _places: list[Any]
    _rows: list[Row]
    _last: Named | None = None  # what was found to be the same, where somebody knows for how long

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], arena: Arena, limit: int) -> Layout:
        """In memory that is taken for it. limit: bytes of a small one. Raises Short, NotSupported, UsageError."""
        small = {name: tensor for name, tensor in tensors.items() if simple(tensor) and tensor.nbytes <= limit}
        large = {name: tensor for name, tensor in tensors.items() if name not in small}
        entries, rows = dict[str, Tensor](), list[Row]()
        for some in in_rows(small):
            rows += _row(some, arena, entries)
        for name, tensor in large.items():
            entries[name] = Tensor(name, code_of(name, tensor), tuple(tensor.shape), arena.take(tensor.nbytes))
        ordered = tuple(entries[name] for name in tensors)
        check(ordered)
        loose = {
            name: Large(weakref.ref(tensor), entries[name], raw(entries[name]), open_to(tensor))
            for name, tensor in large.items()
        }
        keeps = sum(len(one.target) for one in loose.values()) <= KEPT
        kept = list(small.values())
        return cls(ordered, loose, keeps, list(tensors), kept, Spots.of(kept), places(large.values()), rows)

    def still(self, named: Named) -> bool:
        """Whether these are the very same objects, and lie where they did, in the same form."""
        if named.surely(self._last):
            return True
        if not self._still(named.tensors):
            return False
        self._last = named if named.since is not None else None
        return True

    def _still(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        if list(tensors) != self._names:
            return False
        now, large = tensors.values(), [tensors[name] for name in self.large]
        small = now if not large else [tensor for name, tensor in tensors.items() if name not in self.large]
        if not all(map(is_, small, self._small)):
            return False
        if any(one.tensor() is not tensor for one, tensor in zip(self.large.values(), large, strict=True)):
            return False
        return self._spots.still() and places(large) == self._places

    def copy(self) -> None:
        """All small ones."""
        with torch.no_grad():
            for flat, target in self._rows:
                torch.cat(flat, out=target)


def _row(tensors: Mapping[str, torch.Tensor], arena: Arena, entries: dict[str, Tensor]) -> list[Row]:
    flat = [tensor if tensor.dim() == 1 else tensor.detach().reshape(-1) for tensor in tensors.values()]
    dtype, width = flat[0].dtype, flat[0].element_size()
    memory = arena.take(sum(map(len, flat)) * width)
    code, at = CODE_OF[dtype], 0
    for (name, tensor), one in zip(tensors.items(), flat, strict=True):
        end = at + len(one) * width
        entries[name] = Tensor(name, code, tuple(tensor.shape), memory[at:end])
        at = end
    return [Row(flat, torch.frombuffer(memory, dtype=dtype))] if at else []  # of empty tensors, no row
