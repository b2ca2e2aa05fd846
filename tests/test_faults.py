"""A sample of the harness in faults/: every operation in every lane. `scripts/faults` runs all of its points."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lastgood.repo import verify
from lastgood.repo.read import records
from lastgood.testing import Model, Recorder, cuts, using

from faults import lanes
from faults.acts import take_in
from faults.mutants import MUTANTS, PACKAGE
from faults.operations import OPERATIONS, Operation
from faults.runs import stock

# No multiples of how many kinds of errors there are: one kind alone would be tried.
EVERY = {"crash": 23, "error": 331, "power": 163, "twice": 1409, "look": 1201}


def tried(lane: str, operation: Operation, scratch: Path) -> None:
    bench = lanes.Bench(operation, scratch)
    some = list(lanes.points(lane, bench, EVERY[lane]))
    bad = {point: wrong for point in some if (wrong := lanes.run(lane, bench, point))}
    assert some and not bad, "\n".join(f'"{lane} {operation.name} {point}": {wrong}' for point, wrong in bad.items())


every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


@every_operation
def test_I1_I3_I10_I11_I13_a_crash_at_a_call(operation: Operation, quick: Path) -> None:
    tried("crash", operation, quick)


@every_operation
def test_I3_I5_I19_an_error_at_a_call(operation: Operation, quick: Path) -> None:
    tried("error", operation, quick)


@every_operation
def test_I1_I2_a_power_cut(operation: Operation, quick: Path) -> None:
    tried("power", operation, quick)


@every_operation
def test_I4_a_crash_in_the_recovery_from_a_crash(operation: Operation, quick: Path) -> None:
    tried("twice", operation, quick)


@every_operation
def test_I1_I6_a_look_that_fails(operation: Operation, quick: Path) -> None:
    tried("look", operation, quick)


@pytest.mark.parametrize(
    ("operation", "call", "least"),
    [("save_lazily(three)", "touch", 3), ("save_spoilt(three)", "touch", 3), ("save_and_free(three)", "truncate", 5)],
)
def test_lanes_stop_in_the_middle_of_a_copy_and_of_a_file_that_is_given_back(
    operation: str, call: str, least: int, quick: Path
) -> None:
    assert lanes.Bench(lanes.named(operation), quick).calls.count(call) >= least


def test_every_mutant_has_something_to_change() -> None:
    """A mutant whose text is gone shows nothing any more."""
    for mutant in MUTANTS:
        count = (PACKAGE / mutant.file).read_text().count(mutant.old)
        assert count == 1, f"{mutant.name}: {mutant.file} has that text {count} times"
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("model", ["ordered", "posix"])
def test_I1_I2_what_a_trainer_did_not_sync_is_durable_once_it_is_adopted(model: Model, quick: Path) -> None:
    """The lanes above take what an operation finds for durable; a Trainer's files need not be."""
    root, state = quick / "run", quick / "state"
    root.mkdir()
    disk = Recorder(root)
    stock(root)
    with using(disk):
        take_in(root)
    tried, there = 0, 0
    for cut in cuts(disk.before, disk.events, model):
        shutil.rmtree(state, ignore_errors=True)
        cut.write(state)
        found = [record for record in records(state) if record.manifest is not None]
        for record in found:
            assert verify.problems(state, record, full=True) == (), f"{record.name}: {cut.after}, {cut.label}"
        tried, there = tried + 1, len(found)
    assert tried > 50
    assert there == 3, "it had returned"
