"""What a model holds right now: one digest per parameter and buffer.

The digests saved with a checkpoint are what makes a restore provable: whatever names and
shapes `save_pretrained` gave the tensors on disk, a restore is complete when every live
tensor has the digest it had at the save.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lastgood.state.optimizer import clean
from lastgood.state.tensors import digest


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer once, persistent or not; a tied tensor goes under its first name."""
    tensors: dict[str, torch.Tensor] = {clean(name): parameter for name, parameter in model.named_parameters()}
    for name, buffer in model.named_buffers():
        tensors.setdefault(clean(name), buffer)
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}


class Fingerprints:
    """Digests of a model's tensors; a frozen parameter is hashed again only after something wrote to it.

    Whether something wrote is read from the version counter that autograd keeps, so a frozen
    base of many gigabytes costs its hash once per run and not once per save.
    """

    def __init__(self) -> None:
        self._frozen: dict[str, tuple[tuple[Any, ...], str]] = {}

    def of(self, live: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """name -> digest for all of `live`, as `live_tensors` gives them."""
        digests = {}
        for name, tensor in live.items():
            if not isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad or tensor.is_inference():
                digests[name] = digest(tensor, name)
                continue
            key = (tensor.data_ptr(), tensor._version, tensor.dtype, tuple(tensor.shape))
            known = self._frozen.get(name)
            if known is None or known[0] != key:
                known = self._frozen[name] = (key, digest(tensor, name))
            digests[name] = known[1]
        return digests


class Digests:
    """Those of one moment of a model, each hashed when it is first asked for: nothing may change until all are."""

    def __init__(self, prints: Fingerprints, live: Mapping[str, torch.Tensor]) -> None:
        self._prints = prints
        self._live = live
        self._known: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._known:
            self._known |= self._prints.of({name: self._live[name]})
        return self._known[name]

    def all(self) -> dict[str, str]:
        """name -> digest, in the order of the model."""
        return {name: self[name] for name in self._live}
