"""Large files are given back piece by piece, when training goes on already; and what is done side by side."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood.background import Background
from lastgood.format.tensors import Tensor
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo import bin
from lastgood.repo.read import records
from lastgood.repo.staging import APART, Staging, open_staging
from lastgood.store import direct, local
from lastgood.store.dissolve import STEP, dissolve
from lastgood.store.fs import AnyPath
from lastgood.store.together import together
from lastgood.testing import Fault, Faulty, FileSystem, Model, Recorder, cuts, using
from lastgood.writer import NICE

import forked


def filled(path: Path, sizes: list[int]) -> Path:
    for number, size in enumerate(sizes):
        (path / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        (path / f"{number % 2}" / f"file{number}").write_bytes(bytes([number + 1]) * size)
    return path


class Cuts(FileSystem):
    """Writes down the lengths that files are cut to."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def truncate(self, handle: int, size: int) -> None:
        self.sizes.append(size)
        super().truncate(handle, size)


@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5), step=st.integers(1, 30), least=st.integers(0, 9))
def test_I13_all_of_it_goes_or_what_was_stopped_can_be_removed_later(
    sizes: list[int], step: int, least: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    grave = filled(tmp_path_factory.mktemp("trash") / "grave", sizes)
    disk = Cuts()
    with using(disk):
        done = dissolve(grave, step=step, hurry=lambda: True, over=lambda: len(disk.sizes) >= least > 0)
        assert done == (not grave.exists())
        assert done or dissolve(grave, step=step, hurry=lambda: True)
    assert not grave.exists()
    assert disk.sizes == [n for i in sorted(range(len(sizes)), key=lambda i: (i % 2, i))
                          for n in range((sizes[i] - 1) // step * step, 0, -step)]  # fmt: skip


def test_I11_what_has_another_name_or_a_reader_is_never_cut(tmp_path: Path) -> None:
    grave = filled(tmp_path / "grave", [100, 100, 100])
    copy = tmp_path / "copy"
    copy.hardlink_to(grave / "0" / "file0")
    disk = Cuts()
    with (grave / "1" / "file1").open("rb") as reader, using(disk):
        assert dissolve(grave, step=10, hurry=lambda: True)
        assert reader.read() == b"\2" * 100, "who reads it reads on"
    assert copy.read_bytes() == b"\1" * 100
    assert disk.sizes in ([*range(90, 0, -10)], []), "file2 alone, where the system says that nobody has it open"


@pytest.mark.parametrize("model", ["ordered", "posix"])
def test_I1_I10_a_power_cut_never_brings_it_back_without_its_end(tmp_path: Path, model: Model) -> None:
    root = tmp_path / "run"
    filled(root / "checkpoint-1", [40])
    (root / "trash").mkdir()
    disk = Recorder(root)
    with using(disk):
        local.vanish(root / "checkpoint-1", root / "trash" / "a")
        assert dissolve(root / "trash" / "a", step=16, hurry=lambda: True)
    states, whole = 0, 0
    for cut in cuts(disk.before, disk.events, model):
        back = cut.files.get("checkpoint-1/0/file0", b"\1" * 40)
        assert back == b"\1" * 40, cut.label
        whole += "checkpoint-1/0/file0" in cut.files
        states += 1
    assert states > 4 and whole


def test_each_cut_can_fail(tmp_path: Path) -> None:
    grave = filled(tmp_path / "grave", [40])
    counted = Faulty()
    with using(counted):
        assert dissolve(filled(tmp_path / "other", [40]), step=16, hurry=lambda: True)
    assert counted.calls.count("truncate") == 2
    with using(Faulty(Fault(counted.calls.index("truncate") + 2, "EIO"))), pytest.raises(OSError, match="Input/output"):
        dissolve(grave, step=16, hurry=lambda: True)
    assert (grave / "0" / "file0").stat().st_size == 32 and dissolve(grave)


def save(made: Manager, step: int, size: int, before: Callable[[], bool] = lambda: True) -> Record:
    def write(staging: Staging) -> None:
        assert before()
        staging.data("model.safetensors", "model", bytes(100))
        entry = Tensor("w", "U8", (size,), memoryview(bytes(size)))
        staging.tensors("optimizer.safetensors", "optimizer", [entry])
        staging.data("resume.json", "progress", b"{}")

    made.on_error = "raise"
    record = made.save(step, write, estimate=size, environment={}, arguments={}, facts={})
    assert record is not None
    made.retain()
    return record


class Held(FileSystem):
    """Nothing is cut before it is let go, and what removes the rest waits as well."""

    def __init__(self) -> None:
        self.go, self.cutting = threading.Event(), threading.Event()

    def alone(self, handle: int) -> bool:
        self.cutting.set()
        assert self.go.wait(120), "nobody let it go"
        return super().alone(handle)


@pytest.mark.parametrize("keep", [Keep(last=1), Keep(last=3, full=1)], ids=["delete", "strip"])
def test_I10_I13_retention_returns_before_large_files_are_gone_and_the_next_save_waits(
    tmp_path: Path, keep: Keep
) -> None:
    made, disk = Manager(root=tmp_path, keep=keep), Held()
    made.open()
    made.begin_fresh()
    with using(disk):
        save(made, 1, STEP + 1)
        save(made, 2, STEP + 1)  # returns, though nobody lets the disk go
        assert disk.cutting.wait(120) and made._writer.busy
        there = [record.step for record in records(tmp_path) if record.state == "full"]
        assert there == [2], "the older one is out of sight at once"
        assert any((tmp_path / ".lastgood" / "trash").rglob("optimizer.safetensors"))
        disk.go.set()
        save(made, 3, 100, before=lambda: not local.names(tmp_path / ".lastgood" / "trash"))
        made.close()
        assert not local.names(tmp_path / ".lastgood" / "trash"), "and so does the end"
    assert not bin.operations(tmp_path)


def test_I13_what_a_killed_process_did_not_give_back_goes_at_the_next_start(tmp_path: Path) -> None:
    made = Manager(root=tmp_path, keep=Keep(last=1))
    made.open()
    made.begin_fresh()
    grave = filled(tmp_path / ".lastgood" / "trash" / "0123456789abcdef", [300])
    dissolve(grave, step=100, hurry=lambda: True, over=lambda: (grave / "0" / "file0").stat().st_size < 300)
    assert (grave / "0" / "file0").stat().st_size == 200
    made.close()
    again = Manager(root=tmp_path)
    again.open()
    again.close()
    assert not grave.exists()


def test_what_is_done_together_is_all_done_or_its_first_error_is_told() -> None:
    done: list[int] = []
    together([lambda n=n: done.append(n) for n in range(50)], limit=4)  # type: ignore[misc]
    assert sorted(done) == list(range(50))
    meet, left = threading.Barrier(2, timeout=120), threading.Event()

    def bad() -> None:
        meet.wait()
        raise OSError(5, "broken")

    def slow() -> None:
        meet.wait()  # both are under way
        left.wait(0.2)
        done.append(-1)

    with pytest.raises(OSError, match="broken"):
        together([bad, slow, *[lambda: left.wait(0.01)] * 3], limit=2)
    assert done[-1] == -1, "the other one was waited for"


def test_all_are_under_way_at_the_same_time_and_waited_for() -> None:
    meet, done, left = threading.Barrier(3, timeout=60), list[int](), threading.Event()

    def act(number: int) -> None:
        meet.wait()
        if number == 1:
            left.set()
            raise OSError("broken")
        left.wait(60)
        done.append(number)

    with pytest.raises(OSError, match="broken"):
        together([lambda n=n: act(n) for n in range(3)], limit=3)  # type: ignore[misc]
    assert sorted(done) == [0, 2]


def interrupted(turns: int) -> None:
    """Two interrupts, microseconds apart, while something is waited for; nothing else may come of them."""
    heard = 0

    def ring(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + heard % 60))
        while frame is not None and frame.f_code is not together.__code__:
            frame = frame.f_back
        if frame is not None:
            raise KeyboardInterrupt

    def act() -> None:
        time.sleep(0.0005)  # so that the caller waits by now
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.0005)

    signal.signal(signal.SIGINT, ring)
    signal.signal(signal.SIGALRM, ring)
    while heard < turns:
        with pytest.raises(KeyboardInterrupt):
            together([bool, act], limit=2)
        heard += 1


def test_an_interruption_stays_one_however_many_there_are(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.run(interrupted, 600, log=log) == 0, log.read_text()


def test_where_calls_are_counted_one_comes_after_the_other() -> None:
    seen: list[tuple[int, str]] = []
    with using(Faulty()):
        together([lambda n=n: seen.append((n, threading.current_thread().name)) for n in range(9)], limit=4)  # type: ignore[misc]
    assert seen == [(n, threading.current_thread().name) for n in range(9)]


class Second(FileSystem):
    """One of the files is written no sooner than another one is through, and a little later still."""

    def __init__(self) -> None:
        self.through, self.told, self.last = threading.Event(), threading.Event(), -1
        self.written: list[int] = []

    def open(self, path: AnyPath, flags: int, mode: int = 0o666) -> int:
        handle = super().open(path, flags, mode)
        if os.fspath(path).endswith("last"):
            self.last = handle
        return handle

    def write(self, handle: int, data: bytes | memoryview) -> int:
        if handle == self.last:
            assert self.through.wait(120)
            self.told.wait(0.5)  # whoever tells of it has the time to do so too early
        count = super().write(handle, data)
        self.written.append(handle)
        return count

    def close(self, handle: int) -> None:
        super().close(handle)
        self.through.set()


def test_what_tells_of_the_others_is_made_when_all_of_them_are_written(tmp_path: Path) -> None:
    disk, seen, staging = Second(), list[int](), open_staging(tmp_path)
    with using(disk):

        def about() -> bytes:
            disk.told.set()
            seen.append(len(disk.written))
            return b"{}"

        staging.data("about.json", "model", about)
        staging.data("last", "model", b"x" * APART)  # together they are enough for two that write
        staging.data("first", "model", b"x" * APART)
        staging.flush()
    assert seen == [2]


class Nice(FileSystem):
    """Notes the priority of each thread that writes or syncs. No number where the system has none by thread."""

    def __init__(self) -> None:
        self.seen: dict[str, set[int]] = {}

    def _note(self) -> None:
        name = threading.current_thread().name
        self.seen.setdefault(name, set()).add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def write(self, handle: int, data: bytes | memoryview) -> int:
        self._note()
        return super().write(handle, data)

    def sync(self, handle: int) -> None:
        self._note()
        super().sync(handle)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
def test_whatever_writes_in_the_background_gives_way_to_training(tmp_path: Path) -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    made, disk = Manager(root=tmp_path, background=Background()), Nice()
    made.open()
    made.begin_fresh()
    with using(disk):
        save(made, 1, 2 * direct.LARGE)
        made.settle()
    made.close()
    here = threading.current_thread().name
    assert {name for name in disk.seen if name != here} >= {"lastgood writer", "lastgood-write"}
    assert all(seen == {min(19, own + NICE)} for name, seen in disk.seen.items() if name != here), disk.seen


def test_what_all_saves_use_is_there_before_the_first_one(tmp_path: Path) -> None:
    made, asked = Manager(root=tmp_path, background=Background(memory=1 << 26)), []
    made.open()
    made.begin_fresh()
    for _ in range(2):
        made.warm(lambda: asked.append(1) or 40 << 20)  # type: ignore[func-returns-value]
    made.settle()
    assert asked == [1] and made._arena.held >= 40 << 20
    if sys.platform == "linux":
        assert direct._idle
    made.close()
    assert not made._arena.held
    poor = Manager(root=tmp_path, background=Background(memory=1 << 20))
    poor.open()
    poor.begin_fresh()
    poor.warm(lambda: 40 << 20)
    poor.settle()  # no word of it before a save needs it
    assert not poor._arena.held
    poor.close()
