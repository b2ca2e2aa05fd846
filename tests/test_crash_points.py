"""Operations, failing at each call to the operating system, or killed at every fifth one (EVERY_POINT=1: at all).

A child process counts its own calls that change the disk and sends itself SIGKILL at the
n-th one, before it, after it, or in the middle of a write; n runs until the operation gets
through. What is on disk afterwards has to satisfy the invariants each time.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lastgood.errors import RunLocked, SaveFailed
from lastgood.format.tensors import Tensor
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo import gc, pins, verify
from lastgood.repo.layout import HIDDEN
from lastgood.repo.quarantine import quarantine as move_away
from lastgood.repo.read import records
from lastgood.repo.staging import Staging

import forked

STEP = 1 if os.environ.get("EVERY_POINT") else 5
"""How far it is from one point that is tried to the next: the lanes of `faults` go through all, in one process."""
CALLS = ("open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "fchmod", "ftruncate")


def stage(step: int) -> Callable[[Staging], None]:
    def write(staging: Staging) -> None:
        weights = bytes([step % 251]) * 4096
        staging.tensors("model.safetensors", "model", [Tensor("w", "U8", (4096,), memoryview(weights))])
        staging.tensors("optimizer.safetensors", "optimizer", [Tensor("m", "U8", (4096,), memoryview(weights))])
        staging.data("resume.json", "progress", b"{}")
        (Path(staging.path) / "config.json").write_text("{}")
        (Path(staging.path) / "adapter").mkdir()
        (Path(staging.path) / "adapter" / "adapter.json").write_text("{}")
        staging.adopt("model")

    return write


def manager(root: Path, **keep: Any) -> Manager:
    made = Manager(root=root, keep=Keep(**keep), on_error="raise")
    made.open()
    last = [record for record in records(root) if record.ours and record.current]
    if last:
        made.begin_from(last[-1])
    else:
        made.begin_fresh()
    return made


def save(made: Manager, step: int) -> Record | None:
    record = made.save(step, stage(step), estimate=1, environment={}, arguments={}, facts={})
    made.retain()
    return record


def prepared(root: Path) -> None:
    made = manager(root)
    for step in (1, 2, 3):
        save(made, step)
    made.close()


def first_save(root: Path) -> None:
    made = manager(root)
    save(made, 1)
    made.close()


def next_save(root: Path) -> None:
    made = manager(root)
    save(made, 4)
    made.close()


def save_and_prune(root: Path) -> None:
    made = manager(root, last=2)
    save(made, 4)
    made.close()


def save_and_strip(root: Path) -> None:
    made = manager(root, last=3, full=1)
    save(made, 4)
    made.close()


def save_on_a_branch(root: Path) -> None:
    made = Manager(root=root, on_error="raise")
    made.open()
    made.begin_from(next(record for record in records(root) if record.step == 1))
    save(made, 2)
    made.close()


def quarantine(root: Path) -> None:
    made = manager(root)
    move_away(root, "checkpoint-3")  # the manager would leave it there, for it is good
    made.close()


OPERATIONS = [first_save, next_save, save_and_prune, save_and_strip, save_on_a_branch, quarantine]


@contextmanager
def struck(
    point: int, strike: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any], sticky: bool = False
) -> Iterator[list[int]]:
    """Calls that change the disk are counted; the `point`-th (sticky: and all after it) is left to `strike`."""
    count = [0]
    originals = {name: getattr(os, name) for name in CALLS}

    def wrap(name: str) -> Callable[..., Any]:
        original = originals[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return original(*args, **kwargs)
            count[0] += 1
            if count[0] == point or (sticky and count[0] > point):
                return strike(name, original, args)
            return original(*args, **kwargs)

        return call

    try:
        for name in CALLS:
            setattr(os, name, wrap(name))
        yield count
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def die(when: str) -> Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]:
    def strike(name: str, original: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if when == "after":
            original(*args)
        elif when == "torn" and name == "write":
            original(args[0], bytes(args[1])[: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    return strike


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file() and HIDDEN not in file.parts
    }


def check(root: Path, before: tuple[Record, ...], allowed_to_go: set[int], floor: int = 3) -> None:
    """The invariants that hold after any crash."""
    found = records(root)
    for record in found:
        if record.ours:
            assert verify.problems(root, record, full=True) == (), "I1: what exists is complete"
    assert not [r for r in found if r.state == "incomplete"], "I1: no husk carries our name"
    there = {r.id for r in found if r.ours}
    lost = {r.step for r in before if r.id not in there}
    assert lost <= allowed_to_go, f"I3, I10: checkpoints of steps {lost} are gone"
    if before:
        made = manager(root)
        assert made.find("last").record.step >= floor, "I1: an older one than need be"
        made.close()


ALLOWED = {"save_and_prune": {1, 2}, "save_and_strip": {1}, "quarantine": {3}}
FLOOR = {"save_on_a_branch": 1, "quarantine": 2, "first_save": 0}
THROUGH = 17


@pytest.mark.parametrize("when", ["before", "after", "torn"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_I1_I3_I4_I10_I13_killed_at_every_call(operation: Callable[[Path], None], when: str, quick: Path) -> None:
    original = quick / "original"
    original.mkdir()
    if operation is not first_save:
        prepared(original)
    before = records(original)
    point, status, kills = 0, 0, 0
    while status != THROUGH:
        point += STEP
        root = quick / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original, root)

        def child(root: Path = root, point: int = point) -> None:
            with struck(point, die(when)) as count:
                operation(root)
            if count[0] < point:
                raise SystemExit(THROUGH)

        status = forked.run(child, log=quick / "log")
        # 0: the call that was to be the last one failed by itself (a file that isn't there), nothing was cut short.
        assert status in (-signal.SIGKILL, 0, THROUGH), (quick / "log").read_text()
        kills += status == -signal.SIGKILL
        check(root, before, ALLOWED.get(operation.__name__, set()), FLOOR.get(operation.__name__, 3))
        again = manager(root)
        assert save(again, 9) is not None, "I3: the next save needs no cleaning by hand"
        again.close()
        left = [path for place in ("tmp", "trash") for path in (root / HIDDEN / place).glob("*")]
        assert left == [], "I13: what the crash left is gone"
    assert kills > 10 // STEP, "the operation was hardly ever interrupted"


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EMFILE], ids=errno.errorcode.get
)
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
def test_I3_I5_I19_an_error_at_every_call_of_a_save(number: int, sticky: bool, quick: Path) -> None:
    original = quick / "original"
    original.mkdir()
    prepared(original)
    before = contents(original)
    point, failed = 0, 0
    while True:
        point += 1
        root = quick / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original, root)
        made = manager(root)

        def strike(name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            raise OSError(number, os.strerror(number), str(args[0]))

        error = None
        with struck(point, strike, sticky) as count:
            try:
                record = made.save(4, stage(4), estimate=1, environment={}, arguments={}, facts={})
            except SaveFailed as raised:
                record, error = None, raised
        if count[0] < point:
            break
        assert {name: data for name, data in contents(root).items() if "checkpoint-4" not in name} == before, "I3"
        if record is None:
            failed += 1
            assert error is not None and error.hint
            assert sticky or not (root / "checkpoint-4").exists(), "I5: what failed to become durable is not published"
        made.close()
        again = manager(root)
        assert save(again, 5) is not None
        again.close()
        check(root, records(original), set())
    assert failed > 15, "errors of the operating system never reached the save"


def test_I11_gc_refuses_what_is_not_ours_or_pinned(tmp_path: Path) -> None:
    from lastgood.policy import Decision

    prepared(tmp_path)
    first = records(tmp_path)[0]
    pins.write(tmp_path, {first.id: ("release",)})
    (tmp_path / "checkpoint-77").mkdir()
    found = records(tmp_path)
    for record in (found[0], found[-1]):
        with pytest.raises(ValueError, match="refusing"):
            gc.plan(found, [Decision(record, "delete", ("because",))])
    made = manager(tmp_path, last=1)
    save(made, 4)
    made.close()
    assert [r.step for r in records(tmp_path)] == [1, 4, 77]


def test_I15_who_was_fenced_off_neither_saves_nor_deletes(tmp_path: Path) -> None:
    prepared(tmp_path)
    first = manager(tmp_path, last=1)
    second = Manager(root=tmp_path)
    second.open(takeover=True)
    for act in (first.retain, lambda: save(first, 4)):
        with pytest.raises(RunLocked, match="took over"):
            act()
    assert [record.step for record in records(tmp_path)] == [1, 2, 3]
    first.close()
    assert second._lock is not None and second._lock.still_held(), "closing the first one must not free the second's"
    second.close()


def test_I6_looking_changes_nothing(tmp_path: Path) -> None:
    import lastgood

    prepared(tmp_path)
    (tmp_path / "checkpoint-3" / "resume.json").unlink()
    before = {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()}
    run = lastgood.open(tmp_path)
    assert run.latest().step == 2
    assert [r.state for r in run.checkpoints] == ["full", "full", "incomplete"]
    assert run.problems(run.checkpoints[2])
    assert len(run.history) >= 3
    assert {
        str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()
    } == before


def test_I18_nothing_depends_on_times(tmp_path: Path) -> None:
    prepared(tmp_path)
    for year, record in enumerate(records(tmp_path)):
        os.utime(tmp_path / record.name, (0, 10**9 - year * 10**8))
    made = manager(tmp_path, last=1)
    save(made, 4)
    made.close()
    assert [r.step for r in records(tmp_path)] == [4]
