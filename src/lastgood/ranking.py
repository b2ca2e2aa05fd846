"""Which checkpoint is better: values of metrics and formulas, rankings, and what no other one beats. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

from lastgood.errors import UsageError
from lastgood.formula import Formula, parse
from lastgood.model import Record, finite

Mode = Literal["min", "max"]

LOWER = frozenset(
    """
    loss perplexity ppl wer cer mer ter mse rmse mae mape nll bpb bpc bits_per_byte bits_per_char error
    err error_rate fid hamming_loss brier ece cross_entropy
    """.split()  # noqa: SIM905 (a list of words)
)
HIGHER = frozenset(
    """
    accuracy acc f1 precision recall bleu sacrebleu chrf meteor rouge rouge1 rouge2 rougel rougelsum auc
    auroc map mrr ndcg reward rewards exact_match em r2 pearson pearsonr spearman spearmanr mcc
    matthews_correlation win_rate iou miou dice cosine_accuracy mean_token_accuracy ssim psnr bertscore
    comet pass@1 pass@10 pass@100 score
    """.split()  # noqa: SIM905 (a list of words)
)
TURNED = frozenset("neg negative negated minus inv inverse drop gap delta diff improvement std var".split())  # noqa: SIM905
"""Words that turn a metric round or make another quantity of it: a higher neg_log_loss is better."""


@lru_cache(maxsize=256)
def formula_of(text: str) -> Formula | None:
    """The formula that a metric's name is; None for a plain name, and for whatever else was recorded as one."""
    try:
        return parse(text)
    except UsageError:
        return None


def known_mode(name: str) -> Mode | None:
    """Whether a lower or a higher value of a well-known metric is better; None if the name doesn't say for sure.

    The last or first words of a name count (eval_de_loss, loss_de, eval_math_accuracy), unless any others disagree
    or turn it round (neg_log_loss, 1-wer): then nothing is known, for a guess would keep the worst. Of a
    formula nothing is known either.
    """
    if formula_of(name) is not None:
        return None
    plain = name.lower().removeprefix("eval_")
    words = plain.replace("/", "_").replace("-", "_").split("_")
    if plain.startswith("1-") or not TURNED.isdisjoint(words):
        return None
    pieces = {"_".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    ends = {"_".join(words[:n]) for n in range(1, len(words) + 1)} | {"_".join(words[n:]) for n in range(len(words))}
    if pieces & LOWER and pieces & HIGHER:
        return None
    return "min" if ends & LOWER else "max" if ends & HIGHER else None


def metric_of(record: Record, monitor: str) -> float | None:
    """The record's value of a metric or a formula; None if it ranks nowhere (missing, NaN).

    `loss` and `eval_loss` name the same metric. What was recorded under exactly this name comes before a formula.
    """
    for name in also_called(monitor):
        if name in record.metrics:
            return finite(record.metrics[name])
    formula = formula_of(monitor)
    return None if formula is None else formula.value(lambda name: metric_of(record, name))


def also_called(metric: str) -> tuple[str, ...]:
    """The names under which a metric may have been recorded."""
    return metric, f"eval_{metric}", metric.removeprefix("eval_")


def needs(monitor: str) -> tuple[str, ...]:
    """The metrics that a value of it takes: those of a formula, else itself."""
    formula = formula_of(monitor)
    return (monitor,) if formula is None else formula.names


def ranking(records: Sequence[Record], monitor: str, mode: Mode) -> tuple[Record, ...]:
    """The current branch's healthy checkpoints with a finite metric, best first.

    Of equals the newer comes first: it has seen more data, and resuming from it redoes less.
    """
    sign = 1.0 if mode == "min" else -1.0
    valued = [(metric_of(record, monitor), record) for record in records if record.good]
    ranked = sorted((sign * value, -record.seq, record.name, record) for value, record in valued if value is not None)
    return tuple([entry[3] for entry in ranked])


def best(records: Sequence[Record], monitor: str, mode: Mode) -> Record | None:
    """The best checkpoint of the current branch: what gets deployed."""
    return next(iter(ranking(records, monitor, mode)), None)


def pareto(records: Sequence[Record], aims: Mapping[str, Mode]) -> tuple[Record, ...]:
    """The branch's healthy checkpoints that no other one beats: none is as good in every metric and better in one.

    aims: metric or formula -> "min" or "max". What lacks one of them is left out. The best by the first comes first;
    of equals all stay, the newer first.
    """
    if not aims:
        raise UsageError("by which metrics?", hint="for instance eval_loss:min,mmlu:max")
    signs = [(name, 1.0 if mode == "min" else -1.0) for name, mode in aims.items()]
    points = []
    for record in records:
        if record.good:
            values = [metric_of(record, name) for name, _ in signs]
            known = [value * sign for value, (_, sign) in zip(values, signs, strict=True) if value is not None]
            if len(known) == len(signs):
                points.append((tuple(known), -record.seq, record))
    # In this order nothing is beaten by what comes after it: only the front so far has to be asked.
    front: list[tuple[tuple[float, ...], Record]] = []
    for point, _, record in sorted(points, key=lambda entry: entry[:2]):
        if not any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other, _ in front):
            front.append((point, record))
    return tuple(record for _, record in front)
