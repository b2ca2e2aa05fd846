"""Short sequences of operations, the last one cut short by a crash: a sample of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lastgood.errors import UsageError
from lastgood.testing import Fault

from faults.sequences import CRASHES, OPERATIONS, Case, Prepared, attempt, sequences

EVERY = 23
"""Each so-and-so-many-th sequence, at each seventh call: `python -m faults.sequences` tries all."""


@pytest.mark.parametrize("turn", range(EVERY // 2, len(sequences()), EVERY))
def test_I1_I3_I10_I13_a_crash_in_the_last_of_three(turn: int, quick: Path) -> None:
    names = sequences()[turn]
    prepared = Prepared(quick, names)
    for point in range(1 + turn % 7, prepared.play(None).calls + 1, 7):
        attempt(prepared, Case(names, Fault(point, CRASHES[(point + turn) % len(CRASHES)])))


def test_a_case_is_its_text() -> None:
    case = Case(("save", "prune", "undo"), Fault(17, "crash-torn"))
    assert Case.parse(str(case)) == case
    assert len(sequences()) == sum(len(OPERATIONS) ** length for length in (1, 2, 3))
    with pytest.raises(UsageError, match="isn't a fault"):
        Case.parse("save prune")
