"""Who looks into a checkpoint right behind its save: callbacks that upload it, trainers that add a file to it.

They are told of a step, and make the directory's name from it: it has to be there by then.
"""

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


def onlookers(trainer: Any, ours: type[Any]) -> Iterator[str]:
    """Names of those of a managed trainer. ours: the class whose _save_checkpoint saves."""
    from transformers.trainer_callback import TrainerCallback

    if trainer.args.push_to_hub:
        yield "push_to_hub"
    mro = type(trainer).__mro__
    for cls in mro[: mro.index(ours)]:
        # Those of trl write a model card first and do nothing behind it, but for this one.
        known = cls.__module__.startswith("trl.") and not getattr(trainer, "use_adaptive_entropy", False)
        if "_save_checkpoint" in vars(cls) and not known:
            yield f"{cls.__name__}._save_checkpoint"
    for callback in trainer.callback_handler.callbacks:
        cls = type(callback)
        if getattr(cls, "on_save", None) is TrainerCallback.on_save or cls.__module__.startswith("lastgood."):
            continue
        if cls.__module__ == "transformers.trainer_callback":  # progress bars, printing, early stopping
            continue
        if cls.__module__.startswith("transformers.integrations") and not _asks(callback, QUIET.get(cls.__name__)):
            continue
        yield f"{cls.__name__}.on_save"


def _asks(callback: Any, attribute: str | None) -> bool:
    if attribute is None:
        return True
    value: Any = callback if attribute else False
    for name in filter(None, attribute.split(".")):
        value = getattr(value, name, True)  # another version: rather once too often
    return bool(value)
