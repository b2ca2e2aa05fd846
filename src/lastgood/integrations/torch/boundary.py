"""The end of a step: the one moment at which the parts of a run fit together. Later, whether they still do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lastgood.errors import wrong_type
from lastgood.integrations.torch.exchange import Marked, Part
from lastgood.integrations.torch.module import Model
from lastgood.integrations.torch.stamp import Stamp
from lastgood.state import rng
from lastgood.state.rng import Rng

MOST_STEPS = 10**18
"""A step has at most 18 digits, in the name of its checkpoint."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """step: so many are complete. rng: the generators then. stamps: by part, None if unknown."""

    step: int
    rng: Rng
    stamps: Mapping[str, Stamp | None]

    @classmethod
    def here(cls, step: int, parts: Sequence[Part]) -> Boundary:
        """The loop is between two steps now; where it stands in its data is noted, too."""
        for part in parts:
            if isinstance(part, Marked):
                part.mark()
        return cls(step, rng.capture(), {part.name: part.stamp() for part in parts})

    def moved(self, parts: Sequence[Part], *, sure: bool) -> list[str]:
        """Names of the parts that changed since; sure: also of those of which nobody can tell.

        Random numbers that were drawn and batches that were fetched are known from the boundary itself.
        """
        now = {part.name: part.stamp() for part in parts}
        replaced = {part.name for part in parts if isinstance(part, Model) and part.replaced()}
        return [
            name
            for name, before in self.stamps.items()
            if name in replaced or (sure if before is None or now[name] is None else now[name] != before)
        ]


def counted(step: Any) -> int:
    """Of whatever library an integer is."""
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise wrong_type("step", step, "the number of steps that are complete")
    return int(step.__index__())
