"""A writer that was stopped in the middle of something, and goes on after another one took its run over."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import moments
from lastgood.errors import RunLocked
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import pins, verify
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from lastgood.repo.staging import Staging
from moments import manager, prepared, save, stage

import forked

FENCED, THROUGH = 3, 17
NOT_THEIRS = ("head.json", "policy.json", "run.json", "pins.json", "poisoned.json", "lock.json", "trail.jsonl")


def goes_on(root: Path) -> Manager:
    made = manager(root, last=2)
    save(made, 4)
    save(made, 5)
    return made


def strips(root: Path) -> Manager:
    made = manager(root, last=4, full=1)
    save(made, 4)
    save(made, 5)
    return made


def branches(root: Path) -> Manager:
    """Steps that are there already: each checkpoint of the branch that is left moves aside."""
    made = manager(root, 1)
    save(made, 2)
    save(made, 3)
    save(made, 4)
    return made


def finds_damage(root: Path) -> Manager:
    made = manager(root, 2, last=2)
    made.quarantine(("checkpoint-3",))
    save(made, 4)
    return made


def starts_anew(root: Path) -> Manager:
    made = Manager(root=root, keep=Keep(last=1), on_error="warn")
    made.open()
    made.begin_fresh()
    save(made, 4)
    save(made, 5)
    return made


OPERATIONS = [goes_on, strips, branches, finds_damage, starts_anew]


def written(root: Path) -> dict[str, bytes]:
    """All that a writer of the run answers for."""
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file() and (HIDDEN not in file.parts or file.name in NOT_THEIRS)
    }


def loser(operation: Callable[[Path], Manager], root: Path, point: int) -> None:
    """Stops itself at its `point`-th call; whoever is fenced off hears it at the latest when it saves once more."""
    reached = []

    def stop(number: int, what: str) -> None:
        if number == point:
            reached.append(print(f"stopped at {what}", flush=True))
            os.kill(os.getpid(), signal.SIGSTOP)

    try:
        with moments.counted(stop):
            made = operation(root)
        if reached:
            save(made, 9)
    except RunLocked as error:
        print(error)
        raise SystemExit(FENCED) from None
    raise SystemExit(THROUGH)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_I15_who_wakes_after_a_takeover_harms_nothing(operation: Callable[[Path], Manager], quick: Path) -> None:
    original, root, log = quick / "original", quick / "run", quick / "log"
    original.mkdir()
    prepared(original)
    fenced = 0
    for point in moments.points(1000, 17, first=1 + 3 * OPERATIONS.index(operation)):
        shutil.rmtree(root, ignore_errors=True)
        log.unlink(missing_ok=True)
        shutil.copytree(original, root)
        pid = forked.start(loser, operation, root, point, log=log)
        try:
            if moments.stopped(pid) is not None:
                assert "stopped at" not in log.read_text(), log.read_text()
                break
            mine = manager(root, takeover=True)  # keeps all: it need not wait for whoever was stopped while deleting
            for step in (4, 5):
                save(mine, step)
            pins.add(root, mine.saved[4].id, "release")
            before: dict[str, bytes] = {}

            def wake(staging: Staging, pid: int = pid, before: dict[str, bytes] = before) -> None:
                stage(6)(staging)
                before.update(written(root))
                os.kill(pid, signal.SIGCONT)
                status = forked.wait(pid, 20)
                where = log.read_text()
                assert written(root) == before, where
                assert status == FENCED, f"{status}: {where}"

            assert save(mine, 6, wake) is not None, log.read_text()
            fenced += 1
            assert all(verify.problems(root, record, full=True) == () for record in records(root) if record.ours)
            assert not [record for record in records(root) if record.state == "incomplete"]
            assert {r.id for r in mine.saved.values()} <= {r.id for r in records(root) if r.current}
            assert save(mine, 7) is not None
            mine.close()
            save(manager(root), 8)
        finally:
            moments.end(pid)
    assert fenced > (30 if moments.EVERY else 2)


def writes_on(root: Path, saves: int = 10**6) -> None:
    """Takes over and saves until somebody else takes over."""
    try:
        made = manager(root, takeover=True, last=3, full=2)
        for step in range(made.next, made.next + saves):
            save(made, step)
    except RunLocked:
        raise SystemExit(FENCED) from None
    made.close()


def test_I15_one_takeover_after_the_other_from_writers_at_work(quick: Path) -> None:
    root, running = quick / "run", []
    prepared(root)
    try:
        for turn in range(10):
            before = max(record.seq for record in records(root))
            running.append(forked.start(writes_on, root, log=quick / f"log{turn}"))
            deadline = time.monotonic() + 60
            while max((r.seq for r in records(root)), default=0) <= before and time.monotonic() < deadline:
                time.sleep(0.001)
        for turn, pid in enumerate(running[:-1]):
            assert forked.wait(pid) == FENCED, (quick / f"log{turn}").read_text()
        writes_on(root, 3)
        assert forked.wait(running[-1]) == FENCED, (quick / "log9").read_text()
    finally:
        for pid in running:
            moments.end(pid)
    found = records(root)
    assert [verify.problems(root, record, full=True) for record in found] == [()] * 3
    assert [record.state for record in found] == ["weights", "full", "full"]
    assert len({record.seq for record in found}) == 3
    assert os.listdir(root / HIDDEN / "tmp") == []
    assert not [name for name in os.listdir(root / HIDDEN) if name.startswith("writer.")]


@pytest.mark.parametrize("how", ["a look", "a save", "its end", "an exit"])
def test_I15_a_forked_child_is_not_the_writer(how: str, tmp_path: Path) -> None:
    """Whatever it does, its parent goes on as the only one; nor does it keep others out when its parent is dead."""
    prepared(tmp_path)
    made = manager(tmp_path)
    before = written(tmp_path)

    def child() -> None:
        if how == "a save":
            with pytest.raises(RunLocked):
                save(made, 4)
        elif how == "its end":
            made.close()
        elif how == "an exit":
            assert made._lock is not None and not made._lock.still_held()
            made._lock = None
            gc.collect()
        else:
            assert made.find("last").record.step == 3

    assert forked.run(child, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    (tmp_path / "log").unlink()
    assert written(tmp_path) == before
    second = Manager(root=tmp_path)
    with pytest.raises(RunLocked, match=f"process {os.getpid()} "):
        second.open()
    assert save(made, 4) is not None
    made.close()


def forks_and_dies(root: Path, ready: Path) -> None:
    made = manager(root)
    if os.fork() == 0:
        ready.write_text(str(os.getpid()))
        time.sleep(600)
    save(made, 4)
    os.kill(os.getpid(), signal.SIGKILL)


def test_I15_a_worker_that_outlives_its_trainer_keeps_nobody_out(tmp_path: Path) -> None:
    prepared(tmp_path / "run")
    ready = tmp_path / "ready"
    assert forked.run(forks_and_dies, tmp_path / "run", ready, log=tmp_path / "log") == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not (ready.exists() and ready.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    worker = int(ready.read_text())
    try:
        held = [os.path.realpath(f"/proc/{worker}/fd/{name}") for name in os.listdir(f"/proc/{worker}/fd")]
        assert not [path for path in held if path.startswith(str(tmp_path / "run"))]
        made = manager(tmp_path / "run")
        assert made.find("last").record.step == 4
        made.close()
    finally:
        os.kill(worker, signal.SIGKILL)
