"""What is written down about a run beside its state, and how two of these are compared at a resume."""

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

OPTIMIZER_VALUES = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SCHEDULE = ("lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_steps", "num_train_epochs")
DATA_ORDER = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "dataloader_drop_last")
CADENCE = ("save_strategy", "save_steps", "eval_strategy", "eval_steps", "logging_steps", "save_total_limit")
NUMERICS = (
    "bf16",
    "fp16",
    "optim",
    "max_grad_norm",
    "neftune_noise_alpha",
    "gradient_checkpointing",
    "label_smoothing_factor",
)


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


def arguments(args: Any) -> dict[str, Any]:
    """The training arguments as JSON with every secret masked (by name, and logins inside URLs)."""
    return {key: masked(key, value) for key, value in args.to_dict().items()}


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


def changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, apply_new: bool, lr: tuple[float, float] | None = None
) -> list[Change]:
    """The differences that matter to a resume, with what takes effect. lr: before and after, if the schedule moved."""
    found: list[Change] = []

    def differ(keys: tuple[str, ...], effect: str) -> None:
        for key in keys:
            if key in saved and key in now and saved[key] != now[key]:
                found.append(Change(what=key, saved=saved[key], now=now[key], effect=effect))

    kept = "the saved value stays in effect; hyperparameters='new' applies this run's"
    differ(OPTIMIZER_VALUES, "this run's value is applied" if apply_new else kept)
    step = f"; learning rate {lr[0]:.3g} -> {lr[1]:.3g} at this step" if lr is not None and lr[0] != lr[1] else ""
    differ(SCHEDULE, f"this run's schedule applies from here{step}")
    differ(DATA_ORDER, "this run's value applies: the data comes in another order than without the interruption")
    differ(NUMERICS, "this run's value applies: the run is not bit for bit the uninterrupted one")
    differ(CADENCE, "this run's value applies")
    return found


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


def settle(trainer: Any, fresh: list[dict[str, Any]], *, apply_new: bool) -> tuple[float, float] | None:
    """After optimizer and scheduler were restored: the learning rate that the schedule of this run gives.

    fresh: the param groups' values as this run's arguments made them. With apply_new they replace the
    saved ones. Returns the learning rate before and after, None for a scheduler without a closed form.
    """
    scheduler, groups = trainer.lr_scheduler, trainer.optimizer.param_groups
    before = float(groups[0]["lr"])
    if apply_new:
        for group, values in zip(groups, fresh, strict=True):
            group.update({key: value for key, value in values.items() if key != "lr"})
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [
                group.get("initial_lr", rate) for group, rate in zip(groups, scheduler.base_lrs, strict=True)
            ]
    lambdas = getattr(scheduler, "lr_lambdas", None)
    if lambdas is None:
        return None
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, lambdas, strict=True)]
    if apply_new:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
    return before, float(rates[0])
