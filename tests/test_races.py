"""Several processes at one run: whoever is late is told so, and nothing of anybody is lost."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from lastgood.errors import NoCheckpoint, RunLocked, SaveFailed, Unreadable
from lastgood.manager import Manager
from lastgood.repo import pins
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from lastgood.store.fs import AnyPath
from lastgood.testing import Crash, Fault, Faulty, FileSystem, using
from test_crash_points import manager, prepared, save, stage

from faults.races import SCENARIOS, race, schedules, train

EACH = 17
"""Schedules of each scenario: `python -m faults.races` tries thousands."""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_I10_I13_I15_I16_any_order(scenario: str) -> None:
    assert sum(race(text) for text in schedules(0, EACH, scenario)) >= 2 * EACH


def test_the_same_seed_is_the_same_schedule(tmp_path: Path) -> None:
    """Who gets the run and what is saved, down to the ids: they are drawn from the seed as well."""
    import random

    from faults.turns import play

    histories = []
    for place in (tmp_path / "one", tmp_path / "two"):
        (place / "run").mkdir(parents=True)
        root = place / "run"
        told = play([lambda root=root: train(root, 2, takeover=True)] * 3, place, random.Random(5))  # type: ignore[misc]
        histories.append([(t.get("value"), t.get("error")) for t in told])
    assert histories[0] == histories[1]


class Meanwhile(FileSystem):
    """Before `checkpoint-4` gets its name, somebody else publishes one under it and sweeps."""

    workers = 1

    def __init__(self, root: Path) -> None:
        self.root = root

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        if Path(target).name == "checkpoint-4":
            shutil.copytree(self.root / "checkpoint-3", target)
            shutil.rmtree(source)
        super().rename(source, target)


def test_I15_a_save_that_fails_takes_nothing_of_another_writer_with_it(tmp_path: Path) -> None:
    prepared(tmp_path)
    made = manager(tmp_path)
    with using(Meanwhile(tmp_path)), pytest.raises(SaveFailed):
        save(made, 4)
    assert (tmp_path / "checkpoint-4" / "lastgood.json").is_file()
    made.close()


class Taken(FileSystem):
    """While the data of a save is made durable, another process takes the run over and saves the same step."""

    workers = 1

    def __init__(self, root: Path) -> None:
        self.root, self.done = root, False

    def sync(self, handle: int) -> None:
        super().sync(handle)
        if not self.done:
            self.done = True
            train(self.root, 1, takeover=True)


def test_I15_who_is_fenced_off_in_the_middle_of_a_save_publishes_nothing(tmp_path: Path) -> None:
    prepared(tmp_path)
    made = manager(tmp_path)
    with using(Taken(tmp_path)), pytest.raises(RunLocked, match="took over"):
        save(made, 4)
    assert [(r.step, r.seq) for r in records(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    made.close()


def test_I15_who_was_fenced_off_moves_the_run_nowhere(tmp_path: Path) -> None:
    prepared(tmp_path)
    first = Manager(root=tmp_path, on_error="raise")
    first.open()
    start = records(tmp_path)[0]
    train(tmp_path, 1, takeover=True)
    for act in (first.begin_fresh, lambda: first.begin_from(start), lambda: first.quarantine(("checkpoint-1",))):
        with pytest.raises(RunLocked, match="took over"):
            act()
    assert [(r.state, r.current) for r in records(tmp_path)] == [("full", True)] * 4
    first.close()


def test_I3_what_could_not_be_read_for_a_moment_is_not_moved_away(tmp_path: Path) -> None:
    prepared(tmp_path)
    made = manager(tmp_path)
    (tmp_path / "checkpoint-2" / "resume.json").write_bytes(b"[]")
    for point in range(1, 200):
        with using(Faulty(Fault(point, "EMFILE"), reads=True)), suppress(Unreadable, NoCheckpoint):
            assert made.find("last").record.step == 3, "what can't be read now is no reason to take an older one"
    made.quarantine(("checkpoint-3", "checkpoint-2"))
    assert [r.name for r in records(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    made.close()


def test_I13_half_written_names_and_cards_are_swept(tmp_path: Path) -> None:
    prepared(tmp_path)
    first = records(tmp_path)[0].id

    def note() -> None:
        pins.write_note(tmp_path, first, "good")

    for act in (lambda: pins.add(tmp_path, first, "release"), note, Manager(root=tmp_path).open):
        with using(Faulty(Fault(3, "crash-before"))), pytest.raises(Crash):
            act()
    assert len(list((tmp_path / HIDDEN).glob(".*.json.*"))) == 3
    manager(tmp_path).close()
    assert not list((tmp_path / HIDDEN).glob(".*"))


def test_a_card_that_can_not_be_removed_holds_no_run(tmp_path: Path) -> None:
    prepared(tmp_path)
    made = manager(tmp_path)
    for point in range(1, 20):
        with using(Faulty(Fault(point, "EIO"))) as _:
            try:
                made.close()
            except OSError:
                break
    manager(tmp_path).close()


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_I19_a_card_that_can_not_be_read_stops_no_training(on_error: str, tmp_path: Path) -> None:
    """It used to be taken for a takeover, which ends the training whatever on_error says."""
    prepared(tmp_path)
    made = manager(tmp_path, last=2)
    made.on_error = on_error  # type: ignore[assignment]
    with using(Faulty(Fault(1, "EMFILE", sticky=True), reads=True)):
        made.retain()
        if on_error == "raise":
            with pytest.raises(SaveFailed):
                save(made, 4)
        else:
            made.save(4, stage(4), estimate=1, environment={}, arguments={}, facts={})
    assert save(made, 5) is not None
    made.close()


def test_I19_a_look_that_fails_for_a_moment_ends_no_training(tmp_path: Path) -> None:
    """With no descriptor left the best isn't known for a moment; what is deleted later rests on another look."""
    prepared(tmp_path)
    made = manager(tmp_path)
    counted = Faulty(reads=True)
    with using(counted):
        assert len(made.seen()) == 3
    for point in range(1, len(counted.calls) + 1):
        with using(Faulty(Fault(point, "EMFILE"), reads=True)):
            assert len(made.seen()) == 3, "there is one that can't be read, and the others"
        with using(Faulty(Fault(point, "EMFILE"), reads=True)), suppress(Unreadable):
            assert [record.state for record in made.records()] == ["full"] * 3, "sure of it, or an error"
    with using(Faulty(Fault(1, "ESTALE", sticky=True), reads=True)):
        assert made.retain() == ()
    assert [decision.action for decision in made.retain()] == ["keep"] * 3
    made.close()
