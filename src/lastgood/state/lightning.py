"""Lightning's checkpoint dictionary <-> the files of a checkpoint; no pickle anywhere.

model.safetensors holds `state_dict` under its own names; lightning.json what else belongs to the model
(hyper-parameters, what on_save_checkpoint added); optimizer.safetensors and resume.json the rest.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lastgood.errors import CorruptCheckpoint
from lastgood.format import tensors as safetensors
from lastgood.format.digests import FORMATS
from lastgood.repo.staging import Staging
from lastgood.state import plain, tree
from lastgood.state.tensors import from_bytes, named

MODEL, EXTRA, ABOUT, ABOUT_TENSORS = "model.safetensors", "extra.safetensors", "lightning.json", "lightning.safetensors"
STATE, RESUME, DIGESTS = "optimizer.safetensors", "resume.json", "tensors.json"
METADATA = {"format": "pt"}

HYPER = ("hyper_parameters", "datamodule_hyper_parameters")
TYPES = ("hparams_type", "datamodule_hparams_type")
"""Classes of config objects: the values come back as plain dictionaries."""
RUN = frozenset({"loops", "callbacks", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state"})
"""Keys that a resume needs and the model alone doesn't; the last two are the weights under an average."""


class Model(NamedTuple):
    """The file of the state dict: what went into it, and the digests of that, once it has been written."""

    name: str
    tensors: dict[str, torch.Tensor]
    digests: dict[str, str]


def write_model(staging: Staging, checkpoint: Mapping[str, Any], precision: str) -> tuple[Model, dict[str, str]]:
    """Stage the part `model`; name -> why of the hyper-parameters that were left out."""
    state = checkpoint["state_dict"]
    weights = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    model = Model(MODEL, weights, {})
    staging.tensors(MODEL, "model", named(weights), METADATA, told=model.digests)
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, Any] = {"format": 1, "hyper": {}, "left_out": {}}
    for key in HYPER:
        if key in checkpoint:
            about["hyper"][key], left = plain.hyperparameters(checkpoint[key], tensors, key)
            about["left_out"] |= left
    about["other_state"] = plain.state({k: v for k, v in state.items() if k not in weights}, tensors, "state_dict")
    about["metadata"] = plain.state(dict(getattr(state, "_metadata", {})), tensors, "metadata")
    known = {*RUN, *HYPER, *TYPES, "state_dict", precision}
    rest = {key: value for key, value in checkpoint.items() if key not in known}
    about["rest"] = plain.state(rest, tensors, "checkpoint")
    if tensors:
        staging.tensors(ABOUT_TENSORS, "model", named(tensors), METADATA)
    staging.data(ABOUT, "model", dump(about))
    return model, dict(about["left_out"])


def read_model(path: Path) -> dict[str, Any]:
    """The part `model` as Lightning's dictionary. Raises CorruptCheckpoint."""
    about, tensors = read_json(path / ABOUT), load(path / ABOUT_TENSORS, missing=True)
    state: OrderedDict[str, Any] = OrderedDict(load(path / MODEL))
    state.update(tree.decode(about["other_state"], tensors))
    if metadata := tree.decode(about["metadata"], tensors):
        state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    hyper = {key: tree.decode(value, tensors) for key, value in about["hyper"].items()}
    return {**tree.decode(about["rest"], tensors), **hyper, "state_dict": state}


def read_whole(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Lightning's dictionary, with optimizers and loops where the checkpoint is full. Raises CorruptCheckpoint.

    names: the files that the manifest lists; a stripped checkpoint may still have others.
    """
    checkpoint = read_model(path)
    if RESUME not in names:
        return checkpoint
    saved, tensors = read_json(path / RESUME), load(path / STATE, missing=True)
    try:
        mine = saved["lightning"]
        checkpoint |= tree.decode(mine["run"], tensors)
        checkpoint["callbacks"] = tree.decode(saved["callbacks"], tensors)
        checkpoint["lr_schedulers"] = tree.decode(saved["schedulers"], tensors)
        checkpoint["loops"] = tree.decode(mine["loops"], tensors)
        if saved["scaler"] is not None:
            checkpoint[mine["precision"]] = tree.decode(saved["scaler"], tensors)
        checkpoint["optimizer_states"] = [by_number(entry, tensors) for entry in optimizers(saved)]
    except (KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{path / RESUME} isn't one of a Lightning run: {error!r} is missing") from error
    return checkpoint


def optimizers(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The optimizers' states in resume.json, in order."""
    return list(saved["optimizers"]) if saved.get("optimizer") is None else [saved["optimizer"]]


def by_number(saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A state by parameter name as torch's state_dict has it, parameters numbered in the order of the groups."""
    position: dict[str, int] = {}
    groups = []
    for group in saved["groups"]:
        for name in group["names"]:
            position[name] = len(position)
        groups.append({**tree.decode(group["values"], tensors), "params": [position[name] for name in group["names"]]})
    state = {position[name]: tree.decode(entry, tensors) for name, entry in saved["state"].items()}
    return {**tree.decode(saved["rest"], tensors), "state": state, "param_groups": groups}


def load(path: Path, *, missing: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file; {} where it may be missing and is."""
    if missing and not path.exists():
        return {}
    return {name: from_bytes(entry) for name, entry in safetensors.load(path).items()}


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict) or value.get("format") not in FORMATS:
        raise CorruptCheckpoint(f"{path} is not in a format that this version of lastgood reads")
    return value


def dump(value: Any) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()
