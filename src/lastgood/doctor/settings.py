"""The settings that decide what is saved, kept and called best, from training arguments of any origin. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from lastgood.errors import UsageError
from lastgood.model import finite
from lastgood.policy import Keep


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Names and meanings are those of transformers' TrainingArguments.

    greater_is_better is as the Trainer uses it (it fills in True for every name that doesn't end in "loss").
    steps_per_epoch: optimizer steps, None if nothing tells. keep: the policy of a managed run.
    foreign: names of other runs' checkpoints in output_dir. eval_metric_names: what an evaluation yields, if known.
    managed: whether lastgood saves and keeps, None if nobody knows.
    """

    save_strategy: str = "steps"
    save_steps: float = 500
    eval_strategy: str = "no"
    eval_steps: float | None = None
    max_steps: int = -1
    num_train_epochs: float = 3.0
    steps_per_epoch: int | None = None
    save_total_limit: int | None = None
    keep: Keep | None = None
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False
    save_only_model: bool = False
    persistent_workers: bool = False
    num_workers: int = 0
    ignore_data_skip: bool = False
    foreign: tuple[str, ...] = ()
    eval_metric_names: tuple[str, ...] | None = None
    managed: bool | None = None


def settings_of(arguments: Mapping[str, object], **known: Any) -> Settings:
    """Those of training arguments as JSON or YAML has them; what isn't there gets the Trainer's default.

    Raises UsageError that names the argument whose value makes no sense.
    """
    metric = _text(arguments, "metric_for_best_model")
    strategy = _strategy(arguments, "save_strategy", "steps")
    load_best = bool(arguments.get("load_best_model_at_end", False))
    if metric is None and (load_best or arguments.get("lr_scheduler_type") == "reduce_lr_on_plateau"):
        metric = "loss"
    greater = arguments.get("greater_is_better")
    if greater is None and metric is not None:
        greater = not metric.endswith("loss")
    evaluation = "eval_strategy" if "eval_strategy" in arguments else "evaluation_strategy"
    eval_steps = _number(arguments, "eval_steps", None)
    return Settings(
        save_strategy=strategy,
        save_steps=_number(arguments, "save_steps", 500) or 0,
        eval_strategy=_strategy(arguments, evaluation, "no"),
        eval_steps=_number(arguments, "logging_steps", 500) if eval_steps is None else eval_steps,
        max_steps=int(_number(arguments, "max_steps", -1) or -1),
        num_train_epochs=_number(arguments, "num_train_epochs", 3.0) or 0.0,
        save_total_limit=_whole(arguments, "save_total_limit"),
        metric_for_best_model=metric,
        greater_is_better=None if greater is None else bool(greater),
        load_best_model_at_end=load_best,
        save_only_model=bool(arguments.get("save_only_model", False)),
        persistent_workers=bool(arguments.get("dataloader_persistent_workers", False)),
        num_workers=int(_number(arguments, "dataloader_num_workers", 0) or 0),
        ignore_data_skip=bool(arguments.get("ignore_data_skip", False)),
        **known,
    )


def _strategy(arguments: Mapping[str, object], name: str, default: str) -> str:
    value = arguments.get(name)
    if value is None:
        return default
    if value is False:  # YAML reads a bare `no` as false
        return "no"
    return str(getattr(value, "value", value)).rpartition(".")[2].lower()


def _text(arguments: Mapping[str, object], name: str) -> str | None:
    value = arguments.get(name)
    return value if isinstance(value, str) and value else None


def _number(arguments: Mapping[str, object], name: str, default: float | None) -> float | None:
    value = arguments.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    number = finite(value)
    if number is None:
        raise UsageError(f"{name} must be a number, not {value!r}")
    return number


def _whole(arguments: Mapping[str, object], name: str) -> int | None:
    number = _number(arguments, name, None)
    return None if number is None else int(number)
