"""The lanes that need the kernel's help, sampled: calls seen by ptrace, power cuts of real disks, disks that fail.

`python -m faults.traced`, `faults.cuts` and `faults.blocks` run every point.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from faults import blocks, cuts, disks, peers, traced, tracer

needs_tracing = pytest.mark.skipif(bool(tracer.missing()), reason=tracer.missing() or "-")
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(kind in cuts.missing(), reason=cuts.missing().get(kind) or "-"))
    for kind in disks.MAKE
]
needs_blocks = pytest.mark.skipif(bool(blocks.missing()), reason=blocks.missing() or "-")


def sampled(points: list[str], count: int) -> list[str]:
    """Evenly spread, the last one among them; all with EVERY_POINT=1."""
    return points if os.environ.get("EVERY_POINT") else points[:: -max(1, len(points) // count)][::-1]


def three_threads(place: Path) -> None:
    """Each makes a file of its own; one after the other, so that there is one order."""

    def make(name: str) -> None:
        (place / name).write_text(name)

    for name in "abc":
        thread = threading.Thread(target=make, args=(name,))
        thread.start()
        thread.join()


@needs_tracing
def test_a_process_is_killed_before_the_call_that_was_meant_in_whatever_thread(tmp_path: Path) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    calls = tracer.trace(lambda: three_threads(place), place, log).calls
    assert [(str(call), call.thread) for call in calls] == [
        (f"{name} {file}", thread) for thread, file in enumerate("abc", 1) for name in ("openat", "write")
    ]
    for point in range(1, 7):
        for file in place.iterdir():
            file.unlink()
        done = tracer.trace(lambda: three_threads(place), place, log, tracer.kill_at(point))
        assert done.status == -signal.SIGKILL
        assert [str(call) for call in done.calls] == [str(call) for call in calls[:point]]
        there = {file.name: file.read_text() for file in place.iterdir()}
        full, opened = "abc"[: (point - 1) // 2], "abc"[: point // 2]
        assert there == {name: name if name in full else "" for name in opened}, "the call was made all the same"


@needs_tracing
def test_I1_I3_a_loop_killed_before_calls_of_all_of_its_threads_resumes() -> None:
    for point in sampled(traced.points("loop"), 6):
        assert traced.run(point) == "", point


@needs_tracing
@pytest.mark.parametrize(("subject", "kind"), [("torch-over", "lost"), ("torch-new", "crashed"), ("dcp-over", "lost")])
def test_what_tears_a_checkpoint_is_seen(subject: str, kind: str) -> None:
    """The same judge over savers that are known to be torn: it isn't good because it sees nothing."""
    writes = [n for n, call in enumerate(traced.bench(subject).straight().trace.calls, 1) if call.name != "mkdir"]
    assert traced.bench(subject).verdict(writes[0]) == "older"
    assert traced.bench(subject).verdict(writes[2]) == kind
    assert traced.run(f"{subject}:{writes[2]}") == traced.KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_takes_what_was_not_made_durable(kind: str, tmp_path: Path) -> None:
    def fill(at: Path) -> None:
        (at / "file").write_text("old")

    image = disks.prepared(kind, tmp_path / "image", fill)
    with disks.mounted(image, tmp_path / "at") as disk:
        (disk.at / "new").write_text("new")
        os.replace(disk.at / "new", disk.at / "file")
        (disk.at / "beside").write_text("beside")
        disk.cut()
        with pytest.raises(OSError, match=f"Errno {errno.EIO}"):
            (disk.at / "more").touch()
    with disks.mounted(image, tmp_path / "at") as disk:
        assert (disk.at / "file").read_text() == "old"
        assert not (disk.at / "beside").exists()
        (disk.at / "beside").write_text("beside")
        disk.commit()
        disk.cut()
    with disks.mounted(image, tmp_path / "at") as disk:
        assert (disk.at / "beside").read_text() == "", "a name that was kept without its content"


@pytest.mark.parametrize("moment", cuts.MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_I1_I2_I3_a_power_cut(kind: str, moment: str) -> None:
    for name, count in (("save_and_prune(three)", 3), ("undo(stripped)", 1)):
        mine = [point for point in cuts.points([kind], [name]) if point.split(" ")[1] == moment]
        for point in sampled(mine, count):
            assert cuts.run(point) == "", point


@pytest.mark.parametrize("kind", KINDS)
def test_I2_a_power_cut_after_a_save_of_a_loop_returned(kind: str) -> None:
    for moment in cuts.MOMENTS:
        assert peers.run(f"loop {kind} {moment}") == "", moment


@needs_blocks
def test_I5_I19_a_disk_that_fails_under_fsync() -> None:
    calls = cuts.bench("ext4", "next_save(three)").calls
    syncs = [call for call in calls if call.startswith("fsync")]
    data, manifest = (next(n for n, s in enumerate(syncs, 1) if name in s) for name in ("model", "/lastgood.json"))
    for how, point in (("sticky", data), ("once", data), ("sticky", manifest), ("sticky", len(syncs))):
        assert blocks.run(f"next_save(three) {how} {point}") == "", syncs[point - 1]


@needs_blocks
def test_I5_who_asks_a_failed_fsync_again_is_seen(tmp_path: Path) -> None:
    image = disks.make("ext4", tmp_path / "image")
    with blocks.failing(image, tmp_path) as block, disks.mounted(block.device, tmp_path / "at") as disk:

        def ask_twice() -> None:
            with (disk.at / "file").open("wb") as file:
                file.write(b"data" * 1024)
                file.flush()
                for _ in range(2):
                    with suppress(OSError):
                        os.fsync(file.fileno())

        calls = tracer.trace(ask_twice, disk.at, tmp_path / "log", blocks.Break(1, block, once=True)).calls
        assert next(call.result for call in calls if call.name == "fsync") == -errno.EIO
        assert "tried again" in blocks.again(calls)
