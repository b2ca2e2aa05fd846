"""A digest inside the run's small files, so that a flipped bit is damage and not another truth.

Without it one bit makes a run out of another run's id, unpins a checkpoint, or moves a run to another branch, and the
file is as readable as before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

KEY = "digest"


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same with its digest."""
    return {**value, KEY: _digest(value)}


def unseal(value: dict[str, Any]) -> dict[str, Any]:
    """The same without; as it is where there never was one. Raises ValueError if the digest is of something else."""
    rest = {key: entry for key, entry in value.items() if key != KEY}
    if KEY in value and value[KEY] not in (_digest(rest), [_digest(rest)]):
        raise ValueError("its digest is that of another content")
    return rest


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode()).hexdigest(length=16)
