"""The memory of a file's tensors, for a save that is waited for: looked up once for all saves that have the same ones.

To ask torch for the memory of a tensor takes two microseconds, and to see that it still lies there a fifth of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import is_

import torch

from lastgood.format import tensors as safetensors
from lastgood.format.tensors import Tensor
from lastgood.state.spots import KEPT, Spots
from lastgood.state.stored import open_to
from lastgood.state.tensors import Named, to_bytes


@dataclass(slots=True)
class View:
    """entries: in the order of the file, on the live memory; kept, and so not of more than KEPT bytes."""

    entries: list[Tensor]
    _names: list[str]
    _tensors: list[torch.Tensor]
    _spots: Spots
    _last: Named | None = None  # what was found to be the same, where somebody knows for how long

    @classmethod
    def of(cls, named: Named) -> View | None:
        """None where it isn't all memory that is written as it is, or too much. Raises NotSupported, UsageError."""
        tensors = list(named.tensors.values())
        spots = Spots.of(tensors)
        if not all(map(open_to, spots.large)) or sum(tensor.nbytes for tensor in tensors) > KEPT:
            return None
        aliases = dict(zip(map(id, spots.small), spots.like, strict=True))
        entries = safetensors.ordered(
            to_bytes(name, aliases.get(id(tensor), tensor)) for name, tensor in named.tensors.items()
        )
        return cls(entries, list(named.tensors), tensors, spots)

    def still(self, named: Named) -> bool:
        """Whether these are the very same objects, and lie where they did, in the same form."""
        if named.surely(self._last):
            return True
        same = list(named.tensors) == self._names and all(map(is_, named.tensors.values(), self._tensors))
        if not (same and self._spots.still()):
            return False
        self._last = named if named.since is not None else None
        return True


@dataclass(slots=True)
class Views:
    """Of a run, by the names of the files."""

    _last: dict[str, View] = field(default_factory=dict)

    def ordered(self, name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What `lastgood.format.tensors.ordered` gives; nothing may change before it is written."""
        if not isinstance(tensors, Named):
            return safetensors.ordered(tensors)
        view = self._last.pop(name, None)
        if view is None or not view.still(tensors):
            view = View.of(tensors)
        if view is None:
            return safetensors.ordered(tensors)
        self._last[name] = view
        return view.entries
