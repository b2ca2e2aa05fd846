"""The grace of a SIGTERM: what still fits in is done, what can't fit isn't begun, and the process leaves by itself."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

import lastgood
import launched
from lastgood.background import Background
from lastgood.grace import BESIDE, GRACE, SMALL, Grace, Took, fastest, find, measured, verdict
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import journal
from lastgood.repo.staging import checked
from lastgood.signals import Overheard
from lastgood.store import fs

import forked
import lightnings
from faults.small import stage, steps
from training import Case

HERE = Path(__file__).parent
SECONDS = st.floats(0, 1e6)
SAVES = st.lists(st.builds(Took, st.integers(1, 1 << 40), st.floats(0, 1e6), st.booleans()), max_size=6)
REFUSED = "even the fastest save so far would have taken"


# ---- the decision ----------------------------------------------------------------------------


@given(SECONDS, st.integers(0, 1 << 40), SAVES)
def test_I20_a_save_is_left_out_only_if_none_was_ever_fast_enough(left: float, size: int, saves: list[Took]) -> None:
    found = verdict(left, size, saves)
    assert found.reason
    if any(one.seconds <= left for one in saves) and left > 0:
        assert found.save, "as fast as one that was"
    if left > 0 and any(one.seconds * max(size, SMALL) <= 0.999 * left * max(one.bytes, SMALL) for one in saves):
        assert found.save, "as many bytes a second as one that had"
    if not saves and left > 0:
        assert found.save, "nothing is known"
    if not found.save and left > 0:
        assert saves and all(one.seconds > left for one in saves) and f"{left:.3g} s" in found.reason
    if left <= 0:
        assert not found.save


@given(st.integers(0, 1 << 40), SAVES)
def test_I20_where_nobody_knows_the_grace_a_save_is_begun(size: int, saves: list[Took]) -> None:
    assert verdict(None, size, saves).save


@given(SECONDS, SECONDS, st.integers(0, 1 << 40), st.integers(0, 1 << 40), SAVES, SAVES)
def test_more_time_smaller_saves_and_more_of_them_never_speak_against_one(
    left: float, more: float, size: int, other: int, saves: list[Took], further: list[Took]
) -> None:
    if verdict(left, size, saves).save:
        assert verdict(left + more, size, saves).save
        assert verdict(left, min(size, other), saves).save
        assert not saves or verdict(left, size, saves + further).save


def test_I20_the_bound_is_sharp_and_a_save_beside_training_counts_for_less() -> None:
    big = 1 << 30
    alone = [Took(big, 10.0)]
    assert verdict(10.0, big, alone).save and not verdict(9.99, big, alone).save
    assert verdict(5.0, big // 2, alone).save and not verdict(4.99, big // 2, alone).save
    assert not verdict(9.99, 10 * big, alone).save, "a larger one isn't taken to be slower, nor faster"
    assert not verdict(9.99, 10, [Took(9000, 10.0)]).save, "with few bytes it isn't the bytes that take the time"
    assert fastest(big, [Took(big, 10.0, beside=True)]) == 10.0 / BESIDE
    assert fastest(big, []) is None


@given(st.text("0123456789.-+einfas \n", max_size=6))
def test_whatever_somebody_says_is_seconds_or_is_told(text: str) -> None:
    seconds, wrong = find({GRACE: text})
    assert (seconds is None) or (0 < seconds < math.inf and not wrong)
    assert bool(wrong) == (seconds is None and bool(text.strip()))


@pytest.mark.parametrize("text", ["30s", "0", "-1", "nan", "inf", "1e999", "soon"])
def test_a_wrong_grace_is_named_and_ignored(text: str) -> None:
    seconds, wrong = find({GRACE: text})
    assert seconds is None and GRACE in wrong and repr(text) in wrong
    assert find({GRACE: " 30 "}) == (30.0, "") and find({}) == (None, "")


ANYTHING = st.none() | st.integers() | st.floats() | st.sampled_from(["saved", "started"])
LINES = st.dictionaries(
    st.sampled_from(["event", "bytes", "seconds", "spent"]),
    ANYTHING | st.dictionaries(st.just("stall"), ANYTHING),
    max_size=4,
)


@given(st.lists(LINES | st.fixed_dictionaries({"event": st.just("saved"), "bytes": ANYTHING, "seconds": ANYTHING})))
def test_any_journal_is_read(events: list[dict[str, Any]]) -> None:
    for one in measured(events):
        assert one.bytes > 0 and one.seconds >= 0
    assert verdict(1.0, 1, measured(events)).reason


def test_what_the_journal_says_of_saves() -> None:
    old = {"event": "saved", "bytes": 9, "seconds": 9.0, "spent": {"stall": 9.0}}
    alone = {"event": "saved", "bytes": 5, "seconds": 2.0, "spent": {"stall": 2.0}}
    beside = {"event": "saved", "bytes": 5, "seconds": 2.0, "spent": {"stall": 0.1}}
    assert measured([old, {"event": "started"}, alone, beside]) == (Took(5, 2.0), Took(5, 2.0, beside=True))


# ---- a run's writer --------------------------------------------------------------------------


def begun(root: Path, ago: float | None, grace: float | None, **options: Any) -> Manager:
    """A run whose SIGTERM came so many seconds ago."""
    made = Manager(root=root, **options)
    made.open()
    made.begin_fresh()
    came = None if ago is None else time.monotonic() - ago
    made.grace.seconds, made.grace.since = grace, lambda: came
    return made


def save(made: Manager, step: int, **more: Any) -> Any:
    record = made.save(step, stage(step), estimate=4096, environment={}, arguments={}, facts={}, **more)
    made.retain()
    return record


def events(root: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in journal.read(root) if line["event"] == event]


def slower(root: Path) -> None:
    """As if every save so far had been made on a very slow disk."""
    path = root / ".lastgood" / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["event"] == "saved":
            line["seconds"] = line["spent"]["stall"] = 1e6
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_I20_what_cannot_fit_is_left_out_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = begun(tmp_path, None, 600.0, on_error="raise")
    assert save(made, 1) is not None
    slower(tmp_path)
    came = time.monotonic()
    made.grace.since = lambda: came
    assert save(made, 2) is not None, "a save that isn't the last is never weighed"
    slower(tmp_path)
    assert save(made, 3, now=True) is None and save(made, 3, now=True) is None
    made.close("preempted")
    (told,) = events(tmp_path, "skipped")
    assert told["step"] == 3 and REFUSED in told["reason"] and caplog.text.count("step 3 was not saved") == 1
    for word in ("earlier checkpoints are intact", "hint: a longer grace", f"{GRACE}=600", "1e+06 s"):
        assert word in caplog.text
    assert steps(tmp_path) == [1, 2] and Manager(root=tmp_path).find("last").record.step == 2


@pytest.mark.parametrize(("ago", "grace"), [(None, 600.0), (5.0, None), (5.0, 600.0)])
def test_I20_what_may_fit_is_saved(ago: float | None, grace: float | None, tmp_path: Path) -> None:
    made = begun(tmp_path, ago, grace)
    assert save(made, 1, now=True) is not None and save(made, 2, now=True) is not None
    made.close()
    assert steps(tmp_path) == [1, 2]


def test_I20_behind_the_grace_nothing_is_begun(tmp_path: Path) -> None:
    made = begun(tmp_path, None, 600.0)
    save(made, 1)
    made.grace.since = lambda: time.monotonic() - 601
    assert save(made, 2) is None and save(made, 2, now=True) is None
    made.close()
    assert steps(tmp_path) == [1] and events(tmp_path, "skipped")[0]["reason"] == "the grace is all but over"


@pytest.mark.parametrize("background", [None, Background()])
def test_I20_a_short_grace_leaves_deletion_to_the_next_save(background: Any, tmp_path: Path) -> None:
    made = begun(tmp_path, 595.0, 600.0, keep=Keep(last=1), background=background)
    for step in (1, 2, 3):
        save(made, step, now=True)
    made.close("preempted")
    assert steps(tmp_path) == [1, 2, 3]
    made.open()
    made.begin_from(made.find("last").record)
    made.grace.since = lambda: None
    save(made, 4)
    made.close()
    assert steps(tmp_path) == [4]


def test_I20_I13_what_retention_put_out_of_sight_is_swept_at_the_next_start(tmp_path: Path) -> None:
    made = begun(tmp_path, 595.0, 600.0)
    grave = tmp_path / ".lastgood" / "tmp" / "0123456789abcdef"
    grave.mkdir(parents=True)
    (grave / "model.safetensors").write_bytes(b"w")
    made._dissolve([grave])
    made.close("preempted")
    assert grave.exists(), "no time for that"
    made.open()
    made.close()
    assert not grave.exists()


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 9))
def test_pieces_are_the_same_bytes(chunks: list[bytes], piece: int) -> None:
    asked: list[int] = []
    found = list(checked([memoryview(chunk) for chunk in chunks], lambda: asked.append(1), piece))
    assert b"".join(found) == b"".join(chunks) and len(asked) == len(found)
    assert all(0 < len(one) <= piece for one in found)


class Hanging(fs.FileSystem):
    """A disk on which nothing becomes durable any more, once it hangs."""

    def __init__(self) -> None:
        self.hangs, self.waiting, self.over = False, threading.Event(), threading.Event()

    def sync(self, handle: int) -> None:
        if self.hangs and threading.current_thread().name.startswith("lastgood"):
            self.waiting.set()
            self.over.wait()
        super().sync(handle)


def test_I20_a_save_that_never_ends_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the background, on a disk that hangs: without a grace it is waited for."""
    disk = Hanging()
    with fs.using(disk):
        made = begun(tmp_path, None, 1.0, background=Background())
        save(made, 1)
        made.settle()
        disk.hangs = True
        save(made, 2)
        assert disk.waiting.wait(120)
        came = time.monotonic()
        made.grace.since = lambda: came
        made.settle()
        assert save(made, 3, now=True) is None, "the writer is still at the one before"
        made.close("preempted")
        assert steps(tmp_path) == [1] and "NO CHECKPOINT at step 2" in caplog.text
        disk.over.set()
        assert made._writer.wait(120)
    assert [(e["event"], e["step"]) for e in journal.read(tmp_path) if "reason" in e or "error" in e] == [
        ("skipped", 3), ("failed", 2),
    ]  # fmt: skip


def test_the_signal_of_a_program_that_handles_it_itself() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        over = Overheard()
        over.begin()
        assert over.at is None
        os.kill(os.getpid(), signal.SIGTERM)
        first = over.at
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2 and first is not None and over.at == first <= time.monotonic()
        over.end()
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(heard) == 3 and signal.getsignal(signal.SIGTERM) != over._note
    finally:
        signal.signal(signal.SIGTERM, before)


def test_grace_counts_from_the_signal() -> None:
    came: list[float] = []
    grace = Grace(10.0, lambda: came[0] if came else None)
    assert grace.left is None and not grace.over and not grace.short and grace.usable is None
    came.append(time.monotonic() - 4)
    assert 0 < (grace.usable or 0) < (grace.left or 0) <= 6 and grace.short and not grace.over
    came[0] -= 5.5
    assert grace.over and grace.late() is not None


# ---- real processes --------------------------------------------------------------------------


class Slow(fs.FileSystem):
    """A disk that takes so many seconds for each call that makes something durable, and for each that writes."""

    def __init__(self, sync: float, write: float = 0.0) -> None:
        self.seconds, self.pause = sync, write

    def sync(self, handle: int) -> None:
        time.sleep(self.seconds)
        super().sync(handle)

    def write(self, handle: int, data: bytes | memoryview) -> int:
        time.sleep(self.pause if len(data) > 1 << 20 else 0.0)
        return super().write(handle, data)


class Asks(TrainerCallback):
    """SIGTERM to this process in the middle of the step behind this one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def trainer(root: Path, disk: fs.FileSystem) -> None:
    """Saves step 2, and is asked to leave in the next one."""
    with fs.using(disk):
        case = Case("grace", args={"max_steps": 9})
        lastgood.manage(case.trainer(root, Asks(2))).train(resume_from_checkpoint="auto")


def lightning(root: Path, disk: fs.FileSystem) -> None:
    """The same with a Lightning trainer."""
    with fs.using(disk):
        lightnings.Case("grace").fit(root, lightnings.Signal(3))


def loop(root: Path, disk: Any, size: int = 4, then: str = "", **options: Any) -> None:
    """The same with a loop. then: "hangs" while the next step is saved, too; "first": there is no save before."""
    model = torch.nn.Linear(size, size, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        fs.using(disk),
        lastgood.CheckpointManager(root, model=model, optimizer=optimizer, **options) as ckpt,
    ):
        start = ckpt.restore()
        for step in range(start, 9):
            if step == 2 > start and then != "first":
                assert ckpt.save() is not None
                ckpt.settle()
            if step == 3:
                if then == "hangs":
                    disk.hangs = True
                    ckpt.save()
                os.kill(os.getpid(), signal.SIGTERM)
            ckpt.step(step + 1)


class Asking(fs.FileSystem):
    """SIGTERM to this process once, while a save of the run is being made durable."""

    def __init__(self, root: Path) -> None:
        self.tmp, self.asked = root / ".lastgood" / "tmp", False

    def sync(self, handle: int) -> None:
        if not self.asked and self.tmp.is_dir() and list(self.tmp.iterdir()):
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)
        super().sync(handle)


def left(log: Path, work: Callable[..., None], *args: Any, **kwargs: Any) -> str:
    """Run it in a process of its own, which has to leave with 75; what it said."""
    status = forked.run(work, *args, log=log, **kwargs)
    assert status == 75, (status, log.read_text())
    return log.read_text()


@pytest.mark.parametrize("front", [loop, trainer, lightning])
def test_I20_with_the_variable_alone_a_save_that_cannot_fit_is_not_begun(
    front: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each save takes several times the whole grace."""
    root = tmp_path / "run"
    monkeypatch.setenv(GRACE, "0.02")
    said = left(tmp_path / "slow", front, root, Slow(0.1))
    assert "was not saved: " in said and "hint: a longer grace" in said and "Traceback" not in said
    assert steps(root) == [2] and Manager(root=root).find("last").record.step == 2
    monkeypatch.setenv(GRACE, "600")
    said = left(tmp_path / "quick", front, root, fs.FileSystem())
    assert "was not saved" not in said and max(steps(root)) > 2, "there is time"


@pytest.mark.parametrize("front", [loop, trainer])
def test_I20_asked_during_a_save_it_leaves_behind_that_save(front: Callable[..., None], tmp_path: Path) -> None:
    root, options = tmp_path / "run", {"save_steps": 1} if front is loop else {}
    said = left(tmp_path / "log", front, root, Asking(root), **options)
    assert steps(root) == [1 if front is loop else 2], said


def test_I20_a_wrong_grace_is_said_once_and_counts_as_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(GRACE, "two minutes")
    for name in ("a", "b"):
        made = Manager(root=tmp_path / name)
        made.open()
        assert made.grace.seconds is None
        made.close()
    assert caplog.text.count("LASTGOOD_GRACE='two minutes' is no number of seconds") == 1


def test_I20_a_save_that_takes_too_long_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first save of all, of which nobody knows what it takes: longer, at 0.4 s for each piece, than the grace."""
    root = tmp_path / "run"
    monkeypatch.setenv(GRACE, "1")
    said = left(tmp_path / "log", loop, root, Slow(0.0, 0.4), size=4096, then="first")
    assert "NO CHECKPOINT at step 4: it was still being written when the 1 s after SIGTERM" in said
    assert steps(root) == [] and events(root, "preempted") and not events(root, "saved")
    monkeypatch.setenv(GRACE, "600")
    left(tmp_path / "log", loop, root, fs.FileSystem(), size=4096)
    assert steps(root) == [2, 4] and not list((root / ".lastgood" / "tmp").iterdir()), "swept at the next start"


def test_I20_a_process_leaves_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save is under way in the background when the process is asked to leave."""
    root = tmp_path / "run"
    monkeypatch.setenv(GRACE, "1")
    said = left(tmp_path / "log", loop, root, Hanging(), then="hangs", background=True, timeout=50)
    assert "NO CHECKPOINT at step 3" in said and "step 4 was not saved: the grace is all but over" in said
    assert steps(root) == [2] and Manager(root=root).find("last").record.step == 2


# ---- under `lastgood run` --------------------------------------------------------------------


def endless(root: Path) -> None:
    """A loop that saves its second step, and goes on until it is asked to leave."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lastgood.CheckpointManager(root, model=model, optimizer=optimizer) as ckpt:
        start = ckpt.restore()
        for step in range(start, 10**9):
            ckpt.step(step + 1)
            if step == start + 1:
                ckpt.save()
                (root / "ready").touch()
            time.sleep(0.01)


class Ready(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == 2
        if state.global_step == 3:
            (Path(args.output_dir) / "ready").touch()
        time.sleep(0.01)


def endless_trainer(root: Path) -> None:
    """The same with a managed Trainer."""
    case = Case("ready", args={"max_steps": 10**6, "save_steps": 10**6, "logging_steps": 10**6})
    lastgood.manage(case.trainer(root, Ready())).train(resume_from_checkpoint="auto")


def asked(root: Path, work: Callable[[Path], None], *, slow: bool, **environment: str) -> str:
    """Launched by `lastgood run --grace 60`, which is asked to stop once it is ready; what was said."""
    line = [sys.executable, "-m", "lastgood", "-C", str(root), "run", "--grace", "60", "--"]
    child = {**os.environ, "PYTHONPATH": f"{HERE.parent / 'src'}", **environment}
    root.mkdir(exist_ok=True)
    with (
        launched.command(lambda arguments: work(Path(arguments[0])), root.parent) as command,
        subprocess.Popen([*line, *command, str(root)], env=child, stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            until = time.monotonic() + 240
            while not (root / "ready").exists():
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.02)
            (root / "ready").unlink()
            if slow:
                slower(root)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=240)
        finally:
            process.kill()
    (root.parent / "s").unlink()
    assert process.returncode == 75, said
    assert "killed" not in said and "Traceback" not in said, said
    return said


def test_I20_a_loop_under_lastgood_run_knows_the_grace(tmp_path: Path) -> None:
    root = tmp_path / "run"
    said = asked(root, endless, slow=False)
    assert "was not saved" not in said and len(steps(root)) == 2, "there is time for the state behind the step"
    before = steps(root)
    said = asked(root, endless, slow=True, LASTGOOD_GRACE="59")
    assert REFUSED in said and f"({GRACE}=59)" in said, "the shorter one counts"
    assert steps(root) == [*before, before[-1] + 2]
    assert Manager(root=root).find("last").record.step == before[-1] + 2


def test_I20_a_trainer_under_lastgood_run_knows_the_grace(tmp_path: Path) -> None:
    root = tmp_path / "run"
    said = asked(root, endless_trainer, slow=True)
    assert REFUSED in said and f"({GRACE}=60)" in said
    assert steps(root) == [2] and Manager(root=root).find("last").record.step == 2
