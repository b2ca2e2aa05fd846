"""What the stock Trainer saves, keeps, deletes and resumes from: the rules of transformers 5.23 as a pure model.

The rules are those of Trainer._maybe_log_save_evaluate, _determine_best_metric, _save_checkpoint and
_finalize_training, of trainer_utils.rotate_checkpoints and of TrainingArguments. Checkpoints are told apart by step:
rotation sorts by the directories' modification time, which is the order of the saves unless somebody writes into an
old checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from lastgood.errors import UsageError, wrong_type
from lastgood.schedule import save_points

SAVES = ("no", "steps", "epoch", "best")
EVALUATIONS = ("no", "steps", "epoch")


class Stock(msgspec.Struct, frozen=True, kw_only=True):
    """The TrainingArguments that decide what is on disk; names, meanings and defaults are theirs.

    Filled in as TrainingArguments does: eval_steps from logging_steps, metric_for_best_model="loss" for
    load_best_model_at_end, greater_is_better=True unless the metric's name ends in "loss".
    steps_per_epoch: optimizer steps, needed where something happens by epoch.
    Raises UsageError for what the Trainer refuses: CKB001 the strategies differ, CKB002 saves aren't at evaluations,
    CKB003 best by which metric.
    """

    max_steps: int
    save_strategy: str = "steps"
    save_steps: float = 500
    eval_strategy: str = "no"
    eval_steps: float | None = None
    eval_delay: float = 0
    logging_steps: float = 500
    steps_per_epoch: int | None = None
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    save_only_model: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise wrong_type("max_steps", self.max_steps, "a whole number of at least 1")
        for option, value, known in (
            ("save_strategy", self.save_strategy, SAVES),
            ("eval_strategy", self.eval_strategy, EVALUATIONS),
        ):
            if value not in known:
                raise wrong_type(option, value, " or ".join(map(repr, known)))
            if value == "epoch" and not (self.steps_per_epoch and self.steps_per_epoch > 0):
                raise UsageError(f"{option}='epoch' needs steps_per_epoch: how many optimizer steps are an epoch?")
        self._fill_in()
        if self.save_strategy == "steps":
            _check_steps("save_steps", self.save_steps)
        if self.eval_strategy == "steps":
            _check_steps("eval_steps", self.eval_steps)
            if self.eval_steps is None or self.eval_steps <= 0:
                raise wrong_type("eval_steps", self.eval_steps, "above 0, or None for logging_steps")
        if self.load_best_model_at_end and self.save_strategy != "best":
            self._check_best()
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise UsageError(
                "the Trainer refuses save_strategy='best' without metric_for_best_model: best by which metric?",
                hint="metric_for_best_model='eval_loss'",
                code="CKB003",
            )

    def _fill_in(self) -> None:
        fill = msgspec.structs.force_setattr
        if self.eval_strategy == "steps" and not self.eval_steps:
            fill(self, "eval_steps", self.logging_steps)
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            fill(self, "metric_for_best_model", "loss")
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            fill(self, "greater_is_better", not self.metric_for_best_model.endswith("loss"))

    def _check_best(self) -> None:
        """load_best_model_at_end: every save must come with an evaluation, or the best might not be on disk."""
        if self.eval_strategy != self.save_strategy:
            raise UsageError(
                f"the Trainer refuses load_best_model_at_end with save_strategy={self.save_strategy!r} and"
                f" eval_strategy={self.eval_strategy!r}: both must be the same (or save_strategy='best')",
                hint=f"eval_strategy={'steps' if self.save_strategy == 'no' else self.save_strategy!r}",
                code="CKB001",
            )
        if self.eval_strategy != "steps" or self.eval_steps is None:
            return
        saves, evaluations, ratios = self.save_steps, self.eval_steps, (self.save_steps < 1, self.eval_steps < 1)
        fits = saves % evaluations == 0
        if not fits and all(ratios):
            fits = (saves * 1_000_000) % (evaluations * 1_000_000) == 0  # as the Trainer reckons with shares
        if not fits:
            mixed = "; a share of the run and a number of steps can't be compared" if ratios[0] != ratios[1] else ""
            raise UsageError(
                f"the Trainer refuses load_best_model_at_end with save_steps={saves:g} and eval_steps={evaluations:g}:"
                f" saves must be at evaluations, so save_steps must be a round multiple of eval_steps{mixed}",
                hint=f"eval_steps={saves:g}",
                code="CKB002",
            )

    @property
    def limit(self) -> int | None:
        """How many checkpoints may stay; None: all, which a limit of 0 or below means as well."""
        return self.save_total_limit if self.save_total_limit is not None and self.save_total_limit > 0 else None

    @property
    def metric(self) -> str:
        """The metric's name in the log: with eval_ in front."""
        name = self.metric_for_best_model or ""
        return name if name.startswith("eval_") else f"eval_{name}"

    def saves(self) -> Iterator[int]:
        """The steps at which it saves whatever the metrics; none for "best"."""
        return save_points(
            self.save_strategy, self.save_steps, max_steps=self.max_steps, steps_per_epoch=self.steps_per_epoch
        )

    def evaluations(self) -> Iterator[int]:
        """The steps at which it evaluates: those of eval_steps and the last one, from eval_delay on."""
        steps = save_points(
            self.eval_strategy, self.eval_steps or 0, max_steps=self.max_steps, steps_per_epoch=self.steps_per_epoch
        )
        per_unit = self.steps_per_epoch if self.eval_strategy == "epoch" and self.steps_per_epoch else 1
        return (step for step in steps if self.eval_delay <= step / per_unit)


class StockMoment(msgspec.Struct, frozen=True, kw_only=True):
    """One save with its rotation, or (end) the deletion when training ends.

    kept: steps on disk afterwards, oldest first. during: on disk at the peak, the new one before the old one goes.
    removed: (step, why). best: the step of state.best_model_checkpoint, which load_best_model_at_end loads;
    why_best: why that one, in words. limit: how many may stay.
    """

    step: int
    kept: tuple[int, ...]
    removed: tuple[tuple[int, str], ...]
    during: tuple[int, ...]
    best: int | None
    why_best: str
    limit: int | None
    end: bool = False

    @property
    def reasons(self) -> Mapping[int, str]:
        """Why each of `kept` is still there."""
        said = dict.fromkeys(self.kept, "no limit" if self.limit is None else f"one of the {self.limit} newest")
        newest = self.during[-1]
        if newest in said:
            said[newest] = "newest"
        if self.best in said:
            said[self.best] = f"newest, and {self.why_best}" if self.best == newest else self.why_best
        return said


def stock_history(args: Stock, metrics: Mapping[int, float | None]) -> tuple[StockMoment, ...]:
    """One moment per save, in order, and one more if checkpoints are deleted when training ends.

    metrics: step -> value of metric_for_best_model at the evaluation of that step. One that is missing, None or NaN
    is never better than another (the real Trainer stops with a KeyError if the evaluation doesn't yield the metric).
    """
    run, moments = _Run(args, metrics), []
    evaluations, saves = set(args.evaluations()), set(args.saves())
    # The evaluation of an epoch comes after the last step's own save: what it finds counts from the next save on.
    late = args.eval_strategy == "epoch" and args.save_strategy == "steps"
    for step in sorted(evaluations | saves):
        if late and step in saves:
            moments.append(run.save(step))
        better = step in evaluations and run.evaluate(step)
        if (not late and step in saves) or (args.save_strategy == "best" and better):
            moments.append(run.save(step))
    end = run.finish()
    return (*moments, end) if end is not None else tuple(moments)


def stock_resumes_from(
    kept: Sequence[int], cut: int | None, *, save_only_model: bool = False
) -> tuple[int | None, str]:
    """The step that resume_from_checkpoint=True goes on from, None if it fails, and why, in words.

    cut: the step whose save a crash interrupted, whether `kept` names it or not. trainer_state.json is written last,
    so whatever was cut off, the resume stops with an error: the weights or that file are missing or end in the middle.
    """
    if cut is not None and cut >= max(kept, default=0):
        others = [step for step in kept if step != cut]
        then = f"checkpoint-{max(others)} is taken" if others else "there is none to resume from"
        return None, (
            f"takes checkpoint-{cut}, the highest number, which the crash cut off, and fails;"
            f" once that is deleted by hand, {then}"
        )
    if not kept:
        return None, "fails: there is no checkpoint to resume from"
    fresh = "; without optimizer and scheduler, which start afresh" if save_only_model else ""
    return max(kept), f"takes checkpoint-{max(kept)}, the highest number{fresh}"


@dataclass(slots=True)
class _Run:
    """TrainerState and the directory. best: best_model_checkpoint; leader: best_global_step; value: best_metric."""

    args: Stock
    metrics: Mapping[int, float | None]
    kept: tuple[int, ...] = ()
    best: int | None = None
    leader: int | None = None
    value: float | None = None

    def evaluate(self, step: int) -> bool:
        """Whether this is a new best; of equal values the older one stays the best."""
        if self.args.metric_for_best_model is None:
            return False
        value = self.metrics.get(step)
        sign = 1.0 if self.args.greater_is_better else -1.0
        if value is None or not sign * value > (-math.inf if self.value is None else sign * self.value):
            return False
        self.leader, self.value = step, value
        return True

    def save(self, step: int) -> StockMoment:
        during = (*self.kept, step)
        # The best step may not have been saved: then the one that was the best at an earlier save keeps the name.
        if self.leader != self.best and self.leader in during:
            self.best = self.leader
        removed = self._rotate(during)
        gone = {step for step, _ in removed}
        self.kept = tuple(step for step in during if step not in gone) if gone else during
        return self._moment(step, removed, during)

    def _rotate(self, during: tuple[int, ...]) -> tuple[tuple[int, str], ...]:
        limit = self.args.limit
        if limit is None:
            return ()
        spared = {during[-1], during[-1] if self.best is None else self.best}
        removed: list[tuple[int, str]] = []
        for step in during:
            there = len(during) - len(removed)
            if there <= limit:
                break
            if step not in spared:
                removed.append((step, _why_gone(step, during, spared, there, limit)))
        return tuple(removed)

    def finish(self) -> StockMoment | None:
        """save_total_limit=1 leaves the best alone when training ends, the newest goes: nothing to go on from."""
        during, last = self.kept, self.args.max_steps
        if self.best is None or self.args.save_total_limit != 1 or during == (self.best,):
            return None
        self.kept = (self.best,)
        why = "training ended: save_total_limit=1 leaves the best alone"
        return self._moment(last, tuple((s, why) for s in during if s != self.best), during, end=True)

    def _moment(
        self, step: int, removed: tuple[tuple[int, str], ...], during: tuple[int, ...], *, end: bool = False
    ) -> StockMoment:
        return StockMoment(
            step=step, kept=self.kept, removed=removed, during=during, best=self.best, why_best=self._why_best(),
            limit=self.args.limit, end=end,
        )  # fmt: skip

    def _why_best(self) -> str:
        if self.best is None:
            return ""
        text = f"best: {self.args.metric} {self.metrics[self.best]:.6g}"
        return text if self.best == self.leader else f"named {text}, though step {self.leader} had {self.value:.6g}"


def _why_gone(step: int, during: Sequence[int], spared: Collection[int], there: int, limit: int) -> str:
    if len(spared) > limit:
        return f"neither the newest nor the best, and {limit} may stay"
    older = any(other < step and other in spared for other in during)
    oldest = "oldest but for the best, of" if older else "oldest of"
    return f"{oldest} {there} where {limit} may stay"


def _check_steps(option: str, value: float | None) -> None:
    if value is not None and value > 1 and value != int(value):
        raise wrong_type(option, value, "a whole number, or a share of the run below 1")
