"""lastgood log: the checkpoints of a run, with what each is worth and why it is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lastgood.cli import memory, text
from lastgood.cli.place import run_at, run_option
from lastgood.cli.table import Column, Row, Style, choose, emit, emit_json, lines, options, ordered, terminal_width

if TYPE_CHECKING:
    from lastgood.ranking import Mode

SCHEMA = "lastgood.log/1"


@click.command()
@click.argument("run", required=False)
@run_option
@options
@click.option("--all", "everything", is_flag=True, help="Also those that were deleted, from the journal.")
@click.option("--graph", is_flag=True, help="Draw the branches that resumes from older checkpoints made.")
@click.option("-n", "count", type=click.IntRange(min=1), help="Only the newest N.")
@click.option("--best", "metric", metavar="METRIC", help="The metric to mark the best by.")
@click.option("--pareto", metavar="METRIC,...", help="Mark those that none beats: eval_loss:min,mmlu:max.")
def log(
    root: str | None,
    run: str | None,
    style: Style,
    everything: bool,
    graph: bool,
    count: int | None,
    metric: str | None,
    pareto: str | None,
) -> None:
    """The checkpoints of a run, newest first: step, age, metrics, state, size, and why each is kept.

    States: full (a resume finds everything), weights (the model alone), incomplete (a save that was cut off, or
    damage), foreign (another run's), deleted (with --all). A star marks the best.
    """
    path = run_at(root, run)
    aims = None
    if pareto is not None:
        from lastgood.cli.metric import aims as named

        aims = named(pareto)
    rows, head = listing(path, metric, aims)
    if everything:
        from lastgood.cli.rows import deleted, newest

        rows = sorted(rows + deleted(path, {row["id"] for row in rows}, head["monitor"]), key=newest)
    known = log_columns(style, head)
    shown = list(ordered(rows, known, style))[:count]
    if style.json:
        plain = [{key: value for key, value in row.items() if not key.startswith("metrics.")} for row in shown]
        emit_json(SCHEMA, {"run": head, "checkpoints": plain})
        return
    default = ["step", "when", "train", "eval", "state", "size", "why"]
    if aims is not None:
        default[3:4] = ["pareto", *(f"metrics.{name}" for name in aims)]
    if any(not _plainly_named(row) for row in shown):
        default.insert(1, "name")
    marks = [""] * (len(shown) + 1)
    if graph and style.header:
        from lastgood.cli.graph import lanes

        marks = lanes(shown)
    wide = terminal_width()
    room = None if wide is None else max(8, wide - len(marks[0]))
    table = lines(choose(known, default, style), shown, style, columns_wide=room)
    if style.header:
        table = [f"{mark}{line}" for mark, line in zip(marks, table, strict=True)]
        said = [title(path, head, rows)], foot(path, head, rows, shown)
        above, below = ([part for line in block for part in text.wrapped(line, wide)] for block in said)
        table = [*above, *table, *below]
    emit(table)


def listing(
    path: Path, metric: str | None, aims: Mapping[str, Mode] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, head), remembered between calls for runs of very many checkpoints."""

    def read() -> memory.Listing:
        from lastgood.cli import rows  # with all that it takes to look at a run: not needed for what is remembered

        return rows.listing(path, metric, aims)

    return memory.remembered(path, repr((metric, aims)), read)


def _plainly_named(row: Row) -> bool:
    return bool(row["name"] == f"checkpoint-{row['step']}")


def log_columns(style: Style, head: Mapping[str, Any]) -> list[Column]:
    now = time.time()
    metric = str(head["monitor"] or "eval").upper()
    return [
        Column("step", "STEP", str),
        Column("name", "NAME", str, shrink=True),
        Column("id", "ID", str),
        Column("when", "WHEN", lambda then: text.age(then, now), right=True),
        Column("train", "TRAIN", text.number, right=True),
        Column("eval", text.plain(metric), text.number, right=True),
        Column("metrics", "METRICS", lambda m: " ".join(f"{k}={text.number(v)}" for k, v in m.items()), shrink=True),
        Column("pareto", "PARETO", lambda front: "*" if front else ""),
        *[
            Column(f"metrics.{name}", text.plain(name).upper(), text.number, right=True)
            for name in head["pareto"] or ()
        ],
        Column("state", "STATE", str),
        Column("layout", "WRITTEN BY", str),
        Column("size", "SIZE", style.size, right=True),
        Column("tags", "TAGS", " ".join, shrink=True),
        Column("note", "NOTE", str, shrink=True),
        Column("why", "TAGS / WHY KEPT", " · ".join, shrink=True),
    ]


def title(path: Path, head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    there = [row for row in rows if row["state"] != "deleted"]
    words = [f"run {text.plain(path.resolve().name)}"]
    words.append(
        f"written by {text.plain(head['layout'])}"
        if head["layout"] != "lastgood"
        else text.plain(str(head["policy"] or "managed"))
    )
    branches = sum(1 for row in there if not row["current"] and row["state"] in ("full", "weights") and row["id"])
    words.append(f"{len(there)} checkpoint{'s' if len(there) != 1 else ''} on disk")
    if branches:
        words.append(f"{branches} on branches that were left")
    return "   ".join(words)


def foot(path: Path, head: Mapping[str, Any], rows: Sequence[Row], shown: Sequence[Row]) -> list[str]:
    notes = []
    hidden = len(rows) - len(shown)
    if hidden:
        notes.append(f"...{hidden} more (without -n)")
    gone = memory.count_deleted(path)
    if gone and not any(row["state"] == "deleted" for row in rows):
        notes.append(f"...{gone} {'were' if gone > 1 else 'was'} deleted (lastgood log --all)")
    if head["pareto"]:
        said = ", ".join(f"{name} ({'lower' if way == 'min' else 'higher'})" for name, way in head["pareto"].items())
        notes.append(f"PARETO *: none is better in one of {text.plain(said)} and as good in the others")
    if any(row["best"] for row in rows):
        better = "lower" if head["mode"] == "min" else "higher"
        notes.append(f"* best {text.plain(str(head['monitor']))} ({better} is better)")
    if any(row["poisoned"] for row in rows):
        notes.append("poisoned ones are passed over by a resume, and never the best: `lastgood bisect` says more")
    if any(row["state"] == "incomplete" for row in rows):
        notes.append("incomplete ones are passed over by a resume: `lastgood resume --check` says more")
    return notes
