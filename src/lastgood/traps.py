"""Settings that lose or misjudge checkpoints, found before the first step. Pure: settings in, findings out.

The codes are stable and shared with every other diagnosis of lastgood.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lastgood.policy import Keep, known_mode
from lastgood.schedule import save_points, total_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """saw: the setting. means: what will happen. fix: as code."""

    code: str
    severity: Literal["error", "warning"]
    saw: str
    means: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments that decide what is saved and kept; names and meanings are those of TrainingArguments.

    greater_is_better is as the Trainer uses it (it fills in True for every name that doesn't end in "loss").
    foreign: names of other runs' checkpoints in output_dir. eval_metric_names: what an evaluation yields, if known.
    """

    save_strategy: str
    save_steps: float
    eval_strategy: str
    max_steps: int
    num_train_epochs: float
    steps_per_epoch: int | None
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


def findings(settings: Settings) -> tuple[Finding, ...]:
    """All of them, errors first."""
    found = [*_judging(settings), *_recovering(settings), *_surroundings(settings)]
    return tuple(sorted(found, key=lambda finding: finding.severity != "error"))


def _judging(s: Settings) -> Iterator[Finding]:
    """Which checkpoint counts as the best."""
    metric = s.metric_for_best_model
    if s.keep is None and metric is not None and s.greater_is_better is not None:
        mode = "max" if s.greater_is_better else "min"
        known = known_mode(metric)
        if known not in (None, mode):
            right = known == "max"
            yield Finding(
                code="CKB005",
                severity="error",
                saw=f"metric_for_best_model={metric!r} with greater_is_better={s.greater_is_better}",
                means=f"a {'higher' if right else 'lower'} {metric} is better: the worst checkpoints would be kept"
                " (left out, greater_is_better is True for every name that doesn't end in 'loss')",
                fix=f"greater_is_better={right}",
            )
        elif known is None:
            yield Finding(
                code="CKB005",
                severity="warning",
                saw=f"metric_for_best_model={metric!r} with greater_is_better={s.greater_is_better}",
                means=f"{metric} isn't a metric known here, so nobody can tell whether that is the right way round",
                fix=f"make sure that a {'higher' if s.greater_is_better else 'lower'} {metric} is better",
            )
    wanted = metric if s.keep is None else s.keep.monitor
    if wanted is not None and s.eval_metric_names is not None:
        full = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
        if full not in s.eval_metric_names:
            near = difflib.get_close_matches(full, s.eval_metric_names, 1)
            option = "metric_for_best_model" if s.keep is None else "monitor"
            yield Finding(
                code="CKB004",
                severity="error",
                saw=f"{option}={wanted!r}, evaluation yields {', '.join(s.eval_metric_names)}",
                means="the run would fail at its first evaluation"
                if s.keep is None
                else "no checkpoint would get that metric, so none would be kept as the best",
                fix=f"{option}={near[0]!r}" if near else "name one of these",
            )
    limited = (s.save_total_limit or 0) > 0
    if limited and s.keep is None and (metric is None or s.eval_strategy == "no"):
        why = "there is no evaluation" if s.eval_strategy == "no" else "metric_for_best_model isn't set"
        yield Finding(
            code="CKB006",
            severity="warning",
            saw=f"save_total_limit={s.save_total_limit}, and {why}",
            means=f"the {s.save_total_limit} newest checkpoints are kept, not the best ones",
            fix='eval_strategy="steps", metric_for_best_model="eval_loss", greater_is_better=False',
        )
    if s.keep is not None and s.keep.monitor is not None and s.eval_strategy == "no":
        yield Finding(
            code="CKB006",
            severity="warning",
            saw=f"Keep(monitor={s.keep.monitor!r}) without an evaluation",
            means="no checkpoint gets that metric unless something else records it; the newest ones are kept",
            fix='eval_strategy="steps"',
        )


def _recovering(s: Settings) -> Iterator[Finding]:
    """Whether a crash finds something to resume from."""
    length = total_steps(s.max_steps, s.num_train_epochs, s.steps_per_epoch)
    if s.save_strategy == "no":
        yield Finding(
            code="CKB007",
            severity="warning",
            saw='save_strategy="no"',
            means="nothing is saved: after a crash the run starts from the beginning",
            fix='save_strategy="steps", save_steps=500',
        )
    elif s.save_strategy == "best":
        yield Finding(
            code="CKB007",
            severity="warning",
            saw='save_strategy="best"',
            means="once the metric stops improving nothing is saved any more: a crash costs all steps since",
            fix='save_strategy="steps": the best is found and kept all the same',
        )
    elif length is not None and (s.save_strategy != "epoch" or s.steps_per_epoch is not None):
        # Nobody can tell where the epochs of a stream end, so nothing is said about them.
        first = next(
            save_points(s.save_strategy, s.save_steps, max_steps=length, steps_per_epoch=s.steps_per_epoch), None
        )
        if first is None or first >= length:
            yield Finding(
                code="CKB007",
                severity="warning",
                saw=f"save_strategy={s.save_strategy!r}, save_steps={s.save_steps} in a run of {length} steps",
                means="the only checkpoint comes at the very end: a crash before it loses everything",
                fix=f'save_strategy="steps", save_steps={max(1, length // 10)}',
            )
    if s.save_only_model and s.save_strategy != "no":
        yield Finding(
            code="CKR016",
            severity="warning",
            saw="save_only_model=True",
            means="checkpoints hold the weights alone: none of them can be resumed from",
            fix="save_only_model=False, and keep=lastgood.Keep(last=..., full=1) to save space",
        )


def _surroundings(s: Settings) -> Iterator[Finding]:
    """What lies around, and what makes a resume inexact."""
    if s.foreign:
        more = f" and {len(s.foreign) - 3} more" if len(s.foreign) > 3 else ""
        yield Finding(
            code="CKR007",
            severity="warning",
            saw=f"output_dir holds checkpoints of another run: {', '.join(s.foreign[:3])}{more}",
            means="they are never resumed from, counted or deleted here",
            fix="a fresh output_dir for each run",
        )
    if s.ignore_data_skip:
        yield Finding(
            code="CKL001",
            severity="warning",
            saw="ignore_data_skip=True",
            means="a resumed run sees the first samples of the epoch twice and the last ones never",
            fix="ignore_data_skip=False",
        )
    if s.persistent_workers and s.num_workers > 0:
        yield Finding(
            code="CKL008",
            severity="warning",
            saw="dataloader_persistent_workers=True",
            means="if the dataset draws random numbers, a resume after the first epoch draws others: its workers"
            " keep their random state from epoch to epoch and nothing can read it",
            fix="dataloader_persistent_workers=False, unless loading is deterministic",
        )
