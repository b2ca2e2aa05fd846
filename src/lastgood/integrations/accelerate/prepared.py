"""An Accelerator's objects under the names that `save_state` counts them by: model, model_1, optimizer, ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lastgood.errors import NotSupported, UsageError, wrong_type
from lastgood.integrations.torch.module import unwrapped
from lastgood.state.optimizer import plain
from lastgood.talk import warn

SPREAD = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP", "XLA")
"""Kinds whose state is spread over processes, or held by an engine of its own, even where there is one process."""


def parts(accelerator: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> what a checkpoint holds: what is `given` first, then what else was prepared or registered.

    What is given under a name of its own may be the object that was prepared or the one that `prepare` returned.

    Raises UsageError where nothing was prepared or two things would have one name, NotSupported for several processes
    and for a state that is spread over them.
    """
    if not hasattr(accelerator, "_models") or not hasattr(accelerator, "num_processes"):
        raise wrong_type("accelerator", accelerator, "an accelerate.Accelerator")
    _one_process(accelerator)
    own = dict(listed(accelerator))
    if not own:
        raise UsageError(
            "the accelerator has prepared nothing yet", hint="make the CheckpointManager after accelerator.prepare(...)"
        )
    if accelerator._save_model_state_pre_hook:
        warn(
            "the accelerator's save_state hooks aren't called: a checkpoint holds the whole models as they are;"
            " what a hook writes for others has to be written by the script itself"
        )
    bare = {identity(thing): thing for thing in reversed(own.values())}  # of two wrappers of one thing the first
    found = {name: bare.get(identity(thing), thing) for name, thing in given.items()}
    seen = {identity(thing) for thing in found.values()}
    for name, thing in own.items():
        if identity(thing) in seen:
            continue
        if name in found:
            raise UsageError(
                f"{name!r} is the name of what the accelerator prepared, and something else was given under it",
                hint=f"give it another name, or hand over the accelerator's own as {name}=",
            )
        seen.add(identity(thing))
        found[name] = thing
    return found


def listed(accelerator: Any) -> Iterator[tuple[str, Any]]:
    """Everything that `save_state` would save, in its order."""
    for name, things in (
        ("model", accelerator._models),
        ("optimizer", accelerator._optimizers),
        ("scheduler", accelerator._schedulers),
        ("dataloader", accelerator._dataloaders),
        ("custom", accelerator._custom_objects),
    ):
        for place, thing in enumerate(things):
            yield f"{name}_{place}" if place else name, thing
    if getattr(accelerator, "scaler", None) is not None:
        yield "scaler", accelerator.scaler


def identity(thing: Any) -> int:
    """The same for an object and for what Accelerate and torch.compile wrap around it."""
    if isinstance(thing, torch.nn.Module):
        return id(unwrapped(thing))
    if isinstance(thing, torch.optim.Optimizer):
        return id(plain(thing))
    if isinstance(thing, torch.utils.data.DataLoader):  # `prepare` makes another one of the same data
        sampler, data = getattr(thing, "batch_sampler", None), thing.dataset
        return id(data if sampler is None or isinstance(data, torch.utils.data.IterableDataset) else sampler)
    if type(thing).__module__.startswith("accelerate.") and hasattr(thing, "scheduler"):
        return id(thing.scheduler)
    return id(thing)


def _one_process(accelerator: Any) -> None:
    kind = str(getattr(accelerator, "distributed_type", "")).rpartition(".")[2]
    if accelerator.num_processes > 1 or kind in SPREAD:
        count = accelerator.num_processes
        raise NotSupported(
            f"CheckpointManager can't save an Accelerator of {count} process{'es' * (count > 1)} ({kind}) yet",
            hint="run it in one process, or keep accelerator.save_state; `lastgood import` reads what that writes",
        )
