"""Where the copies of a file's tensors lie in memory: found once for all saves that have the same tensors.

To ask torch for the place, shape and memory of each of thousands of tensors takes longer than to copy them. What has
the same tensors at the same places as the save before is copied by what was found out then: small ones in blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

import torch

from lastgood.format.tensors import Tensor, check
from lastgood.state.proof import Bytes, raw
from lastgood.state.stored import open_to
from lastgood.state.tensors import CODE_OF, PLAIN, code_of, places
from lastgood.store.memory import Arena

_KINDS = (torch.Tensor, torch.nn.Parameter)

BLOCK = 4 << 20
"""Bytes (4 MiB) of small tensors that are copied by one call, and lie side by side."""


class Block(NamedTuple):
    """Small tensors of one dtype. flat: each again, in one dimension; target: all of them in a row."""

    flat: list[torch.Tensor]
    target: torch.Tensor


class Large(NamedTuple):
    """tensor: gone when nobody else has it. entry: with its buffer, which is `target`, too; plain: whether its memory,
    in a row, is what is written."""

    tensor: weakref.ref[torch.Tensor]
    entry: Tensor
    target: Bytes
    plain: bool


@dataclass(slots=True)
class Layout:
    """entries: of the file, with their buffers. Small tensors are kept, and `copy` takes care of them; large: all
    others, which aren't: a model that has got other tensors doesn't keep its old ones for this.
    """

    entries: tuple[Tensor, ...]
    large: dict[str, Large]
    _names: list[str]
    _small: list[torch.Tensor]
    _places: list[Any]
    _blocks: list[Block] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], arena: Arena, limit: int) -> Layout:
        """In memory that is taken for it. limit: bytes of a small one. Raises Short, NotSupported, UsageError."""
        small = {name: tensor for name, tensor in tensors.items() if _plain(tensor) and tensor.nbytes <= limit}
        large = {name: tensor for name, tensor in tensors.items() if name not in small}
        entries, blocks = dict[str, Tensor](), list[Block]()
        for some in _gathered(small):
            blocks += _block(some, arena, entries)
        for name, tensor in large.items():
            entries[name] = Tensor(name, code_of(name, tensor), tuple(tensor.shape), arena.take(tensor.nbytes))
        ordered = tuple(entries[name] for name in tensors)
        check(ordered)
        loose = {
            name: Large(weakref.ref(tensor), entries[name], raw(entries[name]), open_to(tensor))
            for name, tensor in large.items()
        }
        return cls(ordered, loose, list(tensors), list(small.values()), places(tensors.values()), blocks)

    def still(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are the very same objects, and lie where they did, in the same form."""
        if list(tensors) != self._names:
            return False
        now = list(tensors.values())
        small = now if not self.large else [t for name, t in tensors.items() if name not in self.large]
        if not all(map(is_, small, self._small)):
            return False
        if any(one.tensor() is not tensors[name] for name, one in self.large.items()):
            return False
        return places(tensors.values()) == self._places

    def copy(self) -> None:
        """All small ones."""
        with torch.no_grad():
            for flat, target in self._blocks:
                torch.cat(flat, out=target)


def _plain(tensor: torch.Tensor) -> bool:
    """Whether torch.cat copies it as it is: `open_to`, without what its dtype rules out. Thousands are asked."""
    return (
        type(tensor) in _KINDS
        and tensor.dtype in PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_neg() or tensor.is_inference())
    )


def _gathered(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Of one dtype, up to a block of them."""
    waiting: dict[torch.dtype, tuple[dict[str, torch.Tensor], list[int]]] = {}
    for name, tensor in tensors.items():
        some, sizes = waiting.setdefault(tensor.dtype, ({}, [0]))
        some[name] = tensor
        sizes[0] += tensor.nbytes
        if sizes[0] >= BLOCK:
            yield waiting.pop(tensor.dtype)[0]
    yield from (some for some, _ in waiting.values())


def _block(tensors: Mapping[str, torch.Tensor], arena: Arena, entries: dict[str, Tensor]) -> list[Block]:
    flat = [tensor if tensor.dim() == 1 else tensor.detach().reshape(-1) for tensor in tensors.values()]
    dtype, width = flat[0].dtype, flat[0].element_size()
    memory = arena.take(sum(map(len, flat)) * width)
    code, at = CODE_OF[dtype], 0
    for (name, tensor), one in zip(tensors.items(), flat, strict=True):
        end = at + len(one) * width
        entries[name] = Tensor(name, code, tuple(tensor.shape), memory[at:end])
        at = end
    return [Block(flat, torch.frombuffer(memory, dtype=dtype))] if at else []  # of empty tensors, no block
