"""When the disk will be full, from what was saved so far. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from lastgood.policy import Keep


@dataclass(frozen=True, slots=True)
class Forecast:
    """saves: how many more fit; seconds: until then, at the pace of the last saves; None where nothing is known."""

    saves: int | None
    seconds: float | None
    text: str


def forecast(saves: Sequence[tuple[float, int]], keep: Keep | None, *, free: int, reserve: int) -> Forecast:
    """saves: (seconds since 1970, bytes) of the last ones, oldest first. free, reserve: bytes."""
    if not saves:
        return Forecast(None, None, "no save yet to reckon with")
    size = max(bytes for _, bytes in saves[-5:])
    fits = max(0, free - reserve) // max(1, size)
    if keep is not None and not keep.unlimited and keep.every is None:
        if fits < 1:
            return Forecast(0, 0.0, "the next save doesn't fit: a new one is written before an old one goes")
        return Forecast(None, None, "never at this policy: every save lets an older one go")
    last = saves[-11:]
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(last)]
    pace = median(gaps) if gaps else None
    seconds = None if pace is None or pace < 0 else fits * pace
    return Forecast(fits, seconds, f"{fits} more saves fit")
