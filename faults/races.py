"""Several processes at one run, in an order drawn from a seed.

python -m faults.races [--schedules N] [--first SEED] [--only NAME]
python -m faults.races writers:17                                      one of them again
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lastgood import policy, pruning
from lastgood.checkout import copy, model_files
from lastgood.cli.held import held
from lastgood.errors import LastgoodError, NoCheckpoint, RunLocked
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import bin, gc, leases, pins, poison, verify
from lastgood.repo.read import records
from lastgood.repo.staging import Staging
from lastgood.run import open as open_run
from lastgood.store import local
from lastgood.view import look

from faults import staged
from faults.turns import Actor, play

EVERYTHING = Keep()
Judge = Callable[[list[Any]], None]


def stage(staging: Staging) -> None:
    """Weights that tell whose they are."""
    for name, data in _content(staging.id).items():
        staging.data(name, staged.PART.get(name, "model"), data)


def _content(id: str) -> dict[str, bytes]:
    return staged.content(int(id[:4], 16), full=True)


def train(root: Path, saves: int, keep: Keep = EVERYTHING, *, takeover: bool = False) -> list[list[Any]]:
    """Become the writer, go on from the newest, save; [id, number] of each."""
    manager = Manager(root=root, keep=keep, on_error="raise")
    manager.open(takeover=takeover)
    done = []
    try:
        try:
            manager.begin_from(manager.find("last").record)
        except NoCheckpoint:
            manager.begin_fresh()
        for _ in range(saves):
            step = max((record.step for record in manager.records()), default=0) + 1
            record = manager.save(step, stage, estimate=1, environment={}, arguments={}, facts={})
            assert record is not None
            done.append([record.id, record.seq])
            if not keep.unlimited:
                manager.retain()
    except RunLocked:
        return done
    finally:
        manager.close()
    return done


def sound(root: Path, results: list[Any], *, all_stay: bool = True) -> None:
    """What was reported as saved is there; numbers are unique; everything is good; the next one goes on (I1, I15)."""
    found = {record.id: record for record in records(root)}
    assert all(record.ours for record in found.values()), [record.problem for record in found.values()]
    for record in found.values():
        assert verify.problems(root, record, full=True) == (), f"{record.name} is damaged"
    numbers = sorted(record.seq for record in found.values())
    assert numbers == sorted(set(numbers)), f"I15: two checkpoints have one number: {numbers}"
    told = [entry for result in results if result and "value" in result for entry in result["value"] or []]
    for id, number in told:
        if all_stay:
            assert id in found, f"I15: {id} was reported as saved, and isn't there"
            assert found[id].seq == number, f"I15: {id} was reported as number {number}"
    assert len({number for _, number in told}) == len(told), f"I15: one number for two saves: {told}"
    ((id, number),) = train(root, 1)
    assert number > max(numbers, default=0)
    newest = Manager(root=root).find("last").record
    assert newest.id == id, "I1: the newest isn't found"


# ---- what they do ------------------------------------------------------------------------


def writers(root: Path, draw: random.Random) -> tuple[list[Actor], Judge]:
    """Up to sixteen want the run at once; one may be killed."""
    count = draw.choice([2, 2, 3, 3, 4, 8, 16])
    return [lambda: train(root, 2) for _ in range(count)], lambda results: sound(root, results)


def storm(root: Path, draw: random.Random) -> tuple[list[Actor], Judge]:
    """Each takes the run over from the others."""
    count = draw.choice([2, 2, 3, 4])
    keep = draw.choice([Keep(), Keep(last=2)])
    every = [lambda: train(root, 2, keep, takeover=True) for _ in range(count)]
    return every, lambda results: sound(root, results, all_stay=keep.unlimited)


def readers(root: Path, draw: random.Random) -> tuple[list[Actor], Judge]:
    """While one saves and lets others go, others read what was there when they looked."""

    def read(number: int) -> int:
        seen = 0
        for turn in range(3):
            for handle in open_run(root).checkpoints:
                target = root.parent / f"copy-{number}-{turn}-{handle.name}"
                target.mkdir()
                try:
                    names = model_files(handle.found)
                    copy(handle.path, handle.found, names, target)
                except (LastgoodError, FileNotFoundError):
                    continue  # it went meanwhile: that is said
                for name in names:
                    assert (target / name).read_bytes() == _content(handle.id)[name], "I16: bytes of another one"
                seen += 1
        return seen

    def judge(results: list[Any]) -> None:
        sound(root, results[:1], all_stay=False)

    keep = draw.choice([Keep(last=1), Keep(last=2, full=1), Keep(last=3, full=1)])
    return [lambda: train(root, 3, keep), lambda: read(1), lambda: read(2)], judge


def evaluators(root: Path, draw: random.Random) -> tuple[list[Actor], Judge]:
    """What somebody holds stays as it is, however old it is."""

    def evaluate(pick: int) -> int:
        found = [record for record in records(root) if record.ours]
        record = found[pick % len(found)]
        taken = leases.take(root, record.id, record.name, 600.0)
        if taken is None:
            return 0
        for _ in range(5):
            assert verify.problems(root, record, full=True) == (), f"I10: {record.name} is being evaluated"
            local.names(root)
        taken.drop()
        return 1

    picks = [draw.randrange(4) for _ in range(2)]
    actors: list[Actor] = [lambda: train(root, 3, Keep(last=1, full=1))]
    actors += [lambda pick=pick: evaluate(pick) for pick in picks]  # type: ignore[misc]
    return actors, lambda results: sound(root, results[:1], all_stay=False)


def names(root: Path, draw: random.Random) -> tuple[list[Actor], Judge]:
    """Everybody adds something to the same checkpoint, and nothing is lost."""
    count = draw.choice([2, 3, 4])
    first, second = (record.id for record in records(root)[:2])

    def add(number: int) -> None:
        pins.add(root, first, f"tag-{number}")
        handle = next(found for found in open_run(root).checkpoints if found.id == first)
        handle.record({f"metric_{number}": float(number)})
        pins.add(root, second, "moving")
        pins.write_note(root, f"{number:016x}", "seen")
        poison.mark(root, {f"{number:016x}": "bad"})

    def judge(results: list[Any]) -> None:
        assert all(result == {"value": None} for result in results), results
        found = next(record for record in records(root) if record.id == first)
        assert set(found.pinned) == {f"tag-{n}" for n in range(count)}
        assert dict(found.metrics) == {f"metric_{n}": float(n) for n in range(count)}
        assert pins.read(root)[second] == ("moving",)
        assert pins.read_notes(root).keys() == poison.read(root).keys() == {f"{n:016x}" for n in range(count)}

    return [lambda n=n: add(n) for n in range(count)], judge  # type: ignore[misc]


def prunes(root: Path, draw: random.Random) -> tuple[list[Actor], Judge]:
    """Commands that let checkpoints go, bring them back, and pin them, beside a training."""

    def prune() -> None:
        with held(root, False):
            view = look(root)
            decisions = pruning.plan(view, dict.fromkeys(policy.OPTIONS) | {"last": 1})
            view, decisions = pruning.proven(view, {"last": 1}, decisions, lambda *_: None)
            todo = gc.plan([d.record for d in decisions], decisions)
            if todo.items:
                gc.execute(root, todo, undoable=bin.begin(root, "prune"))

    def undo() -> None:
        with held(root, False):
            bin.undo(root)

    oldest = records(root)[0]

    def pin() -> bool:
        pins.add(root, oldest.id, pins.PIN)
        return any(record.id == oldest.id for record in records(root))

    def judge(results: list[Any]) -> None:
        there: set[str] = {record.id for record in records(root)}
        if results[3]["value"]:
            assert oldest.id in there, "I10: what is pinned was removed"
        sound(root, results[:1], all_stay=False)

    return [lambda: train(root, 2), prune, undo, pin], judge


SCENARIOS: dict[str, Callable[[Path, random.Random], tuple[list[Actor], Judge]]] = {
    scenario.__name__: scenario for scenario in (writers, storm, readers, evaluators, names, prunes)
}
KILLS = ("writers", "storm", "readers")


def race(text: str) -> int:
    """One schedule, from its text ("writers:17"); how many processes took part. Raises AssertionError."""
    name, _, seed = text.partition(":")
    draw = random.Random(text)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        root = Path(folder, "run")
        root.mkdir()
        train(root, 3)
        actors, judge = SCENARIOS[name](root, draw)
        try:
            judge(play(actors, Path(folder), draw, kills=name in KILLS and int(seed) % 3 == 0))
        except AssertionError as error:
            raise AssertionError(f"python -m faults.races {text}: {error}") from error
    return len(actors)


def schedules(first: int, count: int, only: str = "") -> list[str]:
    """Texts of so many, the scenarios in turns."""
    some = [only] if only else list(SCENARIOS)
    return [f"{some[seed % len(some)]}:{seed}" for seed in range(first, first + count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedule", nargs="?")
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", choices=["", *SCENARIOS])
    options = parser.parse_args()
    texts = [options.schedule] if options.schedule else schedules(options.first, options.schedules, options.only)
    processes, start = 0, time.monotonic()
    for number, text in enumerate(texts, 1):
        processes += race(text)
        if number % 100 == 0:
            print(f"{number} schedules, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(texts)} schedules of {processes} processes: as promised")


if __name__ == "__main__":
    sys.exit(main())
