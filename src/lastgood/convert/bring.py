"""Content -> the files of a managed checkpoint, for an import; no pickle among them."""

from __future__ import annotations

import json
from typing import Any

import torch

from lastgood.convert import weights
from lastgood.convert.content import Content, modern_numpy
from lastgood.convert.managed import DIGESTS, OWN, RESUME, STATE, UNNAMED
from lastgood.errors import CorruptCheckpoint, NotSupported
from lastgood.format.digests import FORMAT
from lastgood.repo.staging import Staging
from lastgood.state import rng, tree
from lastgood.state.rng import Rng
from lastgood.state.tensors import digest, named
from lastgood.store import local

METADATA = {"format": "pt"}


class Tensors(dict[str, torch.Tensor]):
    """Tensors by the place they were found at; two places of the same name are refused instead of mixed up."""

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if name in self:
            raise NotSupported(
                f"two tensors would both be called {name!r}", hint="rename one of the keys that lead to them"
            )
        super().__setitem__(name, tensor)


def stage(content: Content, staging: Staging) -> None:
    """Write everything into `staging`; `read(path, "imported")` gives it back.

    Raises NotSupported, with the place, for what can't be stored without pickle, and CorruptCheckpoint where a file
    that is to go along is not there any more.
    """
    resume, tensors = _resume(content)  # first: what is refused is refused before anything is written
    for name, found in weights.files(content).items():
        staging.tensors(name, "model", named(found), METADATA)
    digests = {name: digest(tensor, name) for name, tensor in content.model.items()}
    staging.data(DIGESTS, "model", _json({"format": FORMAT, "tensors": digests}))
    for name, path in content.files.items():
        if name not in OWN:
            try:
                data = local.read(path, 1 << 40)
            except OSError as error:
                raise CorruptCheckpoint(f"{path} can't be read: {error.strerror or error}") from error
            staging.data(name, "model", data)
    # Weights alone don't make a checkpoint that a run could go on from, whatever else is known of them.
    state, progress = ("optimizer", "progress") if content.resumable else ("model", "model")
    if tensors:
        staging.tensors(STATE, state, named(tensors), METADATA)
    staging.data(RESUME, progress, _json(resume))


def _resume(content: Content) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors = Tensors()
    single = len(content.optimizers) == 1
    many = [
        _optimizer(state, None, tensors, f"optimizers.{number}.")
        for number, state in enumerate(() if single else content.optimizers)
    ]
    schedulers = content.schedulers
    resume = {
        "format": 1,
        "source": {"layout": content.layout, "name": content.name},
        "optimizer": _optimizer(content.optimizers[0], content.parameter_names, tensors, "") if single else None,
        "optimizers": many,
        "scheduler": tree.encode(schedulers[0], tensors, "scheduler") if len(schedulers) == 1 else None,
        "schedulers": tree.encode(schedulers if len(schedulers) != 1 else [], tensors, "schedulers"),
        "scaler": None if content.scaler is None else tree.encode(content.scaler, tensors, "scaler"),
        "rng": None if content.rng is None else rng.encode(_rng(content.rng)),
        "data": None,
        "callbacks": [],
        "custom": tree.encode(content.custom, tensors, "custom"),
        "progress": {"global_step": content.step, "epoch": content.epoch},
        "rest": tree.encode(content.rest, tensors, "rest"),
    }
    return resume, tensors


def _optimizer(state: dict[str, Any], names: list[str] | None, tensors: Tensors, prefix: str) -> dict[str, Any]:
    """As state.optimizer.capture lays it out; the class of a foreign optimizer isn't known."""
    groups = state["param_groups"]
    flat = names or [f"{UNNAMED}{g}.{i}" for g, group in enumerate(groups) for i in range(len(group["params"]))]
    rest = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    return {
        "class": "",
        "state": {
            flat[index]: tree.encode(entry, tensors, f"{prefix}state.{flat[index]}")
            for index, entry in state["state"].items()
        },
        "groups": [
            {
                "names": [flat[index] for index in group["params"]],
                "values": tree.encode(
                    {key: value for key, value in group.items() if key != "params"}, tensors, f"{prefix}group.{number}"
                ),
            }
            for number, group in enumerate(groups)
        ],
        "rest": tree.encode(rest, tensors, f"{prefix}rest-of-optimizer"),
    }


def _rng(states: dict[str, Any]) -> Rng:
    devices = {kind: value for kind, value in states.items() if kind not in ("python", "numpy", "cpu")}
    return Rng(states["python"], modern_numpy(states["numpy"]), states["cpu"], devices)


def _json(value: Any) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()
