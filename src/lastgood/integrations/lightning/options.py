"""The options of LightningCheckpoint as one Keep: ModelCheckpoint's words and what they mean here."""

from __future__ import annotations

from inspect import signature
from typing import Any

from lastgood.errors import NotSupported, UsageError, wrong_type
from lastgood.policy import Keep

NOT_HERE = {
    "filename": "a checkpoint is the directory checkpoint-STEP, its metrics are recorded beside it (lastgood log)",
    "auto_insert_metric_name": "the name of a checkpoint has no metric in it",
    "enable_version_counter": "a name that is taken is never written over",
}
"""Options of ModelCheckpoint that have no meaning for a run directory."""


KNOWN = (
    "dirpath", "monitor", "mode", "save_top_k", "save_last", "every_n_train_steps", "train_time_interval",
    "every_n_epochs", "save_on_train_epoch_end", "save_on_exception", "save_weights_only", "verbose",
    "keep", "on_error", "on_full", "resume", "verify", "background",
)  # fmt: skip


def refuse(other: dict[str, Any]) -> None:
    """Raise UsageError for options that ModelCheckpoint has and we don't, or that nobody has."""
    for name in other:
        if name in NOT_HERE:
            raise UsageError(f"{name} doesn't apply: {NOT_HERE[name]}", hint=f"leave {name} out")
        raise UsageError(f"LightningCheckpoint has no option {name!r}", hint=f"the options are {', '.join(KNOWN)}")


def retention(
    keep: Keep | None, *, monitor: str | None, mode: str, save_top_k: int, save_last: bool | str | None
) -> Keep | None:
    """What is kept; None if nothing is saved at all (save_top_k=0).

    save_top_k=k: the best k by monitor, and the newest, which a recovery needs. Without a monitor 1 keeps the newest,
    -1 everything.
    """
    if save_last not in (None, True, False, "link"):
        raise wrong_type("save_last", save_last, "True, False or 'link'")
    if keep is not None:
        if not isinstance(keep, Keep):
            raise wrong_type("keep", keep, "a lastgood.Keep, for instance Keep(last=2, best=3, monitor='val_loss')")
        if save_top_k != 1 or save_last:
            raise UsageError(
                f"keep={keep.describe()!r} and save_top_k={save_top_k}, save_last={save_last} both say what to keep",
                hint="remove save_top_k and save_last",
            )
        if monitor is not None and keep.primary[0] != monitor:
            raise UsageError(f"keep ranks by {keep.monitor}, monitor is {monitor}", hint="name one of them")
        return keep
    ranked: dict[str, Any] = {} if monitor is None else {"monitor": monitor, "mode": mode}
    if save_top_k == 0:
        return Keep(last=1, **ranked) if save_last else None
    if save_top_k == -1:
        return Keep(**ranked)
    return Keep(last=1, best=save_top_k if monitor is not None else None, **ranked)


def supported(trainer: Any, module: Any) -> None:
    """Raise NotSupported for set-ups whose state would be saved only in part."""
    strategy = type(trainer.strategy).__name__
    if trainer.world_size > 1 or trainer.num_devices > 1 or strategy != "SingleDeviceStrategy":
        raise NotSupported(
            f"LightningCheckpoint can't save a run with {strategy} on {trainer.world_size} devices yet",
            hint="train on one device (Trainer(devices=1, strategy='auto')), or use ModelCheckpoint for this run",
        )
    if "dataloader_iter" in signature(module.training_step).parameters:
        raise NotSupported(
            "training_step(dataloader_iter) fetches its batches itself: where it stands can't be restored",
            hint="take the batch as training_step(batch, batch_idx), or use ModelCheckpoint for this run",
        )
