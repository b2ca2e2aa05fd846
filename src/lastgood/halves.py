"""The search of `lastgood bisect`: from good to bad in a row, by halves. Pure but for the test that is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

T = TypeVar("T")
Verdict = Literal["good", "bad", "skipped"]


def search(order: Sequence[T], test: Callable[[T], Verdict]) -> tuple[int, int]:
    """(place of the last one known to be good, place of the first known to be bad after it) in `order`, oldest first.

    -1: none is good; len(order): none is bad. Everything after a bad one is taken for bad, everything before a good one
    for good; between the two may stand what can't be told. Each is tested once at the most.
    """
    good, bad = -1, len(order)
    skipped: set[int] = set()

    def ask(place: int) -> None:
        nonlocal good, bad
        verdict = test(order[place])
        if verdict == "good":
            good = place
        elif verdict == "bad":
            bad = place
        else:
            skipped.add(place)

    if order:
        ask(len(order) - 1)  # mostly the end is what somebody doubts; if it is good, nothing is to be searched
    while True:
        left = [place for place in range(good + 1, bad) if place not in skipped]
        if not left or (good == len(order) - 1):
            return good, bad
        ask(left[len(left) // 2])
