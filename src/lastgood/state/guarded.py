"""One tensor that is copied while training goes on, and the proof that nothing changed it meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lastgood.state.proof import Bytes, sampled, whole


@dataclass(slots=True)
class Guarded:
    """tensor: another name of it, which keeps its memory. stays: the next save has it again, by `again`.

    version: of torch's count of changes, where it says something: a weight is proven by all of its bytes, so what torch
    counted doesn't matter. The state of an optimizer is two thirds of a checkpoint, and nobody but the optimizer writes
    to it behind torch's back.
    """

    name: str
    tensor: torch.Tensor | None
    source: Bytes | None
    target: Bytes
    address: int
    weight: bool
    version: int | None
    stays: bool = False
    noted: bytes | None = None
    changed: bool = False

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, target: Bytes, *, weight: bool, stays: bool) -> Guarded:
        """tensor: dense and contiguous, in the host's memory."""
        alias = tensor.detach()
        source = alias.reshape(-1).view(torch.uint8).numpy()
        version = None if weight else alias._version
        return cls(name, alias, source, target, alias.data_ptr(), weight, version, stays)

    def again(self) -> None:
        """Begin once more: the tensor is the same one at the same place, and the alias has its count of changes."""
        assert self.tensor is not None, "it stays"
        self.noted, self.changed = None, False
        if not self.weight:
            self.version = self.tensor._version

    def note(self) -> None:
        """What it is now, for the proof."""
        assert self.source is not None, "before it is copied"
        self.noted = self._look(self.source)

    def copy(self, begin: int, end: int) -> None:
        """Some of its bytes. The interpreter is free meanwhile."""
        if self.tensor is None or self.source is None or self.tensor.data_ptr() != self.address:
            self.changed = True  # its memory was given away, to be shared with other processes: don't read there
        else:
            self.target[begin:end] = self.source[begin:end]

    def close(self) -> None:
        """It may change from now on."""
        if self.tensor is not None and self.version is not None:
            self.changed = self.changed or self.tensor._version != self.version
        if not self.stays:
            self.tensor = self.source = None  # a model that has got other tensors doesn't keep its old ones

    def proven(self) -> bool:
        """Whether the copy is what the tensor was when it was staged."""
        return not self.changed and self.noted == self._look(self.target)

    def _look(self, data: Bytes) -> bytes:
        return whole(data) if self.weight else sampled(data)
