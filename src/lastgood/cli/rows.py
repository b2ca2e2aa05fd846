"""The rows of `log`: one per checkpoint, with what it is worth and why it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lastgood import ranking
from lastgood.cli.table import Row
from lastgood.model import Record
from lastgood.ranking import Mode, metric_of
from lastgood.repo import journal, metrics
from lastgood.rev import metric_named
from lastgood.view import View, look


def listing(
    root: Path, metric: str | None, aims: Mapping[str, Mode] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    view = look(root, outline=True)
    monitor, mode = view.monitor, view.mode
    if metric is not None:
        others = view.keep.monitors if view.keep is not None else ()
        monitor, mode = metric_named(f"best:{metric}", view.records, view.monitor, view.mode, others)
    reasons = {decision.record.name: decision for decision in view.decisions()}
    best = ranking.best(view.records, monitor, mode) if monitor is not None and mode is not None else None
    rows = [_row(r, view, reasons[r.name].reasons, monitor, best) for r in view.records]
    if aims is not None:
        front = {record.name for record in ranking.pareto(view.records, aims)}
        for row, record in zip(rows, view.records, strict=True):
            row["pareto"] = record.name in front
            row |= {f"metrics.{name}": metric_of(record, name) for name in aims}
    head = {
        "path": str(view.root),
        "id": view.run,
        "layout": view.layout,
        "monitor": monitor,
        "mode": mode,
        "policy": view.keep.describe() if view.keep is not None else None,
        "pareto": dict(aims) if aims is not None else None,
    }
    return sorted(rows, key=newest), head


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
        "pareto": None,
        "state": record.state,
        "poisoned": record.poisoned or None,
        "layout": record.layout or ("lastgood" if record.id else None),
        "size": record.size if manifest is not None else None,
        "tags": list(record.pinned),
        "note": view.notes.get(record.id),
        "why": _why(record, reasons, view.monitor),
    }


def _why(record: Record, reasons: Sequence[str], monitor: str | None) -> list[str]:
    if record.state in ("incomplete", "foreign"):
        return [record.problem]
    if record.poisoned and record.ours:
        return [f"poisoned: {record.poisoned}", *(["on a branch that was left"] if not record.current else [])]
    if record.ours and not record.current and record.id:
        return ["on a branch that was left"]
    short = [reason.partition(": what a recovery")[0] for reason in reasons if reason != "no limit is set"]
    return [_won(reason, monitor) if reason.startswith("best: ") else reason for reason in short]


def _won(reason: str, monitor: str | None) -> str:
    """best; of another metric than the first: best mmlu."""
    name = reason.removeprefix("best: ").rpartition(" = ")[0]
    return "best" if name == monitor else f"best {name}"


def deleted(path: Path, there: set[Any], monitor: str | None) -> list[dict[str, Any]]:
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
                    **dict.fromkeys(("seq", "parent", "size", "train", "note", "poisoned"), None),
                    "step": event["step"],
                    "name": record.name,
                    "id": id,
                    "lineage": (),
                    "current": False,
                    "when": when if isinstance(when, (int, float)) else None,
                    "eval": metric_of(record, monitor) if monitor else None,
                    "metrics": values,
                    "best": False,
                    "pareto": None,
                    "state": "deleted",
                    "layout": "lastgood",
                    "tags": [],
                    "why": list(map(str, reasons)) if isinstance(reasons, list) else [],
                }
            )
    return rows


def newest(row: Row) -> tuple[int, int]:
    return (-(row["step"] if row["step"] is not None else -1), -(row["seq"] or 0))
