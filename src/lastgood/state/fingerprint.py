"""What a model holds right now: one digest per parameter and buffer.

The digests saved with a checkpoint are what makes a restore provable: whatever names and
shapes `save_pretrained` gave the tensors on disk, a restore is complete when every live
tensor has the digest it had at the save.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lastgood.state.members import Members, members
from lastgood.state.optimizer import clean
from lastgood.state.tensors import digest


def live_tensors(model: torch.nn.Module, every: Members | None = None) -> dict[str, torch.Tensor]:
    """Every parameter and buffer once, persistent or not; a tied tensor goes under its first name.

    every: `members(model)`, if that is known.
    """
    parameters, buffers, _ = every or members(model)
    tensors = {clean(name): parameter for name, parameter in parameters.items() if not parameter.is_meta}
    for name, buffer in buffers.items():
        if not buffer.is_meta:
            tensors.setdefault(clean(name), buffer)
    return tensors


class Fingerprints:
    """Digests of a model's tensors; a frozen parameter is hashed again only after something wrote to it.

    Whether something wrote is read from the version counter that autograd keeps, so a frozen
    base of many gigabytes costs its hash once per run and not once per save.
    """

    def __init__(self) -> None:
        self._frozen: dict[str, tuple[tuple[Any, ...], str]] = {}

    def remembers(self, tensor: torch.Tensor) -> bool:
        """Whether the digest of this one is hashed once, and again only after it was written to."""
        return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad and not tensor.is_inference()

    def of(self, live: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """name -> digest for all of `live`, as `live_tensors` gives them."""
        digests = {}
        for name, tensor in live.items():
            if not self.remembers(tensor):
                digests[name] = digest(tensor, name)
                continue
            key = (tensor.data_ptr(), tensor._version, tensor.dtype, tuple(tensor.shape))
            known = self._frozen.get(name)
            if known is None or known[0] != key:
                known = self._frozen[name] = (key, digest(tensor, name))
            digests[name] = known[1]
        return digests
