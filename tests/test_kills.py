"""SIGKILL at random moments of a training behind each front door: it ends as if nothing had happened (a sample)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from demo.doors import DOORS
from demo.kills import campaign
from demo.lives import Forked, imports


@pytest.mark.parametrize("door", DOORS)
def test_I1_I4_killed_anywhere_it_ends_the_same(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of the test runner
    tally = campaign(door, tmp_path, 3, start=Forked, steps=12)
    assert not tally.faults
    assert tally.kills == 3
    assert tally.identical == tally.runs
