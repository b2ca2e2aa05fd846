"""`lastgood.manage(trainer)`: the one line that a training script gains."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import Trainer

from lastgood.errors import NotSupported, UsageError, wrong_type
from lastgood.integrations.transformers.options import Options, one_interval
from lastgood.integrations.transformers.preflight import examine
from lastgood.integrations.transformers.session import Session
from lastgood.integrations.transformers.trainer import ManagedTrainer
from lastgood.policy import Keep

T = TypeVar("T", bound=Trainer)


def manage(trainer: T, keep: Keep | None = None, on_error: str = "warn", **options: Any) -> T:
    """Let lastgood save, rotate and resume for `trainer`, and return it; its arguments keep their meaning.

    keep, on_error and the other options: see `lastgood.integrations.transformers.options.Options`.

    Raises UsageError for a wrong option and for settings that would keep the wrong checkpoints,
    NotSupported for what can't be managed yet (FSDP, DeepSpeed, several processes).
    """
    if not isinstance(trainer, Trainer):
        raise wrong_type("trainer", trainer, "a transformers Trainer, or an instance of a subclass such as SFTTrainer")
    try:
        chosen = Options(keep=keep, on_error=on_error, **options)  # type: ignore[arg-type]
    except TypeError as error:
        known = ", ".join(Options.__dataclass_fields__)
        raise UsageError(f"manage(): {error}", hint=f"the options are {known}") from error
    supported(trainer)
    one_interval(chosen, trainer.args)
    examine(trainer, chosen)
    if not isinstance(trainer, ManagedTrainer):
        trainer.__class__ = managed_class(type(trainer))
    trainer._lastgood = Session(trainer, chosen)
    return trainer


LOADS_BY_ITSELF = frozenset({"sentence_transformers"})
"""Packages whose trainers load a checkpoint without the stock Trainer: they override without calling super()."""


def managed_class(cls: type[Any]) -> type[Any]:
    """`cls` with ManagedTrainer in front of Trainer: its own overrides come first, their super() calls reach ours."""
    if cls is Trainer:
        return ManagedTrainer
    inside: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    if any(base.__module__.partition(".")[0] in LOADS_BY_ITSELF for base in cls.__mro__):
        inside |= {name: vars(ManagedTrainer)[name] for name in ("_load_from_checkpoint", "_load_best_model")}
        inside["_stock_load"] = cls._load_from_checkpoint
    return type(f"Managed{cls.__name__}", (cls, ManagedTrainer), inside)


def supported(trainer: Trainer) -> None:
    """Raise NotSupported for set-ups whose state this version would save only in part."""
    args = trainer.args
    reasons = {
        "FSDP": trainer.is_fsdp_enabled or bool(args.fsdp),
        "DeepSpeed": trainer.is_deepspeed_enabled or args.deepspeed is not None,
        f"{args.world_size} processes": args.world_size > 1,
        "tensor parallelism": getattr(trainer, "is_tp_enabled", False),
        "a model sharded while loading": getattr(trainer, "is_distributed_loading_by_transformers", False),
        "XLA": getattr(args, "tpu_num_cores", None) is not None,
    }
    found = [name for name, present in reasons.items() if present]
    if found:
        raise NotSupported(
            f"lastgood can't manage a Trainer with {', '.join(found)} yet",
            hint="run it in one process, or leave this run to the stock Trainer; nothing was changed",
        )
    if not getattr(args, "save_safetensors", True):  # gone since transformers 5
        raise NotSupported(
            "save_safetensors=False asks for weights in pickles, which lastgood doesn't write",
            hint="remove save_safetensors=False",
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise NotSupported(
            "enable_jit_checkpoint and lastgood would both save on SIGTERM",
            hint="remove enable_jit_checkpoint: a managed run saves on SIGTERM at the next step, exit status 75",
        )
