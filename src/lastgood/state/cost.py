"""What a resume in the middle of an epoch costs, and what becomes of that epoch if the loader is another one now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lastgood.report import Change
from lastgood.state.tree import JSON
from lastgood.state.way import Way
from lastgood.units import span


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a resume from a mark costs before its first batch.

    how: "nothing", "indices" (they are drawn, no sample is loaded) or "replay" (batches are loaded and dropped).
    seconds: batches times the mean time that the loop has waited for one so far; None if it wasn't measured. With
    worker processes the loop waits less than a replay does, because they load while it trains.
    why: of a replay. doubt: why the resumed run could see other batches; "" if it can't.
    """

    how: str
    batches: int = 0
    seconds: float | None = None
    why: str = ""
    doubt: str = ""

    def __str__(self) -> str:
        if self.how == "nothing":
            return "nothing to skip"
        if self.how == "indices":
            return f"{self.batches} batches are skipped by their indices, no sample is loaded"
        time = "" if self.seconds is None else f", about {span(self.seconds)}"
        return f"{self.batches} batches are loaded again{time}: {self.why}"


def target(value: JSON, now: Mapping[str, int | None], way: Way) -> tuple[int, bool]:
    """(batches to skip, whether the order of the epoch still holds) for the loader as it is `now`.

    With another batch size the same samples are skipped, rounded down to whole batches.
    """
    saved, consumed = value["facts"], int(value["consumed"])
    old, new = saved.get("batch_size"), now["batch_size"]
    if any(saved.get(name) != now.get(name) for name in ("samples", "batches")) or (old is None) != (new is None):
        return 0, False
    if old == new or not old or not new:
        return consumed, True
    return consumed * old // new, way.how in ("indices", "replay")


def changes(value: JSON, now: Mapping[str, int | None], way: Way) -> list[Change]:
    """What is different now, and what that does to the epoch that was under way."""
    consumed, fits = target(value, now, way)
    found = []
    for name, number in value["facts"].items():
        if number == now.get(name):
            continue
        if name == "num_workers":
            effect = "random draws in them are others" if way.how == "replay" else "the batches are the same"
        elif not value["here"]:
            effect = "from the next epoch on"
        elif fits:
            effect = f"the epoch goes on behind batch {consumed} of the new size"
        else:
            effect = "the epoch under way begins again"
        found.append(Change(what=f"{way.kind}, {name}", saved=number, now=now.get(name), effect=effect))
    return found
