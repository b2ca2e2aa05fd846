"""save_steps="auto": how many steps lie between two saves, decided from what steps and saves take."""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lastgood
import loops
from lastgood.errors import UsageError
from lastgood.frequency import daly
from lastgood.interval import MOST, Interval, choose
from lastgood.repo import journal
from lastgood.tempo import FIRST_SECONDS, FIRST_STEPS, Tempo, told
from lastgood.triggers import Triggers

import forked

STEP = st.floats(1e-4, 1e3)
COST = st.floats(0, 1e4)
ANY = st.floats(0, 1.7e308)


@st.composite
def wishes(draw: st.DrawFn) -> Interval:
    longest = draw(st.floats(1e-3, 1e9))
    if draw(st.booleans()):
        return Interval(mtbf=draw(st.floats(1, 1e9)), longest=longest)
    return Interval(overhead=draw(st.floats(1e-6, 0.999)), longest=longest)


@settings(deadline=None)
@given(wishes(), STEP, COST, COST)
def test_the_interval_keeps_what_it_promises_or_says_what_was_in_the_way(
    wanted: Interval, step: float, cost: float, behind: float
) -> None:
    choice = choose(wanted, step=step, cost=cost, behind=behind)
    assert choice.steps >= 1
    assert f"{choice.step:.2g}" in choice.reason or choice.step >= 100
    most = max(1, math.floor(wanted.patience / step))
    if choice.bound != "writing":
        assert choice.steps <= most, "a recovery point is never further away than that"
    assert choice.steps * step >= behind * (1 - 1e-9) or choice.steps >= behind / step - 1, "never behind the writer"
    if wanted.overhead is not None and choice.bound in ("overhead", "step"):
        assert choice.share <= wanted.overhead * (1 + 1e-9)
    if choice.bound == "overhead":
        tighter = cost / ((choice.steps - 1) * step + cost)
        assert choice.steps == 1 or tighter > (wanted.overhead or 0) * (1 - 1e-9), "and as often as that allows"
    if choice.bound == "mtbf":
        assert isinstance(wanted.mtbf, float)
        assert abs(choice.steps - daly(cost, wanted.mtbf) / step) <= 0.5 + 1e-6 * choice.steps


@settings(deadline=None)
@given(wishes(), STEP, COST, COST, st.floats(0, 1e3), st.floats(0, 1e3))
def test_what_costs_more_is_done_no_more_often(
    wanted: Interval, step: float, cost: float, behind: float, more: float, longer: float
) -> None:
    first = choose(wanted, step=step, cost=cost, behind=behind)
    assert choose(wanted, step=step, cost=cost + more, behind=behind + longer).steps >= first.steps
    assert choose(wanted, step=step + longer, cost=cost, behind=behind).steps <= first.steps


@settings(deadline=None)
@given(wishes(), ANY, ANY, ANY)
def test_no_time_is_too_short_or_too_long(wanted: Interval, step: float, cost: float, behind: float) -> None:
    choice = choose(wanted, step=step, cost=cost, behind=behind)
    assert 1 <= choice.steps <= MOST and 0 <= choice.share <= 1
    assert str(choice.steps) and choice.reason
    json.dumps(told(choice), allow_nan=False)


def test_known_values() -> None:
    assert choose(Interval(), step=1.0, cost=1.0, behind=0).steps == 49, "1 second in 50"
    assert choose(Interval(overhead=0.01), step=0.5, cost=1.0, behind=0).steps == 198
    assert choose(Interval(), step=0.0, cost=0.0, behind=0).steps == 1
    assert choose(Interval(), step=1.0, cost=0.0, behind=30.0).bound == "writing"
    assert choose(Interval(), step=1.0, cost=600.0, behind=0).steps == 1800, "half an hour, whatever it takes"
    day = choose(Interval(mtbf="1d"), step=1.0, cost=2.0, behind=0)
    assert day.steps == pytest.approx(math.sqrt(2 * 2 * 86400), rel=0.01) and day.bound == "mtbf"
    assert choose(Interval(overhead=0.5), step=60.0, cost=1.0, behind=0).bound == "step"


@pytest.mark.parametrize("wrong", [(-1.0, 0, 0), (1.0, math.nan, 0), (1.0, 0, math.inf)])
def test_times_that_no_run_has_are_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="seconds"):
        choose(Interval(), step=wrong[0], cost=wrong[1], behind=wrong[2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"overhead": 0}, {"overhead": 1}, {"overhead": 2}, {"overhead": True}, {"overhead": math.nan}, {"mtbf": 0},
        {"mtbf": "often"}, {"mtbf": math.inf}, {"longest": 0}, {"longest": None}, {"longest": "30"}, {"longest": -5.0},
        {"overhead": 0.1, "mtbf": "1d"},
    ],
)  # fmt: skip
def test_a_wrong_wish_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"Interval\\({next(iter(wrong))}"):
        Interval(**wrong)


@pytest.mark.parametrize("wrong", ["often", "500", 0, 2.5, True, [5]])
def test_wrong_save_steps_are_named(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save_steps"):
        Triggers.of(save_steps=wrong)
    with pytest.raises(UsageError, match="save_steps"):
        lastgood.CheckpointManager(tmp_path, model=loops.Net(), save_steps=wrong)


# ---- measuring -------------------------------------------------------------------------------


def play(
    tempo: Tempo, steps: int, *, step: float, stall: float, slowed: float = 0.0, writing: int = 0, begin: int = 0
) -> list[int]:
    """The steps at which a loop saves: each save holds it for `stall`, and slows down the `writing` steps behind it."""
    now, last, at, busy, saved = 0.0, 0.0, begin, 0, []
    for number in range(begin + 1, begin + steps + 1):
        taken = step + (slowed if busy else 0.0)
        now += taken
        busy = max(0, busy - 1)
        tempo.stepped(taken, 1, now, busy=busy > 0)
        if tempo.due(number - at, now - last):
            now += stall
            busy = writing
            tempo.spent(stall, now, busy=busy > 0)
            saved.append(number)
            at, last = number, now
    return saved


def test_a_save_tells_what_one_takes_and_the_rest_is_paced_by_it() -> None:
    saved = play(Tempo(Interval()), 300, step=0.1, stall=0.2)
    assert saved[0] == FIRST_STEPS
    assert {b - a for a, b in itertools.pairwise(saved)} == {98}, "0.2 of every 10 seconds"
    assert play(Tempo(Interval()), 3, step=70.0, stall=1.0)[0] == 1, f"nobody waits for more than {FIRST_SECONDS} s"
    assert not play(Tempo(None), 300, step=0.1, stall=0.2), "nobody asked"


def test_what_the_writer_takes_from_training_counts() -> None:
    tempo = Tempo(Interval())
    saved = play(tempo, 2000, step=0.1, stall=0.01, slowed=0.05, writing=8)
    assert tempo.choice is not None
    assert tempo.choice.cost == pytest.approx(0.01 + 8 * 0.05)
    gaps = [b - a for a, b in itertools.pairwise(saved)]
    assert gaps[-1] == pytest.approx(0.98 / 0.02 * 0.41 / 0.1, abs=1)
    lost = (len(gaps) - 1) * 0.41 / ((saved[-1] - saved[1]) * 0.1)
    assert lost <= 0.0205


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 10), st.floats(0.001, 5), st.floats(0.02, 0.5), st.integers(0, 20), st.floats(0, 0.5))
def test_the_budget_holds_for_the_whole_run(
    step: float, stall: float, overhead: float, writing: int, slowed: float
) -> None:
    """But for the first two saves, which are there to measure."""
    tempo = Tempo(Interval(overhead=overhead, longest=1e9))
    count = 3000
    saved = play(tempo, count, step=step, stall=stall, slowed=slowed * step, writing=writing)
    assume(len(saved) > 3)
    cost = stall + slowed * step * writing
    training = (saved[-1] - saved[1]) * step
    assert cost * (len(saved) - 2) <= 1.12 * overhead / (1 - overhead) * training + 1e-9
    assert min(b - a for a, b in itertools.pairwise(saved)) >= 1


def test_the_first_save_counts_only_until_there_are_others() -> None:
    tempo = Tempo(Interval())
    for number in range(1, 60):
        tempo.stepped(1.0, 1, float(number), busy=False)
        if number in (10, 20, 30):
            tempo.spent(60.0 if number == 10 else 1.0, number + 0.5, busy=False)
    assert tempo.choice is not None and tempo.choice.steps == 49


def test_a_recovery_point_comes_by_the_clock_too() -> None:
    """Steps that become slow beyond all measure."""
    tempo = Tempo(Interval(longest=100.0))
    play(tempo, 40, step=0.1, stall=1.0)
    assert tempo.choice is not None and tempo.choice.steps > 400
    assert not tempo.due(3, 99.0)
    assert tempo.due(4, 100.0)


def test_it_goes_on_from_what_the_run_measured_last() -> None:
    tempo = Tempo(Interval())
    play(tempo, 300, step=0.1, stall=0.2)
    assert tempo.choice is not None
    line = {"event": "interval", **json.loads(json.dumps(told(tempo.choice)))}
    resumed = Tempo(Interval())
    assert resumed.begin([{"event": "started"}, {"event": "interval"}, line, {"event": "resumed"}]) == tempo.choice
    assert play(resumed, 150, step=0.1, stall=0.2, begin=300) == [398]
    assert Tempo(Interval()).begin([line, {"event": "started"}]) is None, "of another run"
    assert Tempo(None).begin([line]) is None
    half = Tempo(Interval(overhead=0.01)).begin([line])
    assert half is not None and half.steps == 198, "the wish is today's"


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["step_seconds", "save_seconds", "behind_seconds", "every"]),
        st.one_of(st.none(), st.just("1.5"), st.just([1]), st.booleans(), st.floats(), st.integers()),
    )
)
def test_a_journal_may_say_anything(fields: dict[str, Any]) -> None:
    choice = Tempo(Interval()).begin([{"event": "interval", **fields}])
    assert choice is None or 1 <= choice.steps <= MOST


# ---- in a loop and a Trainer -----------------------------------------------------------------


def lines(root: Path) -> list[dict[str, Any]]:
    return [event for event in journal.read(root) if event["event"] == "interval"]


@pytest.mark.parametrize("background", [False, True])
def test_a_loop_saves_by_it_and_writes_down_why(background: bool, tmp_path: Path) -> None:
    """Whatever the machine takes for a step: the interval in the journal is the one that was kept."""
    recipe = loops.simple(loops.Net())
    wanted = Interval(overhead=0.9, longest="1h")

    def go(until: int) -> int:
        made = lastgood.CheckpointManager(tmp_path, save_steps=wanted, background=background, **recipe.parts)
        with made as ckpt:
            begin = ckpt.restore()
            for number in range(begin, until):
                recipe.step(number)
                ckpt.step(number + 1)
                ckpt.settle()
        return begin

    assert go(40) == 0
    events = lines(tmp_path)
    assert events[0]["step"] <= FIRST_STEPS + 1
    for event in events:
        again = choose(wanted, step=event["step_seconds"], cost=event["save_seconds"], behind=event["behind_seconds"])
        assert again.steps == pytest.approx(event["every"], abs=1)
        assert event["reason"].startswith("a step takes")
    saved = [event["step"] for event in journal.read(tmp_path) if event["event"] == "saved"]
    assert saved[0] <= FIRST_STEPS and saved[-1] == 40
    assert go(41) == 40


def test_when_it_saves_changes_neither_the_training_nor_a_resume(tmp_path: Path) -> None:
    """Killed between two saves that nobody planned, it ends where a run without any saves ends."""
    whole = loops.train("a loader", tmp_path / "whole", None, total=20, every=1000)
    log, result = tmp_path / "log", tmp_path / "result"
    options = {"total": 20, "every": "auto", "background": False}
    assert forked.run(loops.train, "a loader", tmp_path / "run", None, kill=14, log=log, **options) == -signal.SIGKILL
    assert lines(tmp_path / "run"), "it had measured a save"
    assert forked.run(loops.train, "a loader", tmp_path / "run", result, log=log, **options) == 0, log.read_text()
    assert result.read_text() == repr(whole)


def trained(out: Path, **args: Any) -> Any:
    from training import Case

    case = Case("auto", args={"max_steps": 14, "save_total_limit": None, "save_steps": 500, **args})
    trainer = lastgood.manage(case.trainer(out), save_steps="auto")
    trainer.train()
    return trainer


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_trainer_saves_by_it_and_at_its_end(strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lastgood")
    trained(tmp_path, save_strategy=strategy)
    assert "CKB007" not in caplog.text, "it does save"
    assert caplog.text.count("(save_steps='auto'): a step takes") == 1, "said once"
    events = lines(tmp_path)
    assert events and events[0]["step"] <= FIRST_STEPS + 1
    saved = [event["step"] for event in journal.read(tmp_path) if event["event"] == "saved"]
    assert saved[0] <= FIRST_STEPS and saved[-1] == 14


@pytest.mark.parametrize(
    ("args", "option", "match"),
    [
        ({"save_steps": 7}, "auto", "both say"),
        ({"save_steps": 7}, Interval(mtbf="1d"), "both say"),
        ({"save_steps": 500, "eval_steps": 500, "load_best_model_at_end": True}, "auto", "every evaluation"),
        ({"save_steps": 500}, 100, "belongs to the Trainer"),
        ({"save_steps": 500}, "often", "save_steps"),
    ],
)
def test_two_schedules_of_a_trainer_are_refused(args: dict[str, Any], option: Any, match: str, tmp_path: Path) -> None:
    from training import Case

    trainer = Case("auto", args={"save_total_limit": None, **args}, evaluate=True).trainer(tmp_path)
    with pytest.raises(UsageError, match=match):
        lastgood.manage(trainer, save_steps=option)
