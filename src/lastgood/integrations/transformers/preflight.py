"""Before the first step: what the settings, the directory and the disk will do to the run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from lastgood.doctor.diagnose import preflight
from lastgood.doctor.finding import Finding
from lastgood.doctor.settings import Settings
from lastgood.errors import UsageError
from lastgood.integrations.transformers.options import Options, retention
from lastgood.repo.read import records
from lastgood.talk import warn


def examine(trainer: Trainer, options: Options) -> tuple[Finding, ...]:
    """Look for settings that lose or misjudge checkpoints: errors raise UsageError, warnings are said."""
    found = preflight(settings(trainer, options))
    for finding in found:
        text = f"{finding.code}: {finding.saw}. {finding.means}"
        fix = "; ".join(finding.fix)
        if finding.severity == "error":
            raise UsageError(text, hint=fix, code=finding.code)
        if finding.severity == "warning":
            warn(f"{text}\n  fix: {fix}")
    return found


def settings(trainer: Any, options: Options) -> Settings:
    """Those of a Trainer as the rules look at them."""
    args = trainer.args
    return Settings(
        save_strategy=str(getattr(args.save_strategy, "value", args.save_strategy)),
        save_steps=args.save_steps,
        eval_strategy=str(getattr(args.eval_strategy, "value", args.eval_strategy)),
        eval_steps=args.eval_steps,
        max_steps=args.max_steps,
        num_train_epochs=args.num_train_epochs,
        steps_per_epoch=steps_per_epoch(trainer),
        save_total_limit=args.save_total_limit,
        keep=retention(options, args) if options.keep is not None else None,
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
        managed=True,
    )


def steps_per_epoch(trainer: Any) -> int | None:
    """Optimizer steps of an epoch; None for data without a length."""
    try:
        samples = len(trainer.train_dataset)
    except TypeError:
        return None
    args = trainer.args
    per_batch, accumulated = args.train_batch_size, args.gradient_accumulation_steps
    batches = samples // per_batch if args.dataloader_drop_last else -(-samples // per_batch)
    return max(1, -(-batches // accumulated))


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
