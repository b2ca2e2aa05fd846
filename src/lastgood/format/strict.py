"""JSON as the specification has it: Python's parser lets NaN through, and silently takes one of two equal keys."""

from __future__ import annotations

import json
from typing import Any

from lastgood.garbage import uncollected


@uncollected()
def loads(data: bytes | str) -> Any:
    """Raises ValueError for text that isn't JSON, for a key that comes twice, and for NaN and infinity."""
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key comes twice")
    return result


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")
