"""The history of a run, one JSON line per event. Not authoritative: losing it loses no checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from lastgood.repo.layout import hidden
from lastgood.store import local

NAME = "journal.jsonl"
LIMIT = 256 << 20
"""Largest journal that is read (256 MiB)."""


def append(root: Path, event: str, **fields: Any) -> None:
    """Add a line. On a full or broken disk the history has a gap and the run goes on."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str)
    try:
        local.append(hidden(root, NAME), f"{line}\n".encode(), sync=False)
    except OSError:
        return


def read(root: Path) -> list[dict[str, Any]]:
    """All events, oldest first; a line that a crash tore is left out."""
    return lines(hidden(root, NAME), LIMIT)


def lines(path: Path | str, limit: int, *, sure: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line; [] if it can't be read. sure: see `records`."""
    try:
        data = local.read(path, limit)
    except OSError as error:
        if sure and local.passing(error):
            raise
        return []
    except ValueError:
        return []
    return parsed(data.split(b"\n"))


def parsed(some: Iterable[bytes]) -> list[dict[str, Any]]:
    """Those of the lines that are JSON objects."""
    found = []
    for line in some:
        try:
            value = msgspec.json.decode(line) if line else None
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
