"""A Trainer's arguments: as they are written down, and how two of these are compared at a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lastgood.redact import masked
from lastgood.report import Change

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


def arguments(args: Any) -> dict[str, Any]:
    """The training arguments as JSON with every secret masked (by name, and logins inside URLs)."""
    return {key: masked(key, value) for key, value in args.to_dict().items()}


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
