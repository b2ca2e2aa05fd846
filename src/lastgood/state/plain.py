"""Hyper-parameters and states of Lightning's parts as values that need no pickle, and what has no such form."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch

from lastgood.errors import NotSupported
from lastgood.redact import holds_secret
from lastgood.state import tree

OMEGA = "omegaconf."


def plain(value: Any) -> Any:
    """The same in types that state/tree.py knows: an enum is its value, a namespace or a config a dictionary."""
    if isinstance(value, Enum) and not isinstance(value, (int, str)):
        return plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Namespace):
        return plain(vars(value))
    if type(value).__module__.startswith(OMEGA):
        from omegaconf import OmegaConf

        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return {plain(item) for item in value}
    if isinstance(value, (list, tuple)):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def hyperparameters(values: Any, tensors: dict[str, torch.Tensor], where: str) -> tuple[Any, dict[str, str]]:
    """(JSON, name -> why of those left out): objects that need pickle, and secrets.

    They are arguments of the module's class: load_from_checkpoint takes those that are missing as its own arguments.
    """
    kept: dict[str, Any] = {}
    left: dict[str, str] = {}
    for name, value in dict(plain(values)).items():
        if holds_secret(str(name), value):
            left[str(name)] = "it is, or holds, a secret"
            continue
        own: dict[str, torch.Tensor] = {}
        try:
            kept[str(name)] = tree.encode(value, own, f"{where}.{name}")
        except NotSupported:
            left[str(name)] = f"{type(value).__module__}.{type(value).__qualname__}: {value!r}"[:160]
            continue
        tensors.update(own)
    return kept, left


def state(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    """The JSON for a part's state. Raises NotSupported, with the place, for what has no form without pickle."""
    return tree.encode(plain(value), tensors, where)
