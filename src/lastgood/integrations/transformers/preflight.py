"""Before the first step: what the settings, the directory and the disk will do to the run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from lastgood.doctor.arguments import load
from lastgood.doctor.case import Case
from lastgood.doctor.diagnose import examine as diagnosed
from lastgood.doctor.diagnose import preflight
from lastgood.doctor.disk import Disk
from lastgood.doctor.finding import SERIOUS, Finding
from lastgood.doctor.settings import Settings
from lastgood.errors import UsageError
from lastgood.integrations.transformers.options import Options, retention
from lastgood.planner.live import steps_per_epoch
from lastgood.repo.read import records
from lastgood.talk import note, warn

ON_DISK = ("CKR007", "CKR017", "CKB008", "CKC011", "CKL009")
"""What a run directory may tell that nothing else says: checkpoints that don't belong together, or that have no
manifest beyond the newest; a metric that ranks nothing; NaN in what would be resumed from; a resume that went another
way. Half-written and damaged checkpoints are passed over by the resume, with a word; what differs from the checkpoint's
settings stands in its report; the disk is the plan's matter, at the start of train()."""


def examine(trainer: Trainer, options: Options) -> tuple[Finding, ...]:
    """Look for settings that lose or misjudge checkpoints: errors raise UsageError, warnings are said.

    What is on disk already is looked at as well; nothing there raises, for the run may mean to start afresh.
    """
    given = settings(trainer, options)
    # What besides the Trainer's own schedule brings saves is unknown to the rule about runs that save too seldom.
    found = tuple(f for f in preflight(given) if f.code != "CKB007" or not options.triggers.any)
    errors = [finding for finding in found if finding.severity == "error"]
    if errors:  # all of them: who corrects one mustn't run into the next
        fix = "; ".join(fix for finding in errors for fix in finding.fix)
        raise UsageError("\n".join(map(_text, errors)), hint=fix, code=errors[0].code)
    for finding in found:
        if finding.severity == "warning":
            tell(finding)
    told = {finding.code for finding in found}
    seen = tuple(f for f in directory(trainer, given) if f.code not in told and f.severity in SERIOUS)
    for finding in seen:
        tell(finding)
    return (*found, *seen)


def directory(trainer: Any, given: Settings) -> tuple[Finding, ...]:
    """Findings about output_dir, if it holds checkpoints; () where it can't be read."""
    root = Path(trainer.args.output_dir or "")
    if not trainer.args.output_dir or not root.is_dir():
        return ()
    try:
        disk = Disk(root)
        if not disk.records:
            return ()
        case = Case(disk=disk, arguments=load(trainer.args), settings=given)
        return tuple(f for f in diagnosed(case, select=ON_DISK) if f.where != "arguments")
    except Exception as error:  # a look at what is there must never cost a training
        note(f"{root} wasn't looked at: {type(error).__name__}: {error}")
        return ()


def tell(finding: Finding) -> None:
    """Say a finding as a warning."""
    warn(f"{_text(finding)}\n  fix: {'; '.join(finding.fix)}")


def _text(finding: Finding) -> str:
    return f"{finding.code}: {finding.saw}. {finding.means}"


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
