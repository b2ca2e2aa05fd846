"""When a save is due, and when the time limit is near: pure decisions."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lastgood
from lastgood import deadline
from lastgood.deadline import END, RESERVE, SLURM, Deadline, Pace, find, near
from lastgood.errors import UsageError
from lastgood.triggers import Last, Triggers, due, seconds


def play(triggers: Triggers, steps: list[int], pace: float = 1.0, per_epoch: int = 10) -> list[int]:
    """The steps at which a loop that reports these steps saves."""
    last, saved = Last(0, 0.0), []
    for step in steps:
        now, epoch = step * pace, step / per_epoch
        if due(triggers, step=step, now=now, last=last, epoch=epoch):
            last = Last(step, now, epoch)
            saved.append(step)
    return saved


def test_each_trigger_alone() -> None:
    every = list(range(1, 31))
    assert play(Triggers(save_steps=7), every) == [7, 14, 21, 28]
    assert play(Triggers(save_seconds=9.0), every) == [9, 18, 27]
    assert play(Triggers(save_epochs=1), every) == [10, 20, 30]
    assert play(Triggers(save_epochs=0.5), every) == [5, 10, 15, 20, 25, 30]
    assert play(Triggers(), every) == []
    assert play(Triggers(save_epochs=1), every, per_epoch=3) == list(range(3, 31, 3)), "thirds add up to an epoch"


@given(st.integers(1, 50), st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_a_loop_that_reports_every_so_often_never_loses_a_save(every: int, gaps: list[int]) -> None:
    steps = [sum(gaps[: n + 1]) for n in range(len(gaps))]
    saved = play(Triggers(save_steps=every), steps)
    crossed = [s for before, s in zip([0, *steps], steps, strict=False) if s // every > before // every]
    assert saved == crossed


@given(st.integers(0, 100), st.integers(0, 100), st.floats(0, 1e6), st.floats(0, 1e6))
def test_reasons_say_all_that_holds_and_a_saved_step_is_not_saved_again(
    step: int, before: int, now: float, then: float
) -> None:
    triggers = Triggers(save_steps=5, save_seconds=60)
    reasons = due(triggers, step=step, now=now, last=Last(before, then), asked=("SIGUSR1",))
    if step <= before:
        assert reasons == ()
    else:
        assert ("every 5 steps" in reasons) == (step // 5 > before // 5)
        assert any("since the last save" in reason for reason in reasons) == (now - then >= 60)
        assert reasons[-1] == "SIGUSR1"


def test_times_as_people_write_them() -> None:
    assert [seconds("save_seconds", text) for text in ("30m", "3h30m", "1d12h", "90s", "1.5h", "500ms", 20, None)] == [
        1800, 12600, 129600, 90, 5400, 0.5, 20, None,
    ]  # fmt: skip
    assert Triggers.of(save_seconds="30m", time_limit=math.inf) == Triggers(save_seconds=1800, time_limit=math.inf)


@pytest.mark.parametrize(
    "wrong",
    [
        {"save_seconds": "30"}, {"save_seconds": "soon"}, {"save_seconds": 0}, {"save_seconds": math.inf},
        {"save_seconds": True}, {"save_seconds": "1h-3m"}, {"time_limit": -1}, {"time_limit": math.nan},
        {"time_limit": ""}, {"save_steps": 0}, {"save_steps": 2.5}, {"save_epochs": 0}, {"save_epochs": math.nan},
    ],
)  # fmt: skip
def test_a_wrong_trigger_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Triggers.of(**wrong)


@pytest.mark.parametrize("wrong", [{"save_seconds": "30"}, {"time_limit": 0}, {"guard": "on"}])
def test_manage_refuses_them_when_they_are_given(wrong: dict[str, Any], tmp_path: Any) -> None:
    from training import Case

    with pytest.raises(lastgood.UsageError, match=next(iter(wrong))):
        lastgood.manage(Case("wrong").trainer(tmp_path), **wrong)


@given(st.floats(0, 1e5), st.floats(0, 1e4), st.floats(0, 1e4))
def test_near_leaves_room_for_one_more_step_and_its_save(left: float, step: float, save: float) -> None:
    said = near(1000.0, 1000.0 + left, step, save)
    if not said:
        assert left + 1e-6 >= step + save + RESERVE
    if left < RESERVE - 1e-6:
        assert said
    assert near(1000.0, 999.0, step, save) == "the time limit is over"


def test_the_pace_is_that_of_the_longest_of_the_last() -> None:
    pace = Pace()
    pace.steps.extend([1.0] * 30)
    pace.saves.append(10.0)
    assert pace.near(None, 0.0) == ""
    end = Deadline(1000.0, "test")
    assert not pace.near(end, 1000 - RESERVE - 22.5)
    assert "10 s" in pace.near(end, 1000 - RESERVE - 21.5)
    pace.steps.append(100.0)
    assert pace.near(end, 1000 - RESERVE - 210)


def test_whose_limit_counts() -> None:
    at = {"age": 50.0, "now": 1000.0, "wall": 1e9}
    slurm = {SLURM: "1000003600"}
    assert find(600, slurm, **at) == Deadline(1550.0, "time_limit=10m"), (
        "the user's word, from the start of the process"
    )
    assert find(None, {}, **at) is None
    both = find(None, {**slurm, END: "1000000600"}, **at)
    assert both is not None and both.end == 1600.0 and "run" in both.source, "the nearer one"
    for nothing in ("", "NONE", "0", "-1", "nan", "4294967294000", "1e400", "999999999"):
        assert find(None, {SLURM: nothing}, **at) is None, nothing
    assert find(math.inf, slurm, **at) is None


def test_this_process_has_an_age() -> None:
    first = deadline.process_age()
    assert 0 < first < 86400
    time.sleep(0.05)
    assert deadline.process_age() > first
