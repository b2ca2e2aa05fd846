"""Whether tensors still lie where they did, in the same form: `tensor.data = other` changes that and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from lastgood.state.tensors import PLAIN

SMALL = 1 << 15
"""Bytes (32 KiB) up to which the memory of a tensor may be kept, to compare it by."""
KEPT = 64 << 20
"""Bytes (64 MiB) of a file's tensors up to which they may be kept from one save to the next, to be known again sooner.
Of more only what others keep is: a program that makes new ones would need room for the old ones as well."""

_KINDS = (torch.Tensor, torch.nn.Parameter)
_DTYPE = attrgetter("dtype")


def places(tensors: Iterable[torch.Tensor]) -> list[Any]:
    """Where the memory of each is, and how it is read."""
    return [
        (one.data_ptr(), one.dtype, one.shape, one.stride()) if one.layout is torch.strided else id(one)
        for one in tensors
    ]


def simple(tensor: torch.Tensor) -> bool:
    """Whether torch.cat copies it as it is: as `stored.open_to`, of a dtype that rules out the rest. Thousands are
    asked."""
    return (
        type(tensor) in _KINDS
        and tensor.dtype in PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_neg() or tensor.is_inference())
    )


@dataclass(frozen=True, slots=True)
class Spots:
    """Of some tensors, which are kept. small: simple ones, and `like` them others of the same memory: torch compares
    such a pair by one call, in half the time that the four numbers of a place take. The memory of a large one isn't
    kept for that: it may be replaced, and there may be no room for both.
    """

    small: list[torch.Tensor]
    like: list[torch.Tensor]
    dtypes: list[torch.dtype]
    large: list[torch.Tensor]
    places: list[Any]

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> Spots:
        small, large = list[torch.Tensor](), list[torch.Tensor]()
        for tensor in tensors:
            (small if simple(tensor) and tensor.nbytes <= SMALL else large).append(tensor)
        return cls(small, [one.detach() for one in small], list(map(_DTYPE, small)), large, places(large))

    def still(self) -> bool:
        """Whether all of them lie where they did."""
        return (
            all(map(torch.Tensor.is_set_to, self.small, self.like))
            and list(map(_DTYPE, self.small)) == self.dtypes
            and places(self.large) == self.places
        )
