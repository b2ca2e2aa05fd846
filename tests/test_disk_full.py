"""Real file systems without room: what is there stays, what fails says so, what must go on goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lastgood.adoption import candidates
from lastgood.cli.held import held
from lastgood.errors import LastgoodError, NotEnoughSpace
from lastgood.manager import RESERVE, Manager
from lastgood.policy import Decision
from lastgood.repo import bin, gc, metrics, pins, reserve, verify
from lastgood.repo.adopt import adopt
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from lastgood.repo.staging import Staging
from lastgood.view import look
from test_crash_points import contents, manager, save, stage

from faults import space

POINTS = [p for p in space.points() if os.environ.get("EVERY_POINT") or p.left < 2 or p.number % 8 == 0]


# ---- each operation with each rest ---------------------------------------------------------


def prepared(root: Path, operation: str) -> None:
    """Three checkpoints, or four of which two were pruned and one stripped for an undo; adopt: a stock Trainer's."""
    if operation == "adopt":
        import torch

        for step in (1, 2):
            place = root / f"checkpoint-{step}"
            place.mkdir(parents=True)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.save({"step": step}, place / name)
            (place / "config.json").write_text("{}")
            (place / "trainer_state.json").write_text(f'{{"global_step": {step}, "log_history": []}}')
            (place / "model.safetensors").write_bytes(_safetensors())
        (root / HIDDEN).mkdir()
        return
    made = manager(root)
    for step in (1, 2, 3):
        save(made, step)
    made.close()
    if operation == "undo":
        found = records(root)
        decisions = [Decision(found[0], "delete", ("asked for",)), Decision(found[1], "strip", ("asked for",))]
        with held(root, False):
            gc.execute(root, gc.plan(found, decisions), undoable=bin.begin(root, "prune"))


def _safetensors() -> bytes:
    from safetensors.torch import save as encoded

    return encoded({"w": torch.ones(8)})


def operate(operation: str, root: Path, full: Callable[[], None]) -> object:
    """Do it, on a disk that `full` fills up at the moment that counts."""
    found = records(root)
    if operation in ("save", "save and prune"):
        made = manager(root, **({"last": 2} if operation == "save and prune" else {}))

        def write(staging: Staging) -> None:
            full()
            stage(4)(staging)

        try:
            return made.save(4, write, estimate=1, environment={}, arguments={}, facts={})
        finally:
            made.retain()
            made.close()
    full()
    if operation == "tag":
        return pins.add(root, found[0].id, "mine")
    if operation == "record":
        return metrics.record(root, found[0].id, 1, {"loss": 0.5})
    with held(root, False):
        if operation == "adopt":
            return adopt(root, candidates(look(root))[0])
        if operation == "undo":
            return bin.undo(root)
        action: Any = "delete" if operation == "prune" else "strip"
        chosen = [Decision(record, action, ("asked for",)) for record in found[:2]]
        return gc.execute(root, gc.plan(found, chosen))


def done(operation: str, root: Path) -> bool:
    """Whether it is as if the disk had been empty."""
    found = {record.step: record for record in records(root)}
    return {
        "save": lambda: found.keys() == {1, 2, 3, 4},
        "save and prune": lambda: found.keys() == {3, 4},
        "prune": lambda: found.keys() == {3},
        "strip": lambda: [found[step].state for step in (1, 2, 3)] == ["weights", "weights", "full"],
        "undo": lambda: [found[step].state for step in (1, 2, 3)] == ["full", "full", "full"],
        "tag": lambda: found[1].pinned == ("mine",),
        "adopt": lambda: [found[step].state for step in (1, 2)] == ["full", "full"],
        "record": lambda: found[1].metrics == {"loss": 0.5},
    }[operation]()


SURE = {"prune": ("pages", "inodes"), "strip": ("pages", "inodes"), "undo": ("pages", "inodes")}
"""What has to succeed as long as there is a reserve."""


@pytest.mark.parametrize("operation", space.OPERATIONS)
def test_I3_I12_every_operation_with_every_rest(operation: str, tmp_path: Path) -> None:
    size = 24 << 20 if "save" in operation else 4 << 20
    with space.disk(tmp_path / "disk", size=size) as there:
        if not there:
            pytest.skip("mounting a small tmpfs needs root")
        sweep(operation, tmp_path / "disk", tmp_path)


def sweep(operation: str, small: Path, tmp_path: Path) -> None:
    chosen = [point for point in POINTS if point.operation == operation]
    original = tmp_path / "original"
    prepared(original, operation)
    failures, root = 0, small / "run"
    for point in chosen:
        shutil.copytree(original, root)
        if not point.reserve and operation != "adopt":
            (root / HIDDEN / reserve.NAME).unlink()
        before, files = records(root), contents(root)
        rest = {"pages": point.left} if point.kind == "pages" else {"inodes": point.left}
        try:
            operate(operation, root, lambda rest=rest: space.leave(small, **rest))
            failed = False
        except (LastgoodError, OSError):
            failed = True
        failures += failed
        there = {record.id for record in records(root)}
        for record in records(root):
            assert record.state != "incomplete", (point, record)
            assert not record.ours or verify.problems(root, record, full=True) == (), (point, record)
        if operation == "prune" or (operation in SURE and point.reserve):  # a deletion needs no reserve
            assert not failed and done(operation, root), point
        elif failed and operation != "undo":
            kept = {r.id for r in before} - ({r.id for r in before[:1]} if operation == "save and prune" else set())
            assert kept <= there, point
            if operation in ("save", "tag", "adopt", "record"):
                now = {name: data for name, data in contents(root).items() if name.split("/")[0] != "checkpoint-4"}
                assert {name: now.get(name) for name in files} == files, point
        space.relieve(small)
        if operation in ("save", "save and prune"):
            made = manager(root)
            assert made.save(5, stage(5), estimate=1, environment={}, arguments={}, facts={}), point
            assert (root / HIDDEN / reserve.NAME).stat().st_blocks * 512 >= reserve.SIZE, "made again"
            made.close()
        elif not done(operation, root):
            operate(operation, root, lambda: None)
            assert done(operation, root), (point, "what was cut short can be done again")
        shutil.rmtree(root)
    # Half of them have too little: a sweep that never fails, or never succeeds, has not been over the edge.
    assert 0 < failures < len(chosen) or operation == "prune", f"{failures} of {len(chosen)}"


def test_a_commit_record_fits_into_the_reserve(small: Path) -> None:
    root = small / "run"
    made = manager(root)

    def write(staging: Staging) -> None:
        stage(1)(staging)
        staging.flush()
        space.leave(small, pages=0)

    assert made.save(1, write, estimate=1, environment={}, arguments={}, facts={}) is not None
    assert not (root / HIDDEN / reserve.NAME).exists(), "given up"
    assert verify.problems(root, records(root)[0], full=True) == ()
    made.close()


@pytest.mark.parametrize("change", range(-3, 4))
def test_I14_what_the_preflight_lets_through_fits(change: int, small: Path) -> None:
    """The rest of the disk is what the plan says, and a few pages more or less."""
    root = small / "run"
    made, size = manager(root), 2 << 20

    def write(staging: Staging) -> None:
        written.append(True)
        staging.data("model.safetensors", "model", os.urandom(size))
        staging.data("resume.json", "progress", b"{}")

    for step, estimate in ((1, size), (2, 0)):  # the second one knows nothing: what the first one took counts
        written: list[bool] = []
        space.leave(small, pages=(size + RESERVE - reserve.SIZE) // space.PAGE + change)
        try:
            record = made.save(step, write, estimate=estimate, environment={}, arguments={}, facts={})
            assert record is not None and record.size > size
        except NotEnoughSpace:
            assert not written
            assert change <= 0 or step == 2
        space.relieve(small)
        if step == 1 and not made.saved:
            assert made.save(step, write, estimate=size, environment={}, arguments={}, facts={})
    made.close()


def test_I14_a_save_that_takes_more_than_was_thought_teaches_the_next_one(small: Path, caplog: Any) -> None:
    made = Manager(root=small / "run")
    made.open()
    made.begin_fresh()
    tried = []

    def write(staging: Staging) -> None:
        tried.append(1)
        for number in range(40):
            staging.data(f"part-{number}", "model", bytes(1 << 20))

    space.leave(small, pages=(20 << 20) // space.PAGE)
    assert made.save(1, write, estimate=0, environment={}, arguments={}, facts={}) is None
    assert made.save(2, write, estimate=0, environment={}, arguments={}, facts={}) is None
    assert len(tried) == 1, "the second one was refused before a byte was written"
    assert "nothing was written" in caplog.text and "2 saves in a row found no room" in caplog.text
    made.close()
