"""What trainers and callbacks of other libraries carry from step to step, beside model and optimizer.

GRPO trains several steps on completions it generated once; a synced reference model is no longer the one that was
loaded; a loss of sentence-transformers may have weights of its own. None of their checkpoints holds any of it. Which
attributes these are is in the tables below, by the package that a class comes from; a class of the user's names its
own in `lastgood_state`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from lastgood.errors import Incompatible
from lastgood.state import optimizer, tree
from lastgood.state.fingerprint import live_tensors
from lastgood.state.tensors import signature

TRAINERS: dict[str, tuple[str, ...]] = {
    # Where the generated batch stands, what the next log line is the mean of, entropy under control.
    "trl": (
        "_step", "_buffered_inputs",
        "_metrics", "_stored_metrics", "_total_train_tokens",
        "entropy_coef", "_last_world_entropy", "_entropy_window_stats",
    ),
    "trl.experimental.online_dpo": ("stats",),
    "sentence_transformers": (
        "accum_loss_components", "loss", "loss.query_regularizer_weight", "loss.document_regularizer_weight",
    ),
}  # fmt: skip
CALLBACKS: dict[str, tuple[str, ...]] = {
    "trl": ("ref_model", "theta0_params", "ema_params", "running_model", "shadow_weights"),
    "sentence_transformers": ("_current_query_regularizer_weight", "_current_document_regularizer_weight"),
}
OWN = "lastgood_state"
"""Class attribute in which a trainer or a callback of the user's lists attributes of the same kind."""


def slots(trainer: Any) -> Iterator[tuple[str, Any, str]]:
    """(name in the checkpoint, object, attribute) of all attributes of the tables that are there."""
    count: dict[str, int] = {}
    for holder, table in [(trainer, TRAINERS), *((c, CALLBACKS) for c in trainer.callback_handler.callbacks)]:
        names = _names(type(holder), table)
        if names:
            label = "trainer" if holder is trainer else type(holder).__name__
            count[label] = count.get(label, 0) + 1
            label += "" if count[label] == 1 else f".{count[label]}"
            for name in names:
                path, _, last = name.rpartition(".")
                owner = getattr(holder, path, None) if path else holder
                if hasattr(owner, last):
                    yield f"{label}.{name}", owner, last


def _names(cls: type[Any], table: Mapping[str, tuple[str, ...]]) -> list[str]:
    places = [f"{base.__module__}." for base in cls.__mro__]
    known = [n for package, names in table.items() if any(p.startswith(f"{package}.") for p in places) for n in names]
    return list(dict.fromkeys([*known, *getattr(cls, OWN, ())]))


def capture(trainer: Any, live: Mapping[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """JSON for resume.json; tensors go into `tensors`, under names that begin with `extras`. live: the model's.

    Raises NotSupported, naming the attribute, for what can't be stored without pickle.
    """
    modules, strays = _weights(trainer, live)
    found = {f"extras.{label}.{key}": tensor for label, own in modules.items() for key, tensor in own.items()}
    found.update({f"extras.{name}": parameter for name, parameter in strays.items()})
    values: dict[str, Any] = {label: {"$module": list(own)} for label, own in modules.items()}
    for label, holder, name in slots(trainer):
        value = getattr(holder, name)
        if value is not None and _module_tensors(value) is None:
            values[label] = tree.encode(value, found, f"extras.{label}")
    tensors.update(found)
    away = [name for name, tensor in found.items() if tensor.device.type != "cpu"]
    return {"values": values, "parameters": list(strays), "device": away}


def size(trainer: Any, live: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the modules and parameters that `capture` adds; generated batches are small beside them."""
    modules, strays = _weights(trainer, live)
    tensors = [*strays.values(), *(tensor for own in modules.values() for tensor in own.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _weights(
    trainer: Any, live: Mapping[str, torch.Tensor]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """(attribute -> its tensors, optimized parameters that no module here holds), each tensor once."""
    known = {id(tensor) for tensor in live.values()}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for label, holder, name in slots(trainer):
        parts = _module_tensors(getattr(holder, name)) or {}
        # A loss holds the model as well: what the checkpoint has already isn't stored twice.
        own = {
            key: tensor
            for key, tensor in parts.items()
            if id(tensor) not in known and (holder is not trainer or _trained(trainer, tensor))
        }
        known |= {id(tensor) for tensor in own.values()}
        if own:
            modules[label] = own
    return modules, {
        name: parameter
        for name, parameter in _strays(trainer, live).items()
        if id(parameter) not in known and _trained(trainer, parameter)
    }


def restore(
    trainer: Any, live: Mapping[str, torch.Tensor], saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    """Put everything back, tensors of modules in place; returns the names of what was put back.

    Raises Incompatible, before anything is changed, where this run lacks one of them or its tensors have other shapes.
    """
    away, device = set(saved["device"]), trainer.args.device
    mine = {
        name: tensor.to(device) if name in away else tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("extras.")
    }
    here = {label: (holder, name) for label, holder, name in slots(trainer)}
    strays = _strays(trainer, live)
    copies = [_pair(strays.get(name), mine, f"extras.{name}") for name in saved["parameters"]]
    for label, value in saved["values"].items():
        if label not in here:
            raise _other(label)
        if isinstance(value, dict) and "$module" in value:
            parts = _module_tensors(getattr(*here[label])) or {}
            copies += [_pair(parts.get(key), mine, f"extras.{label}.{key}") for key in value["$module"]]
    with torch.no_grad():
        for target, source in copies:
            target.copy_(source)
    for label, value in saved["values"].items():
        if not (isinstance(value, dict) and "$module" in value):
            holder, name = here[label]
            setattr(holder, name, _put(getattr(holder, name), tree.decode(value, mine)))
    return [*saved["values"], *saved["parameters"]]


def _module_tensors(value: Any) -> dict[str, torch.Tensor] | None:
    """Every parameter and buffer of a module, or of a dict of modules; None for anything else."""
    if isinstance(value, torch.nn.Module):
        return live_tensors(value)
    if isinstance(value, Mapping) and value and all(isinstance(item, torch.nn.Module) for item in value.values()):
        return {f"{key}.{name}": t for key, module in value.items() for name, t in live_tensors(module).items()}
    return None


def _trained(trainer: Any, tensor: torch.Tensor) -> bool:
    """False for what comes as it was loaded: frozen, or listed in the optimizer and never given a gradient."""
    if not isinstance(tensor, torch.nn.Parameter):
        return True
    inner = optimizer.plain(trainer.optimizer)
    return tensor.requires_grad and (not inner.state or tensor in inner.state)


def _strays(trainer: Any, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Optimized parameters that the model doesn't hold, under the names that their optimizer state has."""
    inner = optimizer.plain(trainer.optimizer)
    names = optimizer.parameter_names(inner, live)
    return {
        name: parameter
        for group, group_names in zip(inner.param_groups, names, strict=True)
        for name, parameter in zip(group_names, group["params"], strict=True)
        if name not in live
    }


def _pair(
    target: torch.Tensor | None, mine: Mapping[str, torch.Tensor], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if target is None or name not in mine or signature(target) != signature(mine[name]):
        raise _other(name.removeprefix("extras."))
    return target, mine[name]


def _other(label: str) -> Incompatible:
    return Incompatible(
        f"the checkpoint holds {label} of the trainer, and this run has none like it",
        hint="use the same trainer, callbacks, loss and reference model as when it was saved",
    )


def _put(old: Any, new: Any) -> Any:
    """`new`, inside the containers that are there: they know their defaults, and others may hold them."""
    if isinstance(old, MutableMapping) and isinstance(new, dict):
        for key in [key for key in old if key not in new]:
            del old[key]
        for key, value in new.items():
            # Asking a defaultdict makes what it wants there.
            old[key] = _put(old[key] if key in old or hasattr(old, "default_factory") else None, value)
        return old
    if isinstance(old, list) and isinstance(new, list):
        old[:] = [_put(before, value) for before, value in zip(old, new, strict=False)] + new[len(old) :]
        return old
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and signature(old) == signature(new):
        return new.to(old.device)
    return new
