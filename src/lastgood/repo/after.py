"""What an evaluation changed after the save of the same step: random states, the log, a plateau scheduler.

A managed resume evaluates again and needs none of it, except that of a run that is complete. A stock Trainer saves
after its evaluation: to give it a checkpoint as it would have written it, this is put on top.
Written without fsync: losing it loses no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lastgood.repo.layout import hidden
from lastgood.store import local

LIMIT = 256 << 20


def write(root: Path, id: str, state: Mapping[str, Any]) -> None:
    """Remember it for the checkpoint with this id; on a full disk it is left out."""
    with suppress(OSError):
        local.make_dirs(hidden(root, "metrics"))
        remove(root, id)
        local.write(_path(root, id), [json.dumps(state, allow_nan=False).encode()], sync=False)


def read(root: Path, id: str) -> dict[str, Any] | None:
    """None if there is none, or it was torn by a crash."""
    try:
        value = json.loads(local.read(_path(root, id), LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.get("format") == 1 else None


def remove(root: Path, id: str) -> None:
    """Goes with its checkpoint."""
    if id:
        local.unlink(_path(root, id))


def _path(root: Path, id: str) -> Path:
    return hidden(root, "metrics", f"{id}.after.json")
