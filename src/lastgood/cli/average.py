"""lastgood average: one set of weights out of several checkpoints'."""

from __future__ import annotations

from pathlib import Path

import click

from lastgood import checkout as copying
from lastgood.cli import text
from lastgood.cli.checkout import need_torch
from lastgood.cli.place import REV, new_place, pick, place, run_option
from lastgood.errors import CorruptCheckpoint, UsageError
from lastgood.model import Record
from lastgood.store.appear import appearing
from lastgood.view import View, look


@click.command()
@click.argument("revs", metavar="REV...", type=REV, nargs=-1, required=True)
@run_option
@click.option("-o", "directory", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Where it goes.")
@click.option("--weights", "shares", metavar="W,W,...", help="A weight for each; they are scaled to sum to 1.")
@click.option("--ema", metavar="DECAY", type=float, help="Each counts DECAY times what the next newer one counts.")
def average(root: str | None, revs: tuple[str, ...], directory: Path, shares: str | None, ema: float | None) -> None:
    """Average the weights of several checkpoints, for from_pretrained; the other files are those of the newest.

    Streaming: it works for models larger than memory. Needs torch.
    """
    need_torch("average")
    from lastgood.weights.average import average as mean
    from lastgood.weights.average import ema as decaying
    from lastgood.weights.average import equal
    from lastgood.weights.source import Weights

    path, first = place(root, revs[0])
    view = look(path)
    new_place(directory, path)
    chosen = [pick(view, word) for word in (*((first,) if first else ()), *revs[1:])]
    if len({record.name for record in chosen}) != len(chosen):
        raise UsageError("the same checkpoint comes twice", hint="--weights 2,1 gives one a higher weight")
    order = sorted(range(len(chosen)), key=lambda i: (chosen[i].step, chosen[i].seq))
    if shares is not None and ema is not None:
        raise UsageError("--weights and --ema both say how much each counts")
    given = _shares(shares, len(chosen)) if shares is not None else None
    parts = [given[i] for i in order] if given else decaying(len(order), ema) if ema is not None else equal(len(order))
    records = [chosen[i] for i in order]
    for record in records:
        for fault in view.problems(record, full=True):
            raise CorruptCheckpoint(f"{record.name} is damaged: {fault}", hint="leave it out")
    sources = [Weights.open(weight_files(view, record)) for record in records]
    newest = records[-1]
    names = [n for n in copying.model_files(newest) if not n.endswith((".safetensors", ".safetensors.index.json"))]
    single = "adapter_model" if "adapter_config.json" in names else "model"
    with appearing(directory) as staging:
        copying.copy(view.path(newest), newest, names, staging)
        taken = mean(sources, parts, staging / f"{single}.safetensors")
    for record, part in zip(records, parts, strict=True):
        click.echo(f"{text.plain(record.name)}\t{part:.6g}")
    if taken:
        click.echo(f"{len(taken)} tensors of whole numbers are those of {text.plain(newest.name)}", err=True)
    click.echo(f"wrote {text.plain(str(directory))}", err=True)


def weight_files(view: View, record: Record) -> list[Path]:
    """The safetensors files with the model's weights. Raises UsageError where there are none."""
    names = [n for n in copying.model_files(record) if n.endswith(".safetensors")]
    if not names:
        raise UsageError(
            f"{record.name} has no weights in safetensors files", hint="`lastgood import` brings other tools' in"
        )
    return [(view.path(record) / name).resolve() for name in names]


def _shares(words: str, count: int) -> list[float]:
    try:
        values = [float(word) for word in words.split(",")]
    except ValueError:
        raise UsageError(f"--weights {words}: numbers with commas between them", hint="--weights 0.5,0.3,0.2") from None
    if len(values) != count:
        raise UsageError(f"--weights has {len(values)} numbers for {count} checkpoints")
    total = sum(values)
    if not all(0 <= value < float("inf") for value in values) or not total > 0:
        raise UsageError(f"--weights {words}: none may be negative, and their sum must be above 0")
    return [value / total for value in values]
