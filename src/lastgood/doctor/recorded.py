"""What a run wrote down about its steps: in its trail, and in the log of its newest trainer_state.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lastgood.layouts.progress import STATE
from lastgood.repo.layout import step_of
from lastgood.repo.trail import Entry, number
from lastgood.store import local

LIMIT = 1 << 30

Rows = Sequence[Mapping[str, Any]]


def log_of(directory: Path) -> Rows:
    """The training rows of a Trainer's log, by step; () where there is none that can be read."""
    try:
        value = json.loads(local.read(directory / STATE, LIMIT))
    except (OSError, ValueError, RecursionError):
        return ()
    log = value.get("log_history") if isinstance(value, dict) else None
    rows = [row for row in log if isinstance(row, dict)] if isinstance(log, list) else []
    return [row for row in rows if isinstance(row.get("step"), int) and "loss" in row]


def step_reached(root: Path) -> int:
    """The highest step of a trainer_state.json in a run: a stock Trainer writes it last, so that save is whole."""
    return max((step for directory in _places(root) if (step := _step(directory)) is not None), default=-1)


def log_after(root: Path, checkpoint: Path, step: int, *, fresh_window: bool) -> tuple[Entry, ...]:
    """The rows after `step` of the longest log that continues the checkpoint's own, which says what it was then.

    fresh_window: a stock Trainer begins its mean loss anew at a resume: where it didn't log at `step`, its first mean
    is over fewer steps than the one that was recorded, and is left out.
    """
    own = log_of(checkpoint)
    found: Rows = ()
    for directory in _places(root):
        rows = log_of(directory)
        if json.dumps(rows[: len(own)]) == json.dumps(own) and len(rows) > max(len(own), len(found)):
            found = rows
    entries = entries_of(found, step)
    if entries and fresh_window and not any(row["step"] == step for row in own):
        entries = (Entry(entries[0].step, 0, None, entries[0].grad_norm, "", entries[0].lr), *entries[1:])
    return entries


def newest_log(root: Path, step: int) -> tuple[Entry, ...]:
    """The rows after `step` of the longest log in a directory."""
    return entries_of(max((log_of(place) for place in _places(root)), key=len, default=()), step)


def entries_of(rows: Rows, step: int) -> tuple[Entry, ...]:
    """Rows after `step` as steps of a trail. Its loss is the mean since the row before."""
    return tuple(
        Entry(row["step"], 0, _number(row, "loss"), _number(row, "grad_norm"), "", _number(row, "learning_rate"))
        for row in rows
        if row["step"] > step
    )


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return value if isinstance(value, float) else number(value)  # Python's JSON reads NaN as a float


def _places(root: Path) -> Iterator[Path]:
    yield root
    for name in local.folders(root):
        if step_of(name) is not None:
            yield root / name


def _step(directory: Path) -> int | None:
    try:
        value = json.loads(local.read(directory / STATE, LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    step = value.get("global_step") if isinstance(value, dict) else None
    return step if isinstance(step, int) else None
