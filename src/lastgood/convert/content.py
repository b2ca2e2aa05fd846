"""What a checkpoint holds, in words that belong to no tool, and the small changes of shape between tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lastgood.errors import CorruptCheckpoint, NotSupported

PENDING = "pending_evaluation"
"""Key in `Content.rest`: the run was saved before the evaluation of the same step."""


@dataclass(slots=True, kw_only=True)
class Content:
    """One checkpoint.

    model: names as the tool has them; those of a second adapter begin with its folder, `name/`.
    optimizers: as torch's state_dict gives them, parameters numbered from 0 in the order of the groups.
    parameter_names: number -> name, where there is one optimizer and its names are known.
    rng: `python` and `numpy` as random.getstate() and numpy.random.get_state() give them, `cpu` a ByteTensor, and
    per kind of device a list of ByteTensors.
    rest: everything else the source had. files: relative name -> a file to copy along as it is.
    texts: relative name -> content, in the place of such a file.
    """

    layout: str = ""
    name: str = ""
    model: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    parameter_names: list[str] | None = None
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    rng: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    custom: list[Any] = field(default_factory=list)
    step: int = -1
    epoch: float | None = None
    rest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)

    @property
    def resumable(self) -> bool:
        """Whether it holds more than weights."""
        return bool(self.optimizers or self.schedulers or self.rng or self.scaler or self.custom)


def numbered(state: Any, where: str) -> tuple[dict[str, Any], list[str] | None]:
    """(an optimizer's state by number, names by number) from a state by number or, as FSDP has it, by name.

    Raises NotSupported where it isn't a state of torch's form, CorruptCheckpoint where a parameter is in no group.
    """
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, (list, tuple)) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        raise NotSupported(
            f"{where} isn't a state of torch's form (state, param_groups)",
            hint="convert it with the tool that wrote it",
        )
    keys = [key for group in groups for key in group["params"]]
    position = {key: index for index, key in enumerate(keys)}
    entries = {_key(key, position): value for key, value in state.get("state", {}).items()}
    unknown = [key for key in entries if key not in position]
    if unknown or len(position) != len(keys):
        raise CorruptCheckpoint(f"{where}: parameter {unknown[0] if unknown else keys!r} isn't in exactly one group")
    plain = {
        **state,
        "state": {position[key]: value for key, value in entries.items()},
        "param_groups": [{**group, "params": [position[key] for key in group["params"]]} for group in groups],
    }
    return plain, [str(key) for key in keys] if keys and all(isinstance(key, str) for key in keys) else None


def by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The inverse of `numbered` for a state with names."""
    return {
        **state,
        "state": {names[index]: value for index, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]
        ],
    }


def _key(key: Any, position: Mapping[Any, int]) -> Any:
    # torch.distributed.checkpoint makes every key a text.
    return int(key) if key not in position and isinstance(key, str) and key.isdecimal() else key


def check(content: Content, path: Path) -> None:
    """Every field has its type, whatever stood in the files. Raises CorruptCheckpoint."""
    lists: tuple[tuple[str, object], ...] = (("optimizers", content.optimizers), ("schedulers", content.schedulers))
    wrong = [
        word for word, value in lists if not isinstance(value, list) or not all(isinstance(v, dict) for v in value)
    ]
    wrong += ["step"] if type(content.step) is not int else []
    wrong += ["epoch"] if not isinstance(content.epoch, (int, float, type(None))) else []
    wrong += ["scaler"] if not isinstance(content.scaler, (dict, type(None))) else []
    if wrong:
        raise CorruptCheckpoint(f"{path} holds something else than {', '.join(wrong)} in the place of these")


# ---- random states -----------------------------------------------------------------------


def legacy_numpy(state: Any) -> Any:
    """NumPy's state as the tuple of numpy.random.get_state(); what isn't a Mersenne Twister stays as it is."""
    if isinstance(state, dict) and state.get("bit_generator") == "MT19937":
        inner = state["state"]
        return ("MT19937", inner["key"], int(inner["pos"]), int(state["has_gauss"]), float(state["gauss"]))
    return state


def modern_numpy(state: Any) -> dict[str, Any]:
    """The inverse of `legacy_numpy`, with the types that NumPy has there."""
    if isinstance(state, dict):
        return state
    kind, key, position, has_gauss, gauss = state
    inner = {"key": np.asarray(key, dtype=np.uint32), "pos": int(position)}
    return {"bit_generator": str(kind), "state": inner, "has_gauss": int(has_gauss), "gauss": float(gauss)}


def listed(state: Any) -> Any:
    """A device's random state as a list with one per device."""
    return [state] if isinstance(state, torch.Tensor) else state


def is_rng(state: Any) -> bool:
    """Whether a decoded random state has everything that `Content.rng` promises."""
    return (
        isinstance(state, dict)
        and {"python", "numpy", "cpu"} <= state.keys()
        and isinstance(state["cpu"], torch.Tensor)
        and all(
            isinstance(value, list) and all(isinstance(item, torch.Tensor) for item in value)
            for kind, value in state.items()
            if kind not in ("python", "numpy", "cpu")
        )
    )
