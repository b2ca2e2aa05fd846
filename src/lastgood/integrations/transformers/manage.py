"""`lastgood.manage(trainer)`: the one line that a training script gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from transformers import Trainer

from lastgood.errors import NotSupported, UsageError, wrong_type
from lastgood.integrations.transformers.options import Options, retention
from lastgood.integrations.transformers.session import Session
from lastgood.integrations.transformers.trainer import ManagedTrainer
from lastgood.policy import Keep
from lastgood.repo.read import records
from lastgood.talk import warn
from lastgood.traps import Finding, Settings, findings

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
    examine(trainer, chosen)
    if not isinstance(trainer, ManagedTrainer):
        trainer.__class__ = managed_class(type(trainer))
    trainer._lastgood = Session(trainer, chosen)
    return trainer


def managed_class(cls: type[Any]) -> type[Any]:
    """`cls` with ManagedTrainer in front of Trainer: its own overrides come first, their super() calls reach ours."""
    if cls is Trainer:
        return ManagedTrainer
    return type(f"Managed{cls.__name__}", (cls, ManagedTrainer), {"__module__": cls.__module__, "__doc__": cls.__doc__})


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
    if getattr(args, "enable_jit_checkpoint", False):
        raise NotSupported(
            "enable_jit_checkpoint and lastgood would both save on SIGTERM",
            hint="remove enable_jit_checkpoint: a managed run saves on SIGTERM at the next step, exit status 75",
        )


def examine(trainer: Trainer, options: Options) -> tuple[Finding, ...]:
    """Look for settings that lose or misjudge checkpoints: errors raise UsageError, warnings are said."""
    args = trainer.args
    keep = None
    if options.keep is not None:
        keep = retention(options, args)
    found = findings(
        Settings(
            save_strategy=str(getattr(args.save_strategy, "value", args.save_strategy)),
            save_steps=args.save_steps,
            eval_strategy=str(getattr(args.eval_strategy, "value", args.eval_strategy)),
            max_steps=args.max_steps,
            num_train_epochs=args.num_train_epochs,
            steps_per_epoch=_steps_per_epoch(trainer),
            save_total_limit=args.save_total_limit,
            keep=keep,
            metric_for_best_model=args.metric_for_best_model,
            greater_is_better=args.greater_is_better,
            load_best_model_at_end=args.load_best_model_at_end,
            save_only_model=args.save_only_model,
            persistent_workers=args.dataloader_persistent_workers,
            num_workers=args.dataloader_num_workers,
            ignore_data_skip=args.ignore_data_skip,
            foreign=tuple(r.name for r in records(Path(args.output_dir)) if r.state == "foreign")
            if args.output_dir
            else (),
            eval_metric_names=_eval_metric_names(trainer),
        )
    )
    for finding in found:
        text = f"{finding.code}: {finding.saw}. {finding.means}"
        if finding.severity == "error":
            raise UsageError(text, hint=finding.fix, code=finding.code)
        if finding.severity == "warning":
            warn(f"{text}\n  fix: {finding.fix}")
    return found


def _eval_metric_names(trainer: Trainer) -> tuple[str, ...] | None:
    """What an evaluation of a plain Trainer yields; None where a subclass or compute_metrics may add to it."""
    data = trainer.eval_dataset
    plain = all(
        getattr(type(trainer), name) is getattr(Trainer, name) for name in ("evaluate", "evaluation_loop", "log")
    )
    if data is None or trainer.compute_metrics is not None or not plain or trainer.args.eval_strategy == "no":
        return None
    prefixes = [f"eval_{name}_" for name in data] if isinstance(data, dict) else ["eval_"]
    return tuple(f"{prefix}{name}" for prefix in prefixes for name in ("loss", "runtime", "samples_per_second"))


def _steps_per_epoch(trainer: Trainer) -> int | None:
    try:
        samples = len(trainer.train_dataset)
    except TypeError:
        return None
    per_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    return max(1, -(-samples // per_step))
