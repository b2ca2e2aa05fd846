"""Saves in the background: the same checkpoints as before training goes on, and everybody sees what is committed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lastgood
from lastgood.background import Background
from lastgood.errors import NotEnoughSpace, RunLocked, SaveFailed, UsageError
from lastgood.format.tensors import Tensor
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import journal
from lastgood.repo.staging import Staging
from lastgood.store import direct, fs, memory
from lastgood.writer import Writer

import forked
from faults.small import content, stage, steps


class Gate(fs.FileSystem):
    """The writer's first sync of a save waits until it is let go; training's own never does."""

    def __init__(self) -> None:
        self.open_, self.waiting = threading.Event(), threading.Event()
        self.fails: OSError | None = None

    def sync(self, handle: int) -> None:
        if threading.current_thread().name == "lastgood writer":
            self.waiting.set()
            assert self.open_.wait(120), "nobody let the writer go"
            if self.fails is not None:
                raise self.fails
        super().sync(handle)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    with fs.using(gate):
        yield gate
    gate.open_.set()


def begun(root: Path, **options: Any) -> Manager:
    options.setdefault("background", Background())
    made = Manager(root=root, **options)
    made.open()
    made.begin_fresh()
    return made


def save(made: Manager, step: int, write: Callable[[Staging], None] | None = None, **more: Any) -> Any:
    facts = {"loss": 1 / step}
    record = made.save(step, write or stage(step), estimate=4096, environment={}, arguments={}, facts=facts, **more)
    made.retain()
    return record


def events(root: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in journal.read(root) if line["event"] == event]


def files(root: Path) -> dict[str, bytes]:
    """What every checkpoint holds; of its manifest all but ids, clocks and hashes of itself."""
    found = {}
    for path in sorted(root.glob("checkpoint-*/**/*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "lastgood.json":
                manifest = json.loads(data)
                data = json.dumps(
                    {k: manifest[k] for k in ("step", "seq", "lineage", "parts", "files", "facts")}
                ).encode()
            found[str(path.relative_to(root))] = data
    return found


def test_I9_the_same_checkpoints_as_without(tmp_path: Path) -> None:
    for name, background in (("a", None), ("b", Background())):
        made = begun(tmp_path / name, keep=Keep(last=3, full=1), background=background)
        for step in range(1, 7):
            save(made, step)
            made.record(step, {"eval_loss": 1 / step})
        made.close()
    assert files(tmp_path / "a") == files(tmp_path / "b") and steps(tmp_path / "b") == [4, 5, 6]


def test_I9_what_is_saved_is_what_was_there_when_save_returned(tmp_path: Path, gate: Gate) -> None:
    data, made = bytearray(content(1)), begun(tmp_path)

    def write(staging: Staging) -> None:
        staging.tensors("model.safetensors", "model", [Tensor("w", "U8", (len(data),), memoryview(data))])
        (staging.directory / "config.json").write_text("{}")
        staging.adopt("model")

    save(made, 1, write)
    data[:] = bytes(len(data))  # training goes on
    assert not steps(tmp_path), "nothing is there before it is committed"
    gate.open_.set()
    made.close()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes().endswith(content(1))


def test_I1_whoever_asks_is_told_what_is_committed(tmp_path: Path, gate: Gate) -> None:
    made = begun(tmp_path, keep=Keep(last=1))
    save(made, 1)
    made.record(1, {"eval_loss": 0.5})
    assert gate.waiting.wait(120) and made.busy and 1 in made.saved
    threading.Timer(0.2, gate.open_.set).start()
    (only,) = made.records()
    assert only.metrics == {"eval_loss": 0.5} and not made.busy, "metrics ride behind their save"
    assert made.saved[1].size > 0, "the record is the committed one now"
    save(made, 2)
    assert made.find("last").record.step == 2
    made.close()
    assert steps(tmp_path) == [2], "retention ran behind the save"


@pytest.mark.parametrize("on_busy", ["wait", "skip"])
def test_one_save_at_a_time(tmp_path: Path, gate: Gate, on_busy: Any) -> None:
    made = begun(tmp_path, background=Background(on_busy=on_busy))
    save(made, 1)
    assert gate.waiting.wait(120)
    later = threading.Timer(0.2 if on_busy == "wait" else 30.0, gate.open_.set)  # one that is left out comes sooner
    later.daemon = True
    later.start()
    second = save(made, 2, skip=True)
    later.cancel()
    gate.open_.set()
    save(made, 3)
    made.close()
    assert steps(tmp_path) == ([1, 2, 3] if on_busy == "wait" else [1, 3])
    told = events(tmp_path, "skipped")
    assert (second is None) == (on_busy == "skip") == bool(told)
    assert not told or (told[0]["step"], "step 1" in told[0]["reason"]) == (2, True)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_I3_I19_a_failure_is_told_once_at_the_next_call(
    tmp_path: Path, gate: Gate, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = begun(tmp_path, on_error=on_error)
    save(made, 1)
    gate.open_.set()
    made.settle()
    before = files(tmp_path)
    gate.fails = OSError(errno.EIO, "Input/output error")
    save(made, 2)
    made.record(2, {"eval_loss": 0.1})
    if on_error == "raise":
        with pytest.raises(SaveFailed, match="Input/output"):
            made.settle()
    else:
        made.settle()
    gate.fails = None
    made.settle()
    assert [event["step"] for event in events(tmp_path, "failed")] == [2] and made.failures == 1
    assert caplog.text.count("NO CHECKPOINT at step 2") == (on_error == "warn")
    assert files(tmp_path) == before and 2 not in made.saved and not list((tmp_path / ".lastgood/tmp").iterdir())
    save(made, 3)
    made.close()
    assert steps(tmp_path) == [1, 3], "the next save needs no cleaning by hand"
    assert made.saved[3].manifest is not None and made.saved[3].manifest.parent == made.saved[1].id


def test_a_failure_nobody_asked_about_is_told_at_the_end(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    made = begun(tmp_path, on_error="raise")
    gate.fails = OSError(errno.EROFS, "Read-only file system")
    gate.open_.set()
    save(made, 1)
    made.close()
    assert "NO CHECKPOINT at step 1" in caplog.text and not steps(tmp_path)


@pytest.mark.parametrize("on_full", ["warn", "stop"])
def test_I19_a_disk_that_fills_up_meanwhile(tmp_path: Path, gate: Gate, on_full: Any) -> None:
    made = begun(tmp_path, on_full=on_full, on_error="raise")
    gate.fails = OSError(errno.ENOSPC, "No space left on device")
    gate.open_.set()
    save(made, 1)
    made.settle()
    assert isinstance(made.space.lack, NotEnoughSpace) == (on_full == "stop")
    made.close()


def test_a_save_waits_for_room_behind_training(tmp_path: Path, gate: Gate) -> None:
    made = begun(tmp_path, on_full="wait")
    gate.fails = OSError(errno.ENOSPC, "No space left on device")
    gate.open_.set()
    save(made, 1)
    waiting = threading.Event()
    threading.Thread(target=lambda: (until(lambda: events(tmp_path, "waits")), waiting.set())).start()
    assert waiting.wait(120)
    assert made.busy, "training isn't held"
    gate.fails = None
    made.settle()
    made.close()
    assert steps(tmp_path) == [1]


def until(true: Callable[[], Any]) -> None:
    stop = threading.Event()
    while not true():
        stop.wait(0.02)


def test_I15_a_takeover_meanwhile_is_told_at_the_next_call(tmp_path: Path, gate: Gate) -> None:
    made = begun(tmp_path)
    save(made, 1)
    assert gate.waiting.wait(120)
    other = Manager(root=tmp_path)
    other.open(takeover=True)
    other.begin_fresh()
    gate.open_.set()
    with pytest.raises(RunLocked):
        made.settle()
    made.close()
    assert not steps(tmp_path), "who was fenced off commits nothing"
    save(other, 5)
    other.close()
    assert steps(tmp_path) == [5]


class Hangs(fs.FileSystem):
    """The writer doesn't even get to its directory before it is let go."""

    def __init__(self) -> None:
        self.go, self.waiting = threading.Event(), threading.Event()

    def mkdir(self, path: fs.AnyPath) -> None:
        if threading.current_thread().name == "lastgood writer":
            self.waiting.set()
            assert self.go.wait(120), "nobody let the writer go"
        super().mkdir(path)


@pytest.mark.parametrize("taken", [False, True], ids=["alone", "opened again"])
def test_I15_what_was_given_up_is_not_committed_behind_the_close(
    taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk hangs and the close gives up; what comes back to life later writes into a run that isn't its own."""
    monkeypatch.setattr("lastgood.writer.PATIENCE", 0.0)
    disk, again = Hangs(), Manager(root=tmp_path)
    with fs.using(disk):
        made = begun(tmp_path)
        save(made, 1)
        assert disk.waiting.wait(120)
        made.close()
        assert "the save of step 1 is given up" in caplog.text
        if taken:
            again.open()
        disk.go.set()
        assert made._writer.wait(120)
        assert steps(tmp_path) == []
        again.close()


class Slow(deque[Any]):
    """A job is out of the queue, and not begun."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.go = threading.Event(), threading.Event()

    def popleft(self) -> Any:
        job = super().popleft()
        self.out.set()
        assert self.go.wait(120)
        return job


def test_I1_a_writer_is_busy_from_the_moment_it_is_given_something() -> None:
    """Whoever asks between two lines of it must not be told that all is on the disk."""
    writer, jobs, done = Writer(), Slow(), threading.Event()
    writer._jobs = jobs
    writer.submit(done.set)
    assert jobs.out.wait(120)
    busy = writer.busy
    jobs.go.set()
    assert busy and writer.wait(120) and done.is_set() and not writer.busy
    writer.stop()


def test_a_copy_that_does_not_fit_is_no_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = begun(tmp_path, background=Background(memory=1000))
    for step in (1, 2):
        record = save(made, step)
        assert record is not None and record.size > 0 and step in steps(tmp_path), "it is there when save returns"
    made.close()
    assert caplog.text.count("doesn't fit into memory") == 1
    assert [event["spent"]["copy"] for event in events(tmp_path, "saved")] == [0, 0]


def test_memory_is_used_again(tmp_path: Path) -> None:
    made, held = begun(tmp_path), []
    for step in range(1, 5):
        save(made, step)
        made.settle()
        held.append(made._arena.held)
    made.close()
    assert len(set(held)) == 1 and made._arena.held == 0


def test_the_journal_tells_what_a_save_cost(tmp_path: Path) -> None:
    made = begun(tmp_path)
    save(made, 1)
    save(made, 2, now=True)
    made.close()
    behind, before = events(tmp_path, "saved")
    for event in (behind, before):
        assert set(event["spent"]) == {"stall", "copy", "hash", "write", "sync"}
        assert all(value >= 0 for value in event["spent"].values())
    assert behind["spent"]["copy"] > 0 == before["spent"]["copy"]
    assert before["spent"]["stall"] == before["seconds"]


def test_a_forked_child_leaves_its_parents_save_alone(tmp_path: Path, gate: Gate) -> None:
    made = begun(tmp_path)
    save(made, 1)
    assert gate.waiting.wait(120)
    child = os.fork()
    if child == 0:
        try:
            made._drained()
            made.close()
        finally:
            os._exit(0 if not made.busy else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert made.busy
    gate.open_.set()
    made.close()
    assert steps(tmp_path) == [1]


def test_a_run_that_is_opened_in_a_child_is_written_there(tmp_path: Path) -> None:
    """As notebooks and launchers do it: made here, opened and trained behind a fork."""
    made = Manager(root=tmp_path, background=Background())

    def child() -> None:
        made.open()
        made.begin_fresh()
        save(made, 1)
        made.close()

    assert forked.run(child, log=tmp_path.with_suffix(".log")) == 0
    assert steps(tmp_path) == [1]


SCRIPT = """
import sys, time
from pathlib import Path
from lastgood.background import Background
from lastgood.manager import Manager
from lastgood.store import fs
from faults.small import stage

class Slow(fs.FileSystem):
    def sync(self, handle):
        time.sleep(0.05)
        super().sync(handle)

fs.system = Slow()
made = Manager(root=Path(sys.argv[1]), background=Background())
made.open()
made.begin_fresh()
made.save(1, stage(1), estimate=4096, environment={}, arguments={}, facts={})
assert made.busy
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise ValueError('mine')"])
def test_a_program_that_just_ends_has_its_checkpoint(tmp_path: Path, end: str) -> None:
    """No close, no with: what was in memory is written before the process is gone."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT) + end, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == (0 if not end else 3 if "Exit" in end else 1), done.stderr
    assert steps(tmp_path / "run") == [1], done.stderr


def test_what_is_free_is_known_on_this_system() -> None:
    free = memory.available()
    if free is None:
        pytest.skip("this system doesn't say how much memory is free")
    assert 0 < free < 1 << 50


def test_an_arena_hands_out_what_it_holds_and_no_more() -> None:
    arena = memory.Arena(budget=1 << 20)
    first = arena.keep(memoryview(b"abc"))
    second = arena.take(1 << 16)
    second[:] = bytes(1 << 16)
    assert bytes(first) == b"abc" and len(arena.take(0)) == 0
    with pytest.raises(memory.Short):
        arena.take(1 << 20)
    arena.reset()
    arena.take(1 << 20)


WRONG: list[Callable[[], Any]] = [
    lambda: "yes",
    lambda: 1,
    lambda: None,
    lambda: Background(on_busy="queue"),  # type: ignore[arg-type]
    lambda: Background(memory="much"),
    lambda: Background(memory=-1),
]


@pytest.mark.parametrize("value", WRONG)
def test_wrong_options(value: Callable[[], Any], tmp_path: Path) -> None:
    import torch

    def make() -> None:
        lastgood.CheckpointManager(tmp_path, model=torch.nn.Linear(1, 1), background=value())

    with pytest.raises(UsageError, match="ackground"):
        make()


def test_I3_memory_that_can_not_be_had_ahead_is_no_save_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made ready for the first save is only for speed: nothing was to be saved yet."""
    for name, value in {"BUFFER": 1 << 50, "LARGE": 1, "_idle": []}.items():
        monkeypatch.setattr(direct, name, value)
    model = torch.nn.Linear(8, 8)
    with lastgood.CheckpointManager(tmp_path, model=model, background=False, save_steps=9, on_error="raise") as ckpt:
        ckpt.restore()
        ckpt.step(1)
        ckpt.settle()
        monkeypatch.undo()
