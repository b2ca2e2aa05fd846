"""What is written down about a Lightning run beside its state, and what of it differs at a resume."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

from lastgood.integrations.transformers import settings
from lastgood.model import Manifest
from lastgood.redact import masked
from lastgood.report import Change
from lastgood.state.plain import plain

ARGUMENTS = (
    "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
    "val_check_interval", "check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "precision",
)  # fmt: skip


@functools.cache
def environment() -> dict[str, str]:
    """Versions of what a bit-exact resume depends on."""
    found = dict(settings.environment())
    for name in ("lightning", "pytorch-lightning", "torchmetrics"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def arguments(trainer: Any, module: Any) -> dict[str, Any]:
    """The trainer's settings and the module's hyper-parameters, secrets masked."""
    found = {name: masked(name, plain(getattr(trainer, name))) for name in ARGUMENTS if hasattr(trainer, name)}
    return {**found, **masked("", {str(k): v for k, v in dict(plain(module.hparams)).items()})}


def facts(trainer: Any, module: Any) -> dict[str, Any]:
    """What a later resume compares itself with."""
    found: dict[str, Any] = {"trainer": "Lightning", "model": type(module).__name__, "world_size": trainer.world_size}
    combined = trainer.fit_loop._combined_loader
    data = [getattr(loader, "dataset", None) for loader in combined.flattened] if combined is not None else []
    if data and data[0] is not None:
        found["data"] = settings.data_facts(data[0])
        found["batch_size"] = getattr(combined.flattened[0], "batch_size", None)
    return found


def changes(manifest: Manifest, now: dict[str, Any]) -> list[Change]:
    """Differences in model, data and versions."""
    found = settings.fact_changes(manifest.facts, now)
    return found + settings.version_changes(manifest.environment, environment())
