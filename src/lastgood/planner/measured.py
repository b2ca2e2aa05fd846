"""A metric that was measured: from JSON, a Trainer's log, or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lastgood.errors import UsageError
from lastgood.planner.history import as_values

LIMIT = 256 << 20
"""Largest file that is read (256 MiB)."""

FORMS = 'JSON {"500": 1.3, ...}, a list of {"step": 500, "eval_loss": 1.3}, a trainer_state.json, or CSV with a step'


def read(path: Path, monitor: str | None) -> tuple[str | None, dict[int, float]]:
    """(name of the metric if the file tells it, step -> value). monitor: which metric; None takes the only one there.

    Raises UsageError where the file isn't there, isn't of a known form, or holds no such metric.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise UsageError(f"{path} has more than {LIMIT >> 20} MiB: that is no list of metrics")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it isn't text"
        raise UsageError(f"the metrics in {path} can't be read: {said}") from None
    if path.suffix == ".csv" or not text.lstrip().startswith(("{", "[")):
        return _rows(path, list(csv.DictReader(io.StringIO(text))), monitor)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}", hint=FORMS) from None
    if isinstance(found, dict) and isinstance(found.get("log_history"), list):
        return _rows(path, found["log_history"], monitor)
    if isinstance(found, list):
        return _rows(path, found, monitor)
    if isinstance(found, dict) and found and all(str(key).isdigit() for key in found):
        return None, as_values(found)
    raise UsageError(f"{path} holds no metrics by step", hint=FORMS)


def _rows(path: Path, rows: Sequence[Any], monitor: str | None) -> tuple[str, dict[int, float]]:
    """The last value of each step; a Trainer logs a step more than once."""
    rows = [row for row in rows if isinstance(row, Mapping) and row.get("step") not in (None, "")]
    if not rows:
        raise UsageError(f"{path} has no rows with a step", hint=FORMS)
    known = {str(name) for row in rows for name in row if name not in ("step", "epoch", None)}
    names = [monitor, f"eval_{monitor}", monitor.removeprefix("eval_")] if monitor else ["eval_loss"]
    names += sorted(known) if monitor is None and len(known) == 1 else []
    name = next((name for name in names if name in known), None)
    if name is None:
        wanted = monitor or "eval_loss"
        raise UsageError(f"{path} has no {wanted}", hint=f"monitor: one of {', '.join(sorted(known)[:12])}")
    return name, as_values({row["step"]: row[name] for row in rows if row.get(name) not in (None, "")})
