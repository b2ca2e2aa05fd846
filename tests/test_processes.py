"""What happens to a process while it saves: signals at every moment, no memory left, a clock and names that change."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lastgood
import moments
from lastgood.manager import Manager
from lastgood.repo import journal, verify
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from lastgood.testing import FileSystem, using
from moments import SIGNALS, manager, prepared, save

import forked

STEPS = 6


def loop(root: Path, *numbers: int, point: int = 0) -> None:
    """A real loop; at its `point`-th call that changes the disk it sends itself the signals."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with (
        moments.signalled(point, *numbers),
        lastgood.CheckpointManager(
            root, save_steps=2, keep=lastgood.Keep(last=2, full=1), model=model, optimizer=optimizer
        ) as ckpt,
    ):
        begin = ckpt.restore()
        print("training", flush=True)
        for step in range(begin, STEPS):
            loss = model(torch.randn(2, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ckpt.step(step + 1, loss=loss)
        print("leaving", flush=True)
    everything = torch.cat([tensor.flatten() for tensor in model.state_dict().values()]).numpy().tobytes()
    (root.parent / "end").write_text(everything.hex())


@pytest.mark.parametrize("name", SIGNALS)
def test_I3_I20_signals_at_every_moment_of_a_run(name: str, quick: Path) -> None:
    """It ends as documented, every checkpoint is whole, and the same command ends as if nothing had happened."""
    loop(quick / "run")  # in this process: what torch imports late is there for all that are forked
    some = moments.points(1000, 37, first=5 + 4 * list(SIGNALS).index(name))
    hit = moments.survived(loop, name, some, quick, (quick / "end").read_text())
    assert hit > (50 if moments.EVERY else 2)


OPERATIONS: dict[str, Callable[[Manager, Path], Any]] = {
    "save": lambda made, root: save(made, 4),
    "find": lambda made, root: made.find("last"),
    "retain": lambda made, root: made.retain(),
    "look": lambda made, root: lastgood.open(root).latest(),
    "record": lambda made, root: made.record(3, {"eval_loss": 1.0}),
}


def starved(root: Path, what: str, point: int) -> None:
    """The operation, and no memory from its `point`-th allocation on; what it needs to import is there."""
    import _testcapi

    made = manager(root, last=2, full=1)
    made.saved[3] = records(root)[-1]
    warm = root.with_name("warm")
    prepared(warm)
    OPERATIONS[what](manager(warm, last=2, full=1), warm)
    operation = OPERATIONS[what]
    failed = True
    alone = FileSystem()
    alone.workers = 1  # Python waits for ever for a thread that had no memory to begin with
    # Anything may be raised: libraries and Python itself turn a missing object into errors of other kinds.
    _testcapi.set_nomemory(point, point + 1)
    try:
        with using(alone):
            operation(made, root)
        failed = False
    except BaseException:
        pass
    finally:
        _testcapi.remove_mem_hooks()
    os._exit(3 if failed else 0)


@pytest.mark.skipif(importlib.util.find_spec("_testcapi") is None, reason="this Python has no _testcapi")
@pytest.mark.parametrize("what", OPERATIONS)
def test_I3_no_memory_at_the_nth_allocation(what: str, quick: Path) -> None:
    original, root, log = quick / "original", quick / "run", quick / "log"
    original.mkdir()
    prepared(original)
    failures, point = 0, 0
    for point in moments.points(6000, 331):
        for name in ("run", "warm"):
            shutil.rmtree(quick / name, ignore_errors=True)
        shutil.copytree(original, root)
        status = forked.run(starved, root, what, point, log=log)
        assert status in (0, 3), f"{point}: {status}: {log.read_text()}"
        failures += status == 3
        found = records(root)
        assert all(verify.problems(root, record, full=True) == () for record in found if record.ours)
        assert not [record for record in found if record.state == "incomplete"]
        assert 3 in {record.step for record in found}, "the last good one"
        made = manager(root)
        assert made.find("last").record.step >= 3
        assert save(made, 9) is not None
        made.close()
    assert failures, "there was memory all the time"


def hungry(root: Path, group: str, size: int) -> None:
    """Takes the whole memory of its group while it saves."""
    from lastgood.format.tensors import Tensor
    from lastgood.repo.staging import Staging

    made = manager(root)
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    kept = []

    def write(staging: Staging) -> None:
        moments.stage(4)(staging)
        while True:
            kept.append(bytearray(os.urandom(1 << 12) * 256))
            staging.tensors(f"{len(kept)}.safetensors", "model", [Tensor("w", "U8", (512,), memoryview(bytes(512)))])
            assert len(kept) < 4 * size >> 20

    save(made, 4, write)


def test_I1_I3_killed_by_the_kernel_for_its_memory(tmp_path: Path) -> None:
    group = Path("/sys/fs/cgroup/memory") / f"lastgood-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory group can be made here: {error}")
    size = 64 << 20
    root, log = tmp_path / "run", tmp_path / "log"
    try:
        try:
            (group / "memory.limit_in_bytes").write_text(str(size))
        except OSError as error:
            pytest.skip(f"its limit can't be set: {error}")
        root.mkdir()
        prepared(root)
        before = {r.id: (root / r.name / "model.safetensors").read_bytes() for r in records(root)}
        assert forked.run(hungry, root, str(group), size, log=log) == -signal.SIGKILL, log.read_text()
        assert {r.id: (root / r.name / "model.safetensors").read_bytes() for r in records(root)} == before
        made = manager(root)
        assert made.find("last").record.step == 3
        assert save(made, 4) is not None
        assert os.listdir(root / HIDDEN / "tmp") == []
        made.close()
    finally:
        group.rmdir()


def elsewhere(root: Path, changes: dict[str, str]) -> None:
    """Goes on with the run under other settings of the machine; says what it found and kept."""
    import locale
    import socket
    import time

    os.environ.update(changes)
    time.tzset()
    try:
        locale.setlocale(locale.LC_ALL, "")
    except locale.Error:
        pass  # this machine doesn't have it; the variables count all the same
    if "HOSTNAME" in changes:
        named = changes["HOSTNAME"]
        socket.gethostname = lambda: named  # what a container that was moved sees
    made = manager(root, last=2, full=1)
    assert made.find("last").record.step == 3
    save(made, 4)
    made.close()
    print([(record.step, record.state, record.metrics) for record in records(root)])


@pytest.mark.parametrize(
    "changes",
    [{"LC_ALL": "tr_TR.UTF-8"}, {"LC_ALL": "C", "LANG": "C"}, {"TZ": "Pacific/Kiritimati"}, {"HOSTNAME": "İstanbul"}],
    ids=str,
)
@pytest.mark.parametrize("years", [-40, 60])
def test_I18_no_clock_time_zone_language_or_name_changes_anything(
    changes: dict[str, str], years: int, quick: Path
) -> None:
    root = quick / "run"
    root.mkdir()
    prepared(root)
    now = (root / "checkpoint-3").stat().st_mtime
    for turn, path in enumerate(sorted(root.rglob("*"))):
        when = max(0.0, now + years * 31_557_600 * (1 if turn % 2 else -1))
        os.utime(path, (when, when))
    assert forked.run(elsewhere, root, changes, log=quick / "log") == 0, (quick / "log").read_text()
    expected = [(3, "weights", {"eval_loss": 1.0}), (4, "full", {})]
    assert (quick / "log").read_text().splitlines()[-1] == str(expected)
    assert [event["event"] for event in journal.read(root)][-1] == "closed"
