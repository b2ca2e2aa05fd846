"""Rules about which checkpoint counts as the best."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from lastgood.doctor.case import Case
from lastgood.doctor.log import Raised
from lastgood.doctor.rule import Rule, Sight, advice
from lastgood.doctor.settings import Settings
from lastgood.model import finite
from lastgood.ranking import known_mode, needs
from lastgood.schedule import save_points, total_steps

ENOUGH = 5
"""Evaluations from which on something can be said about their course."""


def _strategies(case: Case) -> Iterator[Sight]:
    s = _of(case)
    if s.load_best_model_at_end and s.save_strategy not in ("best", s.eval_strategy):
        yield Sight(
            saw=f"load_best_model_at_end=True, save_strategy={s.save_strategy!r}, eval_strategy={s.eval_strategy!r}",
            fix=(f"eval_strategy={s.save_strategy!r}",) if s.save_strategy != "no" else ("save_strategy='steps'",),
        )


def _multiple(case: Case) -> Iterator[Sight]:
    s = _of(case)
    every = s.eval_steps
    if not (s.load_best_model_at_end and s.save_strategy == s.eval_strategy == "steps" and every):
        return
    if (s.save_steps < 1) != (every < 1):
        yield Sight(saw=f"save_steps={s.save_steps:g} and eval_steps={every:g}: one is a share, one a number of steps")
    elif abs(s.save_steps / every - round(s.save_steps / every)) > 1e-9 or s.save_steps < every:
        better = max(1, round(s.save_steps / every)) * every
        yield Sight(saw=f"save_steps={s.save_steps:g}, eval_steps={every:g}", fix=(f"save_steps={better:g}",))


def _unnamed(case: Case) -> Iterator[Sight]:
    s = _of(case)
    if s.save_strategy == "best" and s.metric_for_best_model is None:
        yield Sight(saw="save_strategy='best' without metric_for_best_model")


def _not_found(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    wanted, names = match.group(1), re.findall(r"'([^']+)'", match.group(2))
    full = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    near = difflib.get_close_matches(full, names, 1)
    yield Sight(
        saw=f"metric_for_best_model={wanted!r}; evaluation yields {', '.join(names) or 'nothing'}",
        fix=(f"metric_for_best_model={near[0]!r}",) if near else (),
    )


def _not_yielded(case: Case) -> Iterator[Sight]:
    s = _of(case)
    metric = s.metric_for_best_model if s.keep is None else s.keep.primary[0]
    if metric is None or s.eval_metric_names is None:
        return
    full = {name: name if name.startswith("eval_") else f"eval_{name}" for name in needs(metric)}
    wanted = next((name for name in full if full[name] not in s.eval_metric_names), None)
    if wanted is None:
        return
    near = difflib.get_close_matches(full[wanted], s.eval_metric_names, 1)
    option = "metric_for_best_model" if s.keep is None else "monitor"
    yield Sight(
        saw=f"{option}={wanted!r}, evaluation yields {', '.join(s.eval_metric_names)}",
        means="the run would fail at its first evaluation"
        if s.keep is None
        else "no checkpoint would get that metric, so none would be kept as the best",
        fix=(f"{option}={near[0]!r}" if near else "name one of these",),
    )


def _direction(case: Case) -> Iterator[Sight]:
    s = _of(case)
    metric = s.metric_for_best_model
    if s.keep is not None or metric is None or s.greater_is_better is None:
        return
    mode = "max" if s.greater_is_better else "min"
    known = known_mode(metric)
    saw = f"metric_for_best_model={metric!r} with greater_is_better={s.greater_is_better}"
    if known not in (None, mode):
        right = known == "max"
        yield Sight(
            saw=saw,
            means=f"a {'higher' if right else 'lower'} {metric} is better: the worst checkpoints would be kept"
            " (left out, greater_is_better is True for every name that doesn't end in 'loss')",
            fix=(f"greater_is_better={right}",),
        )
    elif known is None and not case.recorded and s.greater_is_better != metric.endswith("loss"):
        # The other way round it was written by somebody who thought about it: it isn't what is inferred.
        yield Sight(
            saw=saw,
            severity="warning",
            means=f"{metric} isn't a metric known here, so nobody can tell whether that is the right way round",
            fix=(f"make sure that a {'higher' if s.greater_is_better else 'lower'} {metric} is better",),
        )


def _by_time(case: Case) -> Iterator[Sight]:
    s = _of(case)
    if case.disk is not None and any(record.metrics for record in case.disk.records):
        return  # something evaluates, whatever the arguments say
    limited = (s.save_total_limit or 0) > 0
    if limited and s.keep is None and (s.metric_for_best_model is None or s.eval_strategy == "no"):
        why = "there is no evaluation" if s.eval_strategy == "no" else "metric_for_best_model isn't set"
        yield Sight(
            saw=f"save_total_limit={s.save_total_limit}, and {why}",
            means=f"the {s.save_total_limit} newest checkpoints are kept, not the best ones",
            fix=('eval_strategy="steps", metric_for_best_model="eval_loss", greater_is_better=False',),
        )
    if s.keep is not None and s.keep.monitor is not None and s.eval_strategy == "no":
        yield Sight(
            saw=f"Keep(monitor={s.keep.monitor!r}) without an evaluation",
            means="no checkpoint gets that metric unless something else records it; the newest ones are kept",
            fix=('eval_strategy="steps"',),
        )


def _no_recovery(case: Case) -> Iterator[Sight]:
    s = _of(case)
    if case.recorded and _over(case):
        return  # it arrived without one
    length = total_steps(s.max_steps, s.num_train_epochs, s.steps_per_epoch)
    if s.save_strategy == "no":
        yield Sight(
            saw='save_strategy="no"',
            means="nothing is saved: after a crash the run starts from the beginning",
            fix=('save_strategy="steps", save_steps=500',),
        )
    elif s.save_strategy == "best":
        yield Sight(
            saw='save_strategy="best"',
            means="once the metric stops improving nothing is saved any more: a crash costs all steps since",
            fix=('save_strategy="steps": the best is found and kept all the same',),
        )
    elif length is None and s.save_strategy == "epoch" and s.num_train_epochs <= 1:
        yield _only_at_the_end(f'save_strategy="epoch" with num_train_epochs={s.num_train_epochs:g}', length)
    elif length is not None and (s.save_strategy != "epoch" or s.steps_per_epoch is not None):
        # Nobody can tell where the epochs of a stream end, so nothing is said about them.
        points = save_points(s.save_strategy, s.save_steps, max_steps=length, steps_per_epoch=s.steps_per_epoch)
        first = next(points, None)
        if first is None or first >= length:
            yield _only_at_the_end(
                f"save_strategy={s.save_strategy!r}, save_steps={s.save_steps} in a run of {length} steps", length
            )


def _over(case: Case) -> bool:
    """Whether the newest checkpoint is of the run's last step."""
    newest = case.disk.newest if case.disk is not None else None
    end = case.disk.state(newest).get("max_steps") if case.disk is not None and newest is not None else None
    return newest is not None and isinstance(end, int) and newest.step >= end > 0


def _only_at_the_end(saw: str, length: int | None) -> Sight:
    every = 500 if length is None else max(1, length // 10)
    return Sight(
        saw=saw,
        means="the only checkpoint comes at the very end: a crash before it loses everything",
        fix=(f'save_strategy="steps", save_steps={every}',),
    )


def _meaningless(case: Case) -> Iterator[Sight]:
    for name, values in _courses(case):
        numbers = [number for _, value in values if (number := finite(value)) is not None]
        broken = [step for step, value in values if finite(value) is None]
        if broken:
            yield Sight(
                saw=f"{name} is not a number at step {', '.join(map(str, broken[:5]))}",
                means="a value that isn't a number ranks nothing: these checkpoints can't be the best",
            )
        elif len(numbers) >= 3 and len(set(numbers)) == 1:
            yield Sight(saw=f"{name} is {numbers[0]:g} at each of {len(numbers)} evaluations")


def _always_last(case: Case) -> Iterator[Sight]:
    for name, values in _courses(case):
        numbers = [number for _, value in values if (number := finite(value)) is not None]
        mode = case.disk.view.mode if case.disk is not None else None
        if len(numbers) < ENOUGH or len(numbers) != len(values) or mode is None or len(set(numbers)) == 1:
            continue
        best = min(numbers) if mode == "min" else max(numbers)
        if numbers.index(best) == 0:
            yield Sight(
                saw=f"{name} was best at the first of {len(numbers)} evaluations, step {values[0][0]}",
                means="the model only got worse: what will be deployed is nearly the model that training started from",
                fix=("a lower learning rate, fewer epochs; check that the evaluation data is like the training data",),
            )


def _courses(case: Case) -> Iterator[tuple[str, list[tuple[int, Any]]]]:
    """The values of the metric that ranks, by step, from the newest checkpoint's log and from the records."""
    disk = case.disk
    if disk is None or disk.newest is None or disk.view.monitor is None:
        return
    name = disk.view.monitor
    rows = disk.state(disk.newest).get("log_history")
    values: dict[int, Any] = {record.step: record.metrics[name] for record in disk.records if name in record.metrics}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("step"), int) and name in row:
            values[row["step"]] = row[name]
    if values:
        yield name, sorted(values.items())


def _of(case: Case) -> Settings:
    assert case.settings is not None, "only called where there are settings"
    return case.settings


RULES: tuple[Rule, ...] = (
    Rule(
        code="CKB001",
        title="The best model is wanted, but saves and evaluations come at different times",
        severity="error",
        message=r"requires the save and eval strategy to match",
        arguments=_strategies,
        means="the Trainer refuses to start: it can load only what was saved at the time of an evaluation",
        cause="load_best_model_at_end takes the best of the checkpoints that were evaluated, so the stock Trainer"
        " insists on save_strategy and eval_strategy being the same. A managed run saves when it likes: the value of"
        " an evaluation is attached to the checkpoint of its step whenever it arrives.",
        fix=("eval_strategy='steps', save_strategy='steps'",),
        source="transformers 5.23, TrainingArguments.__post_init__; transformers #12687, #12786",
    ),
    Rule(
        code="CKB002",
        title="The best model is wanted, but not every save comes at an evaluation",
        severity="error",
        message=r"requires the saving steps to be a round multiple",
        arguments=_multiple,
        means="the Trainer refuses to start: some checkpoints would have no value to be ranked by",
        cause="With load_best_model_at_end the stock Trainer wants save_steps to be a multiple of eval_steps, both"
        " whole numbers or both shares of the run.",
        fix=("save_steps=1000, eval_steps=500",),
        source="transformers 5.23, TrainingArguments.__post_init__",
    ),
    Rule(
        code="CKB003",
        title="Only the best is to be saved, but nothing says by which metric",
        severity="error",
        message=r"metric_for_best_model. must be provided when using 'best'",
        arguments=_unnamed,
        means="the Trainer refuses to start",
        cause="save_strategy='best' saves when a metric gets better, and has no default for which.",
        fix=('metric_for_best_model="eval_loss", greater_is_better=False',),
        source="transformers 5.23, TrainingArguments.__post_init__",
    ),
    Rule(
        code="CKB004",
        title="The metric that decides what is best is not among those that evaluation yields",
        severity="error",
        message=r"training argument is set to '(.*)', which is not found in the evaluation metrics\."
        r" The available evaluation metrics are: \[(.*)\]",
        log=_not_found,
        arguments=_not_yielded,
        means="the run fails at its first evaluation, before the checkpoint of that step is saved",
        cause="A typing error, a compute_metrics that returns other names, or several evaluation sets: each set's"
        " metrics carry its name (eval_german_loss).",
        fix=("metric_for_best_model= one of the available names",),
        source="transformers 5.23, Trainer._determine_best_metric",
    ),
    Rule(
        code="CKB005",
        title="A higher or a lower value is taken for better, and the name of the metric says the opposite",
        severity="error",
        arguments=_direction,
        means="the worst checkpoints are kept and loaded at the end, without a word",
        cause="Left out, greater_is_better is True for every name that doesn't end in 'loss': perplexity, wer, mse and"
        " eval_loss_de are then ranked the wrong way round.",
        fix=("greater_is_better=False",),
        source="transformers 5.23, TrainingArguments.__post_init__",
    ),
    Rule(
        code="CKB006",
        title="A limit without an evaluation keeps the newest checkpoints, not the best",
        severity="warning",
        arguments=lambda case: advice(_by_time(case), case),
        means="the newest checkpoints are kept, not the best ones",
        cause="save_total_limit counts directories by age. Without a metric there is no best that it could spare.",
        fix=('eval_strategy="steps", metric_for_best_model="eval_loss", greater_is_better=False',),
        source="transformers 5.23, rotate_checkpoints",
    ),
    Rule(
        code="CKB007",
        title="There is no recovery point before the end of the run",
        severity="warning",
        arguments=lambda case: advice(_no_recovery(case), case),
        means="a crash loses everything",
        cause="save_strategy='epoch' in a run of one epoch, or save_steps beyond the length of the run.",
        fix=('save_strategy="steps", save_steps=500',),
        source="transformers 5.23, DefaultFlowCallback",
    ),
    Rule(
        code="CKB008",
        title="The values that rank the checkpoints say nothing",
        severity="warning",
        run=_meaningless,
        means="which checkpoint is called the best is chance",
        cause="A metric that is NaN or always the same ranks nothing: the loss overflowed, the evaluation set is too"
        " small or empty of labels, or evaluation runs on a copy of the model that isn't trained.",
        fix=("look at the evaluation: lastgood log --sort step -o step,metrics",),
        source="transformers 5.23, Trainer._determine_best_metric: a comparison with NaN is never true",
    ),
    Rule(
        code="CKB009",
        title="The best checkpoint is the first one that was evaluated",
        severity="info",
        run=_always_last,
        means="training made the metric worse from the beginning",
        cause="Overfitting, a learning rate that is too high, or an evaluation of something else than what is trained.",
        fix=("a lower learning rate, or fewer epochs",),
        source="policy.ranking over the recorded values",
    ),
    Rule(
        code="CKB010",
        title="Lightning can't rank checkpoints by the metric that it was told",
        severity="error",
        message=r"ModelCheckpoint\(save_top_k=.*monitor=None\) is not a valid configuration"
        r"|could not find the monitored key in the returned metrics",
        means="Lightning stops, at the start or at the first save",
        cause="save_top_k above 1 needs monitor=, and the monitored name must be logged with self.log() before the"
        " checkpoint is due.",
        fix=("ModelCheckpoint(monitor='val_loss', mode='min', save_top_k=3) and self.log('val_loss', ...)",),
        source="lightning 2.6, ModelCheckpoint",
    ),
)
