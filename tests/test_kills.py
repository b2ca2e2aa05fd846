"""SIGKILL at random moments of a training behind each front door: it ends as if nothing had happened (a sample)."""

from __future__ import annotations

import logging
import os
import signal
import time
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


@pytest.mark.parametrize("door", DOORS)
def test_a_run_that_is_complete_ends_the_same_when_it_is_launched_again(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the last save and the end."""
    imports()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    out, ends = tmp_path / "run", []
    for _ in range(2):
        life = Forked(door, out, 4)
        while life.poll() is None:
            time.sleep(0.01)
        assert life.poll() == 0, (tmp_path / "run.log").read_text()
        ends.append((tmp_path / "run.end").read_text())
    assert ends[0] == ends[1]


def test_who_is_killed_while_it_draws_a_progress_bar_holds_nobody_up() -> None:
    """It used to keep a lock that all forked trainings share: the next one waited for ever."""
    from tqdm import tqdm

    imports()
    pid = os.fork()
    if pid == 0:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert tqdm.get_lock().acquire(timeout=10)
    tqdm.get_lock().release()
