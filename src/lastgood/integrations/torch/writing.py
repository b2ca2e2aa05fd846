"""A loop's parts -> a checkpoint: weights as other tools read them, the rest in resume.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from lastgood.format.digests import FORMAT
from lastgood.integrations.torch.boundary import Boundary
from lastgood.integrations.torch.exchange import Part, Writing
from lastgood.integrations.torch.loader import Data
from lastgood.integrations.torch.module import Model
from lastgood.integrations.torch.parts import Optimizer, Value
from lastgood.repo.staging import Staging
from lastgood.state import facts as about
from lastgood.state import quick, rng
from lastgood.state.digests import Digests
from lastgood.state.saved import DIGESTS, RESUME, STATE
from lastgood.state.tensors import named


def write(
    staging: Staging, parts: Sequence[Part], boundary: Boundary, epoch: float, *, looked_at: bool = False
) -> None:
    """Stage everything. looked_at: whether each model was asked a moment ago which tensors it has.

    Raises NotSupported, with the place, for what can't be stored bit for bit.
    """
    out = Writing(staging, live=live(parts, looked_at=looked_at))
    for part in parts:
        part.write(out)
    about = {"format": FORMAT, "tensors": {}, **out.digests}
    staging.data(DIGESTS, "model", lambda: quick.dumps(_told(about)))
    if out.tensors:
        staging.tensors(STATE, "optimizer", named(out.tensors), {"format": "pt"})
    resume = {
        "format": 1,
        **out.values,
        "rng": rng.encode(boundary.rng),
        "progress": {"global_step": boundary.step, "epoch": epoch, "front": "loop"},
    }
    staging.data(RESUME, "progress", quick.dumps({key: _encoded(key, value) for key, value in resume.items()}))


def rehearsal(parts: Sequence[Part], boundary: Boundary) -> Callable[[Staging], None]:
    """Stages what takes the time of a first save: models and optimizers, and no code of the user's own beside them."""
    return lambda staging: write(staging, [p for p in parts if isinstance(p, (Model, Optimizer))], boundary, 0.0)


def size(parts: Iterable[Part]) -> int:
    """Bytes that a save will need."""
    return sum(part.estimate() for part in parts)


def live(parts: Sequence[Part], *, looked_at: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor that may be trained, under the name that the optimizers' states use."""
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        if isinstance(part, Model):
            found |= part.seen if looked_at else part.live
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


def _encoded(key: str, value: Any) -> Any:
    """The optimizer's state is nearly all there is, and went through `tree.encode`, which has a word for NaN. Of the
    rest nobody knows: there json is asked, which refuses it.
    """
    return value if key == "optimizer" else msgspec.Raw(json.dumps(value, allow_nan=False).encode())


def _told(about: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the digests that are known now that the files have been written."""
    return {
        key: value.all() if isinstance(value, Digests) else _told(value) if isinstance(value, Mapping) else value
        for key, value in about.items()
    }
