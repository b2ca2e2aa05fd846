"""Callbacks that read the checkpoint they are told of: before they are told, it has to be there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

QUIET: dict[str, str] = {
    "WandbCallback": "_log_model.is_enabled",
    "TrackioCallback": "",
    "MLflowCallback": "_log_artifacts",
    "DagsHubCallback": "_log_artifacts",
    "NeptuneCallback": "_log_checkpoints",
    "ClearMLCallback": "_log_model",
    "FlyteCallback": "sync_checkpoints",
    "DVCLiveCallback": "_log_model",
}
"""Those of transformers whose on_save does something only where this attribute says so ("": it never does)."""


def readers(callbacks: list[Any]) -> Iterator[str]:
    """Names of the classes that may look into a checkpoint in their on_save."""
    from transformers.trainer_callback import TrainerCallback

    for callback in callbacks:
        cls = type(callback)
        if getattr(cls, "on_save", None) is TrainerCallback.on_save or cls.__module__.startswith("lastgood."):
            continue
        if cls.__module__ == "transformers.trainer_callback":  # progress bars, printing, early stopping
            continue
        if cls.__module__.startswith("transformers.integrations") and not _asks(callback, QUIET.get(cls.__name__)):
            continue
        yield cls.__name__


def _asks(callback: Any, attribute: str | None) -> bool:
    if attribute is None:
        return True
    value: Any = callback if attribute else False
    for name in filter(None, attribute.split(".")):
        value = getattr(value, name, True)  # another version: rather once too often
    return bool(value)
