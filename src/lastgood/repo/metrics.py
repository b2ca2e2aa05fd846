"""Values for a checkpoint. They may arrive long after the save and from another process, so they lie beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lastgood.model import finite
from lastgood.repo.journal import lines
from lastgood.repo.layout import HIDDEN, hidden
from lastgood.store import local

LIMIT = 16 << 20
"""Largest file of metrics that is read (16 MiB)."""

_ID = re.compile(r"[0-9a-f]{16}")


def record(root: Path, id: str, step: int, values: Mapping[str, object]) -> None:
    """Add metrics to the checkpoint with this id, durably. Raises OSError."""
    plain = {name: _plain(value) for name, value in values.items()}
    local.make_dirs(hidden(root, "metrics"))
    line = json.dumps({"step": step, "metrics": plain}, allow_nan=False)
    local.append(hidden(root, "metrics", f"{id}.jsonl"), f"{line}\n".encode(), sync=True)
    with suppress(OSError):  # a second value in a file that is there would go unseen by remembered listings
        local.touch(hidden(root, "metrics"))


def read(root: Path, id: str) -> dict[str, float]:
    """name -> value, the latest of each; NaN and infinity are kept as such (and rank nowhere)."""
    if not _ID.fullmatch(id):
        return {}
    found: dict[str, float] = {}
    for line in lines(f"{root}/{HIDDEN}/metrics/{id}.jsonl", LIMIT):
        values = line.get("metrics")
        for name, value in values.items() if isinstance(values, dict) else ():
            if value in ("nan", "inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                found[name] = float(value)
    return found


def _plain(value: object) -> object:
    if hasattr(value, "item"):  # numpy scalars and 0-dim tensors
        value = value.item()
    if finite(value) is not None:
        return value
    return str(float(value)) if isinstance(value, float) else str(value)
