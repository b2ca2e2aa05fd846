"""What is written down of a run beside its state, and how a resume compares it with what there is now."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from lastgood.redact import masked
from lastgood.report import Change

LIBRARIES = ("lastgood", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")
SAMPLES = 16
"""Rows of a dataset that its fingerprint reads."""


@functools.cache
def environment() -> dict[str, str]:
    """Versions of what a bit-exact resume depends on."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def data_facts(dataset: Any) -> dict[str, Any]:
    """Length and a fingerprint of the training data: enough to notice other data, not to prove the same."""
    facts: dict[str, Any] = {"type": type(dataset).__name__}
    try:
        facts["length"] = len(dataset)
    except TypeError:
        return facts
    rows = getattr(dataset, "with_format", None)
    if rows is not None:  # a Hugging Face dataset, read without the user's transform
        facts["fingerprint"] = _fingerprint(rows(None), facts["length"])
    elif isinstance(dataset, (list, tuple)):
        facts["fingerprint"] = _fingerprint(dataset, facts["length"])
    return facts


def _fingerprint(rows: Any, length: int) -> str:
    hasher = blake3(str(length).encode())
    for number in range(min(SAMPLES, length)):
        row = rows[number * (length - 1) // max(SAMPLES - 1, 1)] if length > SAMPLES else rows[number]
        hasher.update(repr(row).encode())
    return hasher.hexdigest(length=8)


def model_facts(model: Any) -> dict[str, Any]:
    """The base model's name and the adapters' settings."""
    facts: dict[str, Any] = {"model": type(model).__name__}
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name:
        facts["base_model"] = masked("base_model", str(name))
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, Mapping):
        facts["adapters"] = {str(key): _plain(config.to_dict()) for key, config in adapters.items()}
    return facts


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def fact_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Differences in data, model, adapter and library versions."""
    found = []
    effects = {
        "data": "other data from here on",
        "eval_data": "metrics before and after can't be compared",
        "base_model": "only the name differs: the weights were compared",
        "adapters": "this run's adapter settings apply",
        "world_size": "the data is split differently",
        "model": "",
    }
    for key, effect in effects.items():
        if key in saved and key in now:
            for what, before, after in _differences(key, saved[key], now[key]):
                found.append(Change(what=what, saved=_short(before), now=_short(after), effect=effect or "differs"))
    return found


def _differences(what: str, saved: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(dotted name, saved, now) of each leaf that differs."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        keys = sorted(set(saved) | set(now))
        return [row for key in keys for row in _differences(f"{what}.{key}", saved.get(key), now.get(key))]
    if saved == now or what.endswith(".base_model_name_or_path"):  # the base itself was compared
        return []
    return [(what, saved, now)]


def version_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    return [
        Change(what=name, saved=saved[name], now=version, effect="exactness across versions is not promised")
        for name, version in now.items()
        if name in saved and saved[name] != version
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."
