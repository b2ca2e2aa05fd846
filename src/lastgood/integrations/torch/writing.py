"""A loop's parts -> a checkpoint: weights as other tools read them, the rest in resume.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lastgood.format.digests import FORMAT
from lastgood.integrations.torch.boundary import Boundary
from lastgood.integrations.torch.exchange import Part, Writing
from lastgood.integrations.torch.loader import Data
from lastgood.integrations.torch.module import Model
from lastgood.integrations.torch.parts import Value
from lastgood.repo.staging import Staging
from lastgood.state import facts as about
from lastgood.state import rng
from lastgood.state.digests import Digests
from lastgood.state.saved import DIGESTS, RESUME, STATE
from lastgood.state.tensors import named


def write(staging: Staging, parts: Sequence[Part], boundary: Boundary, epoch: float) -> None:
    """Stage everything. Raises NotSupported, with the place, for what can't be stored bit for bit."""
    out = Writing(staging, live=live(parts))
    for part in parts:
        part.write(out)
    about = {"format": FORMAT, "tensors": {}, **out.digests}
    staging.data(DIGESTS, "model", lambda: _json(about))
    if out.tensors:
        staging.tensors(STATE, "optimizer", named(out.tensors), {"format": "pt"})
    resume = {
        "format": 1,
        **out.values,
        "rng": rng.encode(boundary.rng),
        "progress": {"global_step": boundary.step, "epoch": epoch, "front": "loop"},
    }
    staging.data(RESUME, "progress", _json(resume))


def live(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    """Every tensor that may be trained, under the name that the optimizers' states use."""
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        if isinstance(part, Model):
            found |= part.live
        elif isinstance(part, Value) and isinstance(part.value, torch.Tensor):
            found[part.name] = part.value
    return found


def facts(parts: Sequence[Part]) -> dict[str, Any]:
    """What a later restore compares itself with."""
    found: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, Model) and (part.name == "model" or "model" not in found):
            found |= about.model_facts(part.module)
        elif isinstance(part, Data) and "data" not in found:
            dataset = getattr(part.stream.loader, "dataset", None)
            if dataset is not None:
                found["data"] = about.data_facts(dataset)
    return found


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, allow_nan=False, default=Digests.all) + "\n").encode()
