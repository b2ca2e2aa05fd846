"""Our own checkpoints: weights, optimizer.safetensors and resume.json, as a run or an import wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lastgood.convert import weights
from lastgood.convert.content import PENDING, Content, legacy_numpy, numbered
from lastgood.errors import CorruptCheckpoint, NotSupported
from lastgood.format import tensors as safetensors
from lastgood.format.digests import FORMATS
from lastgood.layouts.found import files_of
from lastgood.model import Manifest
from lastgood.state import lightning, rng, tree
from lastgood.state.tensors import from_bytes
from lastgood.store import local

RESUME, STATE, DIGESTS, EXTRA = "resume.json", "optimizer.safetensors", "tensors.json", "extra.safetensors"
OWN = frozenset(
    {RESUME, STATE, DIGESTS, EXTRA, "lastgood.json", "optimizer.pt", "scheduler.pt", lightning.ABOUT,
     lightning.ABOUT_TENSORS}
)  # fmt: skip
"""Files of ours, with the guards: none of them goes along to another tool."""

UNNAMED = "unnamed."
"""What names of optimizer parameters begin with that the live model had no name for."""


def read(path: Path, manifest: Manifest | None) -> Content:
    """A managed or imported checkpoint. Raises CorruptCheckpoint."""
    # What the manifest doesn't list was stripped and may still lie there.
    names = list(files_of(path) if manifest is None else manifest.files)
    models = weights.read(path, names)
    several = list(_json(path / DIGESTS).get("modules", {})) if not models and DIGESTS in names else []
    if several:
        raise NotSupported(
            f"{path.name} holds the models {', '.join(several)} of a loop, none of which is called model",
            hint="`lastgood checkout` copies their files, which any safetensors reader opens",
        )
    if not models:
        raise CorruptCheckpoint(f"{path}: no file with weights in it")
    content = Content(name=path.name, model=models[0], step=-1 if manifest is None else manifest.step)
    content.files = {name: path / name for name in names if name not in OWN and not weights.is_weights(name)}
    if EXTRA in names:
        extra = weights.load(path / EXTRA)
        if weights.ADAPTER in content.files:
            content.rest["extra"] = extra  # live names, which an adapter's file knows nothing of
        else:
            content.model |= {name: tensor for name, tensor in extra.items() if name not in content.model}
    if lightning.ABOUT in names:
        whole = lightning.read_whole(path, names)
        saved = _json(path / RESUME) if RESUME in names else {}
        fill(content, whole, str(path), None if not saved else str(saved["lightning"]["precision"]))
        if saved.get("optimizer") is not None:
            content.parameter_names = [name for group in saved["optimizer"]["groups"] for name in group["names"]]
        content.rng = _rng(saved["rng"]) if saved else None
        content.layout = "lightning"
        return content
    if RESUME in names:
        loaded = safetensors.load(path / STATE) if STATE in names else {}
        _resume(content, _json(path / RESUME), {name: from_bytes(entry) for name, entry in loaded.items()})
    return content


def fill(content: Content, loaded: dict[str, Any], where: str, precision: str | None = "MixedPrecision") -> None:
    """A dictionary of Lightning's as content. precision: the key of the precision plugin's state."""
    state, rest = loaded.pop("state_dict"), loaded
    content.model = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    pairs = [numbered(found, where) for found in rest.pop("optimizer_states", None) or []]
    content.optimizers = [found for found, _ in pairs]
    content.parameter_names = pairs[0][1] if len(pairs) == 1 else None
    content.schedulers = rest.pop("lr_schedulers", None) or []
    content.scaler = rest.pop(precision, None) if precision else None
    content.step, content.epoch = rest.pop("global_step", -1), rest.pop("epoch", None)
    if other := {name: value for name, value in state.items() if name not in content.model}:
        rest["state_dict_other"] = other
    if metadata := getattr(state, "_metadata", None):
        rest["state_dict_metadata"] = dict(metadata)
    content.rest = rest


def _resume(content: Content, saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    def decoded(key: str, default: Any = None) -> Any:
        return tree.decode(saved.get(key, default), tensors)

    try:
        one, many = saved.get("optimizer"), saved.get("optimizers") or []
        for entry in many if one is None else [one]:
            state, names = _optimizer(entry, tensors)
            content.optimizers.append(state)
            content.parameter_names = names if one is not None else None
        scheduler = decoded("scheduler")
        content.schedulers = decoded("schedulers") or ([] if scheduler is None else [scheduler])
        content.scaler, content.custom = decoded("scaler"), decoded("custom", [])
        content.rng = None if saved.get("rng") is None else _rng(saved["rng"])
        progress = saved["progress"]
        content.step, content.epoch = progress["global_step"], progress["epoch"]
        if "source" in saved:
            content.layout, content.name = saved["source"]["layout"], saved["source"]["name"]
            content.rest |= decoded("rest", {})
            return
        content.rest |= {"progress": progress, "data": saved.get("data"), "callbacks": decoded("callbacks", [])}
        content.rest |= dict.fromkeys(saved.get("parts", {}), True)  # of a loop, by its user's names
        if progress.get("evaluate"):
            content.rest[PENDING] = True
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptCheckpoint(f"{RESUME} of {content.name} isn't complete: {error!r}") from error


def _optimizer(
    saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], list[str] | None]:
    names = [name for group in saved["groups"] for name in group["names"]]
    position = {name: index for index, name in enumerate(names)}
    groups, at = [], 0
    for group in saved["groups"]:
        count = len(group["names"])
        groups.append({**tree.decode(group["values"], tensors), "params": list(range(at, at + count))})
        at += count
    state = {
        **tree.decode(saved["rest"], tensors),
        "state": {position[name]: tree.decode(entry, tensors) for name, entry in saved["state"].items()},
        "param_groups": groups,
    }
    return state, None if any(name.startswith(UNNAMED) for name in names) else names


def _rng(saved: dict[str, Any]) -> dict[str, Any]:
    states = rng.decode(saved)
    return {
        "python": states.python,
        "numpy": legacy_numpy(states.numpy),
        "cpu": states.cpu,
        **states.devices,
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(local.read(path, 1 << 32))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict) or value.get("format") not in FORMATS:
        raise CorruptCheckpoint(f"{path} is not in a format that this version of lastgood reads")
    return value
