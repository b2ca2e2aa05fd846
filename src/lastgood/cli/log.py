"""lastgood log: the checkpoints of a run, with what each is worth and why it is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lastgood.cli import memory, text
from lastgood.cli.place import run_at, run_option
from lastgood.cli.table import Column, Row, Style, choose, emit, emit_json, lines, options, ordered, terminal_width
from lastgood.model import Record
from lastgood.policy import metric_of
from lastgood.repo import journal, metrics
from lastgood.view import View, look

SCHEMA = "lastgood.log/1"


@click.command()
@click.argument("run", required=False)
@run_option
@options
@click.option("--all", "everything", is_flag=True, help="Also those that were deleted, from the journal.")
@click.option("--graph", is_flag=True, help="Draw the branches that resumes from older checkpoints made.")
@click.option("-n", "count", type=click.IntRange(min=1), help="Only the newest N.")
@click.option("--best", "metric", metavar="METRIC", help="The metric to mark the best by.")
def log(
    root: str | None,
    run: str | None,
    style: Style,
    everything: bool,
    graph: bool,
    count: int | None,
    metric: str | None,
) -> None:
    """The checkpoints of a run, newest first: step, age, metrics, state, size, and why each is kept.

    States: full (a resume finds everything), weights (the model alone), incomplete (a save that was cut off, or
    damage), foreign (another run's), deleted (with --all). A star marks the best.
    """
    path = run_at(root, run)
    rows, head = _listing(path, metric)
    if everything:
        rows = sorted(rows + _deleted(path, {row["id"] for row in rows}, head["monitor"]), key=_newest)
    known = _columns(style, head)
    shown = list(ordered(rows, known, style))[:count]
    if style.json:
        emit_json(SCHEMA, {"run": head, "checkpoints": shown})
        return
    default = ["step", "when", "train", "eval", "state", "size", "why"]
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
        said = [_title(path, head, rows)], _foot(path, head, rows, shown)
        title, foot = ([part for line in block for part in text.wrapped(line, wide)] for block in said)
        table = [*title, *table, *foot]
    emit(table)


def _listing(path: Path, metric: str | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, head), remembered between calls for runs of very many checkpoints."""
    return memory.remembered(path, metric or "", lambda: _read(look(path, outline=True), metric))


def _read(view: View, metric: str | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from lastgood.rev import _metric

    monitor, mode = view.monitor, view.mode
    if metric is not None:
        monitor, mode = _metric(f"best:{metric}", view.records, view.monitor, view.mode)
    reasons = {decision.record.name: decision for decision in view.decisions()}
    valued = [
        (v, r) for r in view.records if r.ours and r.current and monitor and (v := metric_of(r, monitor)) is not None
    ]
    best = (min if mode == "min" else max)(valued, key=lambda item: item[0], default=(None, None))[1]
    rows = [_row(r, view, reasons[r.name].reasons, monitor, best) for r in view.records]
    head = {
        "path": str(view.root),
        "id": view.run,
        "layout": view.layout,
        "monitor": monitor,
        "mode": mode,
        "policy": view.keep.describe() if view.keep is not None else None,
    }
    return sorted(rows, key=_newest), head


def _row(
    record: Record, view: View, reasons: Sequence[str], monitor: str | None, best: Record | None
) -> dict[str, Any]:
    manifest = record.manifest
    loss = manifest.facts.get("loss") if manifest is not None else None
    return {
        "step": record.step if record.step >= 0 else None,
        "name": record.name,
        "id": record.id or None,
        "seq": record.seq,
        "parent": manifest.parent if manifest is not None else None,
        "lineage": manifest.lineage if manifest is not None else (),
        "current": record.current,
        "when": manifest.created if manifest is not None and manifest.created else None,
        "train": loss if isinstance(loss, (int, float)) else None,
        "eval": metric_of(record, monitor) if monitor is not None else None,
        "metrics": dict(record.metrics),
        "best": record is best,
        "state": record.state,
        "layout": record.layout or ("lastgood" if record.id else None),
        "size": record.size if manifest is not None else None,
        "tags": list(record.pinned),
        "note": view.notes.get(record.id),
        "why": _why(record, reasons),
    }


def _why(record: Record, reasons: Sequence[str]) -> list[str]:
    if record.state in ("incomplete", "foreign"):
        return [record.problem]
    if record.ours and not record.current and record.id:
        return ["on a branch that was left"]
    short = [reason.partition(": what a recovery")[0] for reason in reasons if reason != "no limit is set"]
    return ["best" if reason.startswith("best: ") else reason for reason in short]


def _deleted(path: Path, there: set[Any], monitor: str | None) -> list[dict[str, Any]]:
    """What the journal remembers of checkpoints that are gone; their metrics stay on disk."""
    saved: dict[str, Mapping[str, Any]] = {}
    rows = []
    for event in journal.read(path):
        id = event.get("id") or f"step {event.get('step')}"
        if not isinstance(id, str) or not isinstance(event.get("step"), int):
            continue
        if event.get("event") == "saved":
            saved[id] = event
        elif event.get("event") == "deleted" and id not in there:
            there.add(id)
            values = metrics.read(path, id)
            record = Record(name=f"checkpoint-{event['step']}", step=event["step"], state="full", metrics=values)
            reasons, when = event.get("reasons"), saved.get(id, {}).get("time")
            rows.append(
                {
                    **dict.fromkeys(("seq", "parent", "size", "train", "note"), None),
                    "step": event["step"],
                    "name": record.name,
                    "id": id,
                    "lineage": (),
                    "current": False,
                    "when": when if isinstance(when, (int, float)) else None,
                    "eval": metric_of(record, monitor) if monitor else None,
                    "metrics": values,
                    "best": False,
                    "state": "deleted",
                    "layout": "lastgood",
                    "tags": [],
                    "why": list(map(str, reasons)) if isinstance(reasons, list) else [],
                }
            )
    return rows


def _newest(row: Row) -> tuple[int, int]:
    return (-(row["step"] if row["step"] is not None else -1), -(row["seq"] or 0))


def _plainly_named(row: Row) -> bool:
    return bool(row["name"] == f"checkpoint-{row['step']}")


def _columns(style: Style, head: Mapping[str, Any]) -> list[Column]:
    now = time.time()
    title = str(head["monitor"] or "eval").upper()
    return [
        Column("step", "STEP", str),
        Column("name", "NAME", str, shrink=True),
        Column("id", "ID", str),
        Column("when", "WHEN", lambda then: text.age(then, now), right=True),
        Column("train", "TRAIN", text.number, right=True),
        Column("eval", text.plain(title), text.number, right=True),
        Column("metrics", "METRICS", lambda m: " ".join(f"{k}={text.number(v)}" for k, v in m.items()), shrink=True),
        Column("state", "STATE", str),
        Column("layout", "WRITTEN BY", str),
        Column("size", "SIZE", style.size, right=True),
        Column("tags", "TAGS", " ".join, shrink=True),
        Column("note", "NOTE", str, shrink=True),
        Column("why", "TAGS / WHY KEPT", " · ".join, shrink=True),
    ]


def _title(path: Path, head: Mapping[str, Any], rows: Sequence[Row]) -> str:
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


def _foot(path: Path, head: Mapping[str, Any], rows: Sequence[Row], shown: Sequence[Row]) -> list[str]:
    notes = []
    hidden = len(rows) - len(shown)
    if hidden:
        notes.append(f"...{hidden} more (without -n)")
    gone = memory.count_deleted(path)
    if gone and not any(row["state"] == "deleted" for row in rows):
        notes.append(f"...{gone} {'were' if gone > 1 else 'was'} deleted (lastgood log --all)")
    if any(row["best"] for row in rows):
        better = "lower" if head["mode"] == "min" else "higher"
        notes.append(f"* best {text.plain(str(head['monitor']))} ({better} is better)")
    if any(row["state"] == "incomplete" for row in rows):
        notes.append("incomplete ones are passed over by a resume: `lastgood resume --check` says more")
    return notes
