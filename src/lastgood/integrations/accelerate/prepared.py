"""An Accelerator's objects under the names that `save_state` counts them by: model, model_1, optimizer, ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lastgood.errors import NotSupported, wrong_type


def parts(accelerator: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> what was prepared or registered for checkpointing, without what is `given` under a name of its own.

    Raises NotSupported for several processes, and for a state that is spread over them.
    """
    if not hasattr(accelerator, "_models") or not hasattr(accelerator, "num_processes"):
        raise wrong_type("accelerator", accelerator, "an accelerate.Accelerator")
    _one_process(accelerator)
    named = {id(_bare(thing)) for thing in given.values()}
    found: dict[str, Any] = {}
    for name, things in (
        ("model", accelerator._models),
        ("optimizer", accelerator._optimizers),
        ("scheduler", accelerator._schedulers),
        ("dataloader", accelerator._dataloaders),
        ("custom", accelerator._custom_objects),
    ):
        for place, thing in enumerate(thing for thing in things if id(_bare(thing)) not in named):
            key = f"{name}_{place}" if place else name
            if key in given:
                raise wrong_type(key, given[key], f"named otherwise: the accelerator has a {key} of its own")
            found[key] = thing
    if getattr(accelerator, "scaler", None) is not None and "scaler" not in given:
        found["scaler"] = accelerator.scaler
    return found


def _bare(thing: Any) -> Any:
    """The object inside Accelerate's wrappers."""
    for name in ("optimizer", "scheduler", "base_dataloader", "module", "_orig_mod"):
        inner = thing.__dict__.get(name) if hasattr(thing, "__dict__") else None
        if inner is not None and type(thing).__module__.startswith(("accelerate.", "torch._dynamo")):
            return _bare(inner)
    return thing


def _one_process(accelerator: Any) -> None:
    kind = str(getattr(accelerator, "distributed_type", "")).rpartition(".")[2]
    if accelerator.num_processes > 1 or kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP", "XLA"):
        raise NotSupported(
            f"CheckpointManager can't save an Accelerator of {accelerator.num_processes} process(es), {kind}, yet",
            hint="run it in one process, or keep accelerator.save_state; `lastgood import` reads what that writes",
        )
