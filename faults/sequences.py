"""All short sequences of operations, the last of them cut short at each of its calls.

    python -m faults.sequences [--every N] [--first N] [--seconds N]     all, or each N-th; go on from number N
    python -m faults.sequences "save prune undo@17:crash-torn"           one of them again

Three operations find most bugs of this kind (Mohan et al., "Finding Crash-Consistency Bugs with Bounded Black-Box
Crash Testing", OSDI 2018). A case is its text, and the same text does the same again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lastgood.policy import Keep
from lastgood.testing import Fault

from faults.trained import MONITOR
from faults.world import World

LENGTH = 3
CRASHES = ("crash-before", "crash-torn", "crash-after")


def _step(world: World) -> int:
    """The next one of the branch; after going back it is there already."""
    return max((k.step for k in world.model.ours() if k.id in world.model.way and not k.stock), default=0) + 1


def save(world: World, fault: Fault | None) -> None:
    world.train(_step(world), fault=fault)


def retain(world: World, fault: Fault | None) -> None:
    """A save after which the others but one go."""
    world.train(_step(world), Keep(last=2, full=1, **MONITOR), fault=fault)


def back(world: World, fault: Fault | None) -> None:
    """A save from the oldest one on."""
    oldest = next((k.id for k in world.model.ours() if k.full and not k.damage), None)
    world.train(_step(world), back_to=oldest, fault=fault)


def prune(world: World, fault: Fault | None) -> None:
    world.prune(Keep(last=1, **MONITOR), fault=fault)


def strip(world: World, fault: Fault | None) -> None:
    for kept in world.model.ours():
        if world.strip(kept.id, fault=fault) != "failed":
            return


def undo(world: World, fault: Fault | None) -> None:
    world.undo(fault)


def tag(world: World, fault: Fault | None) -> None:
    for kept in world.model.ours()[:1]:
        world.name(kept.id, "release", fault)


def adopt(world: World, fault: Fault | None) -> None:
    top = max((k.step for k in world.model.there.values() if k.stock), default=90)
    world.stock((top + 10,))
    world.adopt(fault)


def damage(world: World, fault: Fault | None) -> None:
    """The newest one goes bad, and a training opens the run, moves it away and goes on."""
    last = world.model.last()
    if last is not None:
        world.damage(last.id, "flipped")
    world.train(_step(world), fault=fault)


OPERATIONS: dict[str, Callable[[World, Fault | None], None]] = {
    operation.__name__: operation for operation in (save, retain, back, prune, strip, undo, tag, adopt, damage)
}


@dataclass(frozen=True)
class Case:
    """Operations, the last of them with a fault. Its text: "save prune undo@17:crash-torn"."""

    names: tuple[str, ...]
    fault: Fault

    def __str__(self) -> str:
        return f"{' '.join(self.names)}@{self.fault}"

    @classmethod
    def parse(cls, text: str) -> Case:
        names, _, fault = text.partition("@")
        return cls(tuple(names.split()), Fault.parse(fault))


def sequences() -> list[tuple[str, ...]]:
    """All of them, the short ones first."""
    return [names for length in range(1, LENGTH + 1) for names in itertools.product(OPERATIONS, repeat=length)]


class Prepared:
    """A run after two saves, and what comes before the last operation: made once, copied for each fault."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.folder, self.names = folder, names
        self.world = World(folder / "original", folder / "outside")
        for place in ("original", "outside"):
            (folder / place).mkdir()
        for operation in (save, save, *(OPERATIONS[name] for name in names[:-1])):
            operation(self.world, None)

    def play(self, fault: Fault | None) -> World:
        """The last operation on a copy. Raises AssertionError where something is there that mustn't be."""
        root = self.folder / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.folder / "original", root)
        world = World(root, self.folder / "outside")
        world.model, world.counter = self.world.model.copy(), self.world.counter
        world.bytes, world.foreign = copy.deepcopy(self.world.bytes), dict(self.world.foreign)
        OPERATIONS[self.names[-1]](world, fault)
        return world


def cases() -> Iterator[tuple[Case, Callable[[], None]]]:
    """Each case, and what tries it, in an order that is always the same."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for turn, names in enumerate(sequences()):
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            prepared = Prepared(Path(folder), names)
            for point in range(1, prepared.play(None).calls + 1):
                # One of the three at each call: the same call comes again in other sequences.
                case = Case(names, Fault(point, CRASHES[(point + turn) % len(CRASHES)]))
                yield case, functools.partial(attempt, prepared, case)


def attempt(prepared: Prepared, case: Case) -> None:
    """Crash, look, and go on: whatever the crash left, the next save comes through and leaves nothing lying around."""
    try:
        world = prepared.play(case.fault)
        assert world.hindered, "the fault didn't happen"
        world.look()
        save(world, None)
        world.open()  # nothing is left of the crash after that
        world.look()
        world.close()
    except AssertionError as error:
        raise AssertionError(f"python -m faults.sequences {str(case)!r}: {error}") from error


def replay(text: str) -> None:
    """One case again, from its text."""
    case = Case.parse(text)
    with tempfile.TemporaryDirectory() as folder:
        attempt(Prepared(Path(folder), case.names), case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    if options.case:
        replay(options.case)
        print(f"{options.case}: as promised")
        return
    end, tried, number = time.monotonic() + options.seconds, 0, 0
    for number, (case, check) in enumerate(cases()):
        if number < options.first or number % options.every:
            continue
        if time.monotonic() > end:
            print(f"{tried} cases tried, none failed; go on with --first {number} --every {options.every}")
            return
        check()
        tried += 1
        if tried % 200 == 0:
            print(f"{tried} tried, at number {number}: {case}", flush=True)
    print(f"{len(sequences())} sequences, {number + 1} cases, {tried} of them tried: none failed")


if __name__ == "__main__":
    sys.exit(main())
