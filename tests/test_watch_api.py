"""`lastgood.watch`: an evaluation process that follows a run, both of them real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lastgood
from lastgood.errors import NoCheckpoint, UsageError
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import journal, leases
from lastgood.repo.read import records
from test_leases import hold, saved, stage, steps

import forked

SLOW = 120.0


def until(true: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SLOW
    while time.monotonic() < deadline:
        found = true()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what} never happened")


def train(root: Path, keep: Keep, last: int, wait_for: int = 0, event: str = "finished") -> None:
    """Saves steps 1 to `last`; from step `wait_for` on it waits until the one before was evaluated."""
    made = Manager(root=root, keep=keep, on_error="raise")
    made.open()
    made.begin_fresh()
    for step in range(1, last + 1):
        record = made.save(step, stage, estimate=1, environment={}, arguments={}, facts={})
        assert record is not None
        if wait_for and step >= wait_for:
            until(lambda id=record.id: "mmlu" in metrics_of(root, id), f"the evaluation of step {step}")
        made.retain()
    made.close(event)


def metrics_of(root: Path, id: str) -> dict[str, float]:
    from lastgood.repo import metrics

    return metrics.read(root, id)


def evaluate(root: Path, seen: Path, **options: Any) -> None:
    """Notes what it is given, and whether that is all there; records a value that is better the smaller the step."""
    for checkpoint in lastgood.watch(root, poll=0.01, **options):
        assert checkpoint.problems() == ()
        with seen.open("a") as file:
            file.write(f"{checkpoint.step}\n")
        checkpoint.record(mmlu=1 / checkpoint.step)


def listed(seen: Path) -> list[int]:
    return [int(line) for line in seen.read_text().splitlines()] if seen.exists() else []


def test_an_evaluator_that_starts_first_sees_every_checkpoint_and_decides_what_is_best(tmp_path: Path) -> None:
    root, seen, log = tmp_path / "runs" / "exp1", tmp_path / "seen", tmp_path / "log"
    evaluator = forked.start(evaluate, root, seen, log=log)
    keep = Keep(last=1, best=1, monitor="mmlu", mode="max")
    assert forked.run(train, root, keep, 6, wait_for=1, log=log) == 0, log.read_text()
    assert forked.wait(evaluator) == 0, log.read_text()
    assert listed(seen) == [1, 2, 3, 4, 5, 6]
    assert steps(root) == [1, 6], "the best, by what another process measured, and the newest"
    assert lastgood.open(root).best().step == 1
    assert os.listdir(root / ".lastgood" / "leases") == []


def test_an_evaluator_that_is_slower_than_the_run_holds_what_it_works_on(tmp_path: Path) -> None:
    root, log = tmp_path / "run", tmp_path / "log"
    trainer, seen, best = 0, [], 0
    made = saved(root, {1: None}, close=False)
    made.close("interrupted")
    for checkpoint in lastgood.watch(root, poll=0.01):
        seen.append(checkpoint.step)
        if not trainer:
            trainer = forked.start(resume, root, Keep(last=1), [2, 3, 4], log=log)
            assert forked.wait(trainer) == 0, log.read_text()
            assert steps(root) == [1, 4], "2 and 3 went, what is being evaluated stayed"
            assert checkpoint.load is not None and checkpoint.problems() == ()
        best = max(best, checkpoint.step)
    assert seen == [1, 4] and best == 4
    assert forked.run(resume, root, Keep(last=1), [5], log=log) == 0
    assert steps(root) == [5], "let go of"


def resume(root: Path, keep: Keep, more: list[int], back_to: int | None = None) -> None:
    made = Manager(root=root, keep=keep, on_error="raise")
    made.open()
    made.begin_from(made.find("last" if back_to is None else back_to).record)
    for step in more:
        made.save(step, stage, estimate=1, environment={}, arguments={}, facts={})
        made.retain()
    made.close("finished")


def killed_while_evaluating(root: Path, seen: Path) -> None:
    for checkpoint in lastgood.watch(root, poll=0.01, missing="mmlu", lease=leases.SHORTEST):
        with seen.open("a") as file:
            file.write(f"{checkpoint.step}\n")
        if checkpoint.step == 2:
            signal.pause()
        checkpoint.record(mmlu=1.0)


def test_I10_a_killed_evaluator_loses_its_lease_and_its_successor_goes_on_where_it_was(tmp_path: Path) -> None:
    root, seen, log = tmp_path / "run", tmp_path / "seen", tmp_path / "log"
    saved(root, {1: None, 2: None, 3: None})
    evaluator = forked.start(killed_while_evaluating, root, seen, log=log)
    until(lambda: listed(seen) == [1, 2], "the second evaluation")
    made = Manager(root=root, keep=Keep(last=1), on_error="raise")
    made.open()
    made.begin_from(made.find("last").record)
    made.retain()
    assert steps(root) == [2, 3]
    os.kill(evaluator, signal.SIGKILL)
    assert forked.wait(evaluator) == -signal.SIGKILL
    until(lambda: not leases.in_force(root), "its end")
    again = []
    made.close("finished")
    for checkpoint in lastgood.watch(root, poll=0.01, missing="mmlu"):
        again.append(checkpoint.step)
        checkpoint.record(mmlu=2.0)
    assert again == [2, 3]
    made.open()
    made.begin_from(made.find("last").record)
    made.retain()
    made.close()
    assert steps(root) == [3]


def test_the_newest_alone_where_there_is_no_time_for_all(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: None, 2: None, 3: None}, close=False)
    seen = []
    for checkpoint in lastgood.watch(tmp_path, poll=0, latest=True):
        seen.append(checkpoint.step)
        if checkpoint.step == 3:
            for step in (4, 5):
                made.save(step, stage, estimate=1, environment={}, arguments={}, facts={})
            made.close("finished")
    assert seen == [3, 5]


def test_only_what_is_asked_for(tmp_path: Path) -> None:
    made = saved(tmp_path, dict.fromkeys(range(1, 7), 1.0), Keep(full=2), close=False)
    made.retain()
    made.close("finished")
    assert [c.step for c in lastgood.watch(tmp_path, poll=0, every=2)] == [2, 4, 6]
    assert [c.step for c in lastgood.watch(tmp_path, poll=0, state="full")] == [5, 6]
    lastgood.open(tmp_path).at(3).record({"eval_mmlu": float("nan")})
    assert [c.step for c in lastgood.watch(tmp_path, poll=0, missing="mmlu")] == [1, 2, 4, 5, 6]
    assert list(lastgood.watch(tmp_path, poll=0, missing="loss")) == []


def test_I15_what_a_branch_left_behind_is_not_evaluated(tmp_path: Path) -> None:
    saved(tmp_path, {1: None, 2: None, 3: None})
    seen = []
    for checkpoint in lastgood.watch(tmp_path, poll=0):
        seen.append((checkpoint.step, checkpoint.seq))
        if checkpoint.seq == 1:
            resume(tmp_path, Keep(), [2, 5], back_to=1)
    assert seen == [(1, 1), (2, 4), (5, 5)]


@pytest.mark.parametrize("event", ["preempted", "interrupted", None])
def test_what_may_come_back_is_waited_for(tmp_path: Path, event: str | None) -> None:
    made = saved(tmp_path, {1: None}, close=False)
    if event is not None:
        made.close(event)
    watching = lastgood.watch(tmp_path, poll=0, timeout=0.05)
    assert [c.step for c in watching] == [1], "it ended by its time alone"
    seen = []
    for checkpoint in lastgood.watch(tmp_path, poll=0, timeout=SLOW):
        seen.append(checkpoint.step)
        if checkpoint.step == 1:
            made.close()
            resume(tmp_path, Keep(), [2])
    assert seen == [1, 2], "it ended because the run did"


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    assert list(lastgood.watch(tmp_path / "later", poll=0, timeout=0.02)) == []
    with pytest.raises(NoCheckpoint):
        lastgood.open(tmp_path / "later")


@pytest.mark.parametrize("how", ["break", "raise", "close"])
def test_whoever_leaves_the_loop_lets_go(tmp_path: Path, how: str) -> None:
    saved(tmp_path, {1: None, 2: None})
    watching = lastgood.watch(tmp_path, poll=0)
    try:
        for _ in watching:
            assert len(leases.in_force(tmp_path)) == 1
            if how == "break":
                break
            if how == "raise":
                raise KeyError
            watching.close()  # type: ignore[attr-defined]
    except KeyError:
        pass
    del watching
    assert leases.in_force(tmp_path) == {} and os.listdir(tmp_path / ".lastgood" / "leases") == []


def test_two_evaluators_hold_one_checkpoint(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: None, 2: None}, Keep(last=1), close=False)
    one, two = hold(tmp_path, 1), hold(tmp_path, 1)
    one.drop()
    made.retain()
    assert steps(tmp_path) == [1, 2]
    two.drop()
    made.retain()
    assert steps(tmp_path) == [2]
    made.close()


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"every": 1.5}, {"every": True}, {"poll": -1}, {"poll": None}, {"poll": float("nan")},
     {"timeout": "5"}, {"lease": 0}, {"state": "stock"}, {"missing": ""}, {"missing": "a + b"}],
)  # fmt: skip
def test_a_wrong_option_is_said_at_once(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        lastgood.watch(tmp_path, **options)


def test_the_journal_says_who_was_spared(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: None, 2: None}, Keep(last=1), close=False)
    held = hold(tmp_path, 1)
    (decision, _) = made.retain()
    assert decision.record.id == records(tmp_path)[0].id and "being evaluated by" in decision.reasons[0]
    assert not [event for event in journal.read(tmp_path) if event["event"] == "deleted"]
    held.drop()
    made.close()
