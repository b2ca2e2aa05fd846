"""What the demo prints and draws at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import lastgood
from lastgood.repo import metrics
from lastgood.units import size


def checkpoints(out: Path, limit: int) -> Table:
    """Every checkpoint that ever was, with what became of it and why."""
    from lastgood import policy, ranking
    from lastgood.repo.read import records

    run = lastgood.open(out)
    keep = lastgood.Keep.from_limit(limit, "eval_loss", "min")
    table = Table(title=f"{out.name}: {keep.describe()}", title_justify="left")
    for column in ("step", "eval_loss", "state", "size", "why"):
        table.add_column(column, justify="right" if column in ("step", "eval_loss", "size") else "left")
    rows = []
    for decision in policy.decide(records(out), keep):
        record = decision.record
        value = ranking.metric_of(record, "eval_loss")
        rows.append(
            (
                record.step,
                "" if value is None else f"{value:.4f}",
                record.state,
                size(record.size),
                "; ".join(decision.reasons),
            )
        )
    for event in run.history:
        if event["event"] == "deleted":
            value = metrics.read(out, event["id"]).get("eval_loss")
            rows.append(
                (
                    event["step"],
                    "" if value is None else f"{value:.4f}",
                    "deleted",
                    size(event["bytes"]),
                    "; ".join(event["reasons"]),
                )
            )
    for step, *cells in sorted(rows):
        table.add_row(str(step), *cells)
    return table


def plot(path: Path, result: dict[str, Any], *, kept: list[int], deleted: list[int], killed: int, resumed: int) -> None:
    """Loss over steps as PNG, with the checkpoints on the evaluation curve, the kill and the resume."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5))
    train = {int(step): value for step, value in result["loss"].items()}
    evals = {int(step): value for step, value in result["eval_loss"].items()}
    axes.plot(list(train), list(train.values()), color="0.7", label="training loss")
    axes.plot(list(evals), list(evals.values()), color="tab:blue", label="eval loss")
    for steps, style, label in ((kept, "o", "checkpoint kept"), (deleted, "x", "checkpoint deleted")):
        shown = [step for step in steps if step in evals]
        axes.plot(
            shown, [evals[step] for step in shown], style, color="tab:green" if style == "o" else "0.4", label=label
        )
    axes.axvline(killed, color="tab:red", linestyle="--", label=f"SIGKILL at the save of step {killed}")
    axes.axvline(resumed, color="tab:orange", linestyle=":", label=f"resumed from step {resumed}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def proof(console: Console, straight: dict[str, Any], broken: dict[str, Any]) -> bool:
    """Whether the interrupted run ended exactly like the one that wasn't, said aloud."""
    equal = True
    for name, key in (("final weights", "weights"), ("training losses", "loss"), ("eval losses", "eval_loss")):
        same = straight[key] == broken[key]
        equal = equal and same
        shown = straight[key][:16] if key == "weights" else f"{len(straight[key])} values"
        console.print(f"  {name:<16} {shown:<18} {'[green]bit-identical' if same else '[red]DIFFERENT'}")
    return equal
