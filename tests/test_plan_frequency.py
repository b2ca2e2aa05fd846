"""How often to save: the formulas against the exact optimum and against runs that fail at random."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood.errors import UsageError
from lastgood.frequency import daly, expected_time, for_overhead, lost_per_failure, waste, young

MTBF = st.floats(60, 1e7)
RATIO = st.floats(1e-9, 20)  # cost / mtbf


def best_interval(cost: float, mtbf: float) -> float:
    """Where expected_time is least, by golden section: it falls, then rises."""
    low, high, golden = mtbf * 1e-6, mtbf * 2, (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if expected_time(1, left, cost, mtbf) < expected_time(1, right, cost, mtbf):
            high = right
        else:
            low = left
    return low


@given(MTBF, RATIO)
def test_dalys_interval_is_the_optimum(mtbf: float, ratio: float) -> None:
    cost = ratio * mtbf
    best = best_interval(cost, mtbf)
    assert daly(cost, mtbf) == pytest.approx(best, rel=0.07)
    if ratio < 0.1:
        assert daly(cost, mtbf) == pytest.approx(best, rel=0.001)
    least = expected_time(1, best, cost, mtbf)
    assert least * (1 - 1e-9) <= expected_time(1, daly(cost, mtbf), cost, mtbf) <= least * 1.002


@given(MTBF, RATIO)
def test_a_restart_costs_time_but_moves_no_optimum(mtbf: float, ratio: float) -> None:
    cost = ratio * mtbf
    best = best_interval(cost, mtbf)
    quick, slow = (expected_time(1, best, cost, mtbf, restart) for restart in (0.0, mtbf))
    assert slow == pytest.approx(quick * math.e)
    assert all(expected_time(1, best * k, cost, mtbf, mtbf) >= slow * (1 - 1e-9) for k in (0.9, 1.1))


@given(MTBF, st.floats(1e-9, 1e-4))
def test_where_failures_are_rare_young_and_daly_agree(mtbf: float, ratio: float) -> None:
    cost = ratio * mtbf
    assert daly(cost, mtbf) == pytest.approx(young(cost, mtbf), rel=1.1 * math.sqrt(ratio))
    assert young(cost, mtbf) == pytest.approx(math.sqrt(2 * cost * mtbf))


def test_known_values() -> None:
    """A save of 2 minutes, a failure a day."""
    assert young(120, 86_400) == pytest.approx(4553.7, abs=0.1)
    assert daly(120, 86_400) == pytest.approx(4474.1, abs=0.1)
    assert daly(200_000, 86_400) == 86_400
    assert daly(0, 86_400) == young(0, 86_400) == 0
    assert waste(daly(120, 86_400), 120, 86_400) == pytest.approx(0.05179, abs=0.00001)
    assert expected_time(1000, 1e9, 1, 60) == math.inf
    assert waste(1e9, 1, 60) == 1


def simulated(chance: random.Random, saves: int, interval: float, cost: float, mtbf: float, restart: float) -> Any:
    """Wall time of a run of so many saves, and what each failure threw away, event by event."""
    clock, fails, lost = 0.0, chance.expovariate(1 / mtbf), []
    for _ in range(saves):
        start = clock
        while fails < start + interval + cost:
            lost.append(fails - start)
            clock, fails = fails, fails + chance.expovariate(1 / mtbf)
            while fails < clock + restart:  # a restart can fail as well
                clock, fails = fails, fails + chance.expovariate(1 / mtbf)
            start = clock + restart
        clock = start + interval + cost
    return clock, lost


@pytest.mark.parametrize("cost", [10.0, 120.0, 900.0])
@pytest.mark.parametrize("restart", [0.0, 300.0])
def test_runs_that_fail_at_random_take_as_long_as_expected(cost: float, restart: float) -> None:
    chance, mtbf, saves = random.Random(20), 3600.0, 30_000
    times = {}
    for factor in (0.4, 1.0, 2.5):
        interval = factor * daly(cost, mtbf)
        wall, lost = simulated(chance, saves, interval, cost, mtbf, restart)
        assert wall == pytest.approx(expected_time(saves * interval, interval, cost, mtbf, restart), rel=0.02)
        assert 1 - saves * interval / wall == pytest.approx(waste(interval, cost, mtbf, restart), abs=0.01)
        assert sum(lost) / len(lost) == pytest.approx(lost_per_failure(interval, cost, mtbf), rel=0.04)
        times[factor] = wall / (saves * interval)
    assert min(times, key=times.__getitem__) == 1.0


@given(st.floats(1e-6, 1e6), MTBF)
def test_a_failure_throws_away_at_most_half_of_what_lies_between_saves(interval: float, mtbf: float) -> None:
    lost = lost_per_failure(interval, 0, mtbf)
    assert 0 < lost <= interval / 2
    assert lost <= mtbf
    exact = mtbf - interval / math.expm1(interval / mtbf) if interval / mtbf < 700 else mtbf
    if interval / mtbf > 1e-6:
        assert lost == pytest.approx(exact, rel=1e-6)


@given(st.floats(0.001, 1e6), st.floats(1e-6, 1))
def test_saves_take_the_share_that_was_allowed(cost: float, share: float) -> None:
    interval = for_overhead(cost, share)
    assert interval >= 0
    assert cost / (interval + cost) == pytest.approx(share, rel=1e-9)


def test_a_save_of_a_minute_for_five_percent() -> None:
    assert for_overhead(60, 0.05) == pytest.approx(19 * 60)
    assert for_overhead(60, 1) == 0


@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        (young, (-1, 60)),
        (young, (1, 0)),
        (young, (1, math.inf)),
        (daly, (math.nan, 60)),
        (expected_time, (10, 0, 1, 60)),
        (expected_time, (10, 5, 1, 60, -1)),
        (lost_per_failure, (0, 1, 60)),
        (for_overhead, (1, 0)),
        (for_overhead, (1, 1.5)),
    ],
)
def test_numbers_that_no_run_has(function: Any, numbers: tuple[float, ...]) -> None:
    with pytest.raises(UsageError):
        function(*numbers)
