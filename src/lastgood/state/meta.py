"""Models that were built on torch's meta device: they have names and shapes, and no memory before a restore."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lastgood.errors import IncompleteRestore
from lastgood.state.match import some
from lastgood.state.members import Members, members
from lastgood.state.optimizer import clean


def unfilled(model: torch.nn.Module, every: Members | None = None) -> dict[str, torch.Tensor]:
    """The parameters and buffers on the meta device, by name; {} for a model whose hooks keep the values elsewhere.

    every: `members(model)`, if that is known.
    """
    parameters, buffers, _ = every or members(model)
    found = {clean(name): tensor for name, tensor in {**parameters, **buffers}.items() if tensor.is_meta}
    if found and any(hasattr(module, "_hf_hook") for module in model.modules()):
        return {}
    return found


def give_memory(tensor: torch.Tensor) -> None:
    """Uninitialised memory on the CPU, for the same object: an optimizer that holds the parameter goes on with it."""
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, torch.nn.Parameter):
        fresh = torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, fresh)  # type: ignore[no-untyped-call]


def all_filled(missing: list[str], live: Mapping[str, torch.Tensor]) -> None:
    """Raise IncompleteRestore for tensors without memory that no saved tensor is for."""
    empty = [name for name in missing if live[name].is_meta]
    if empty:
        raise IncompleteRestore(
            f"{len(empty)} tensors on the meta device aren't stored in the checkpoint: {some(empty)}; a model computes"
            " such buffers when it is built",
            hint="build the model so that its buffers get values (accelerate.init_empty_weights() puts only parameters"
            " on the meta device), or build it on the CPU; nothing was changed",
        )
