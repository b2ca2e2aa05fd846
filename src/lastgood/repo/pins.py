"""Names that hold a checkpoint: what is pinned or tagged is never deleted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lastgood.repo.layout import hidden
from lastgood.store import local

NAME = "pins.json"


def read(root: Path) -> dict[str, tuple[str, ...]]:
    """checkpoint id -> its names. Raises ValueError for a file that isn't readable: pins must not vanish silently."""
    try:
        data = local.read(hidden(root, NAME), 16 << 20)
    except FileNotFoundError:
        return {}
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"{hidden(root, NAME)} isn't valid")
    return {str(id): tuple(str(name) for name in names) for id, names in value.items()}


def write(root: Path, pins: Mapping[str, tuple[str, ...]]) -> None:
    """Replace all of them, durably."""
    text = json.dumps({id: list(names) for id, names in pins.items() if names}, indent=1)
    local.replace(hidden(root, NAME), f"{text}\n".encode())
