"""The ways to break an operation, each a list of points; a point is a text, and running it gives a verdict.

crash   the process ends before, in the middle of or after one call
error   one call fails (or all from it on), writes less than it was given, or says it synced and didn't
power   the power goes: every state that two models of file systems allow
twice   a crash in the recovery from a crash
look    a call that only reads fails, in a resume
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from lastgood.errors import LastgoodError
from lastgood.repo.read import records
from lastgood.testing import Crash, Cut, Fault, Faulty, Recorder, cuts, using

from faults.judge import Known, verdict
from faults.operations import OPERATIONS, Operation
from faults.small import manager

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EMFILE", "ESTALE", "EACCES")


@dataclass
class Bench:
    """One operation, its run in a scratch directory, and how the run looks before and after it.

    calls: the names of the calls that it makes to change the disk, in their order.
    """

    operation: Operation
    scratch: Path
    before: Known = field(init=False)
    after: Known = field(init=False)
    calls: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.original, self.root = self.scratch / "original", self.scratch / "run"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.original.mkdir(parents=True)
        with using(Faulty(seed="before")):
            self.operation.before(self.original)
        self.before = Known.of(self.original)
        with self.fresh(Faulty(seed="act")) as disk:
            self.operation.act(self.root)
        self.after, self.calls = Known.of(self.root), disk.calls
        assert self.operation.done(self.root), f"{self.operation.name} doesn't do what it is for"

    @contextmanager
    def fresh(self, disk: Faulty) -> Iterator[Faulty]:
        """The run as it was before, on this disk."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.original, self.root)
        with using(disk):
            yield disk

    def judged(self, *, returned: bool, power: bool = False, floor: int | None = None) -> str:
        """The verdict on the run as it is now."""
        with using(Faulty(seed="judge")):
            known = self.before, self.after
            return verdict(self.root, self.operation, *known, returned=returned, power=power, floor=floor)


def crash(bench: Bench) -> Iterator[str]:
    """Points."""
    for point, name in enumerate(bench.calls, 1):
        yield f"{point}:crash-before"
        if name == "write":
            yield f"{point}:crash-torn"
    yield f"{len(bench.calls)}:crash-after"


def error(bench: Bench) -> Iterator[str]:
    """Points."""
    for point, name in enumerate(bench.calls, 1):
        for what in ERRORS:
            yield f"{point}:{what}"
            yield f"{point}:{what}:sticky"
        if name == "write":
            yield f"{point}:short"
        if name == "sync":
            yield f"{point}:lost-sync"


def struck(bench: Bench, text: str) -> str:
    """Run a point of `crash` or `error`."""
    fault = Fault.parse(text)
    returned, trouble = False, ""
    with bench.fresh(Faulty(fault, seed="act")) as disk:
        try:
            bench.operation.act(bench.root)
            returned = True
        except (Crash, LastgoodError):
            pass
        except Exception as raised:
            if not (isinstance(raised, OSError) and bench.operation.by_hand):  # the command line explains it
                trouble = f"I19: {type(raised).__name__} instead of an error of ours: {raised}"
    if not disk.struck:
        return f"call {fault.point} was never made: not the same operation as before"
    gc.collect()
    # What an error left out may be missing where nothing rests on it, so "it returned" is no promise here: but a
    # short write or a lost sync is nothing that the operation could have seen or needs to care for.
    return trouble or bench.judged(returned=returned and fault.what in ("short", "lost-sync"))


def twice(bench: Bench, every: int = 1) -> Iterator[str]:
    """Points: the call of the first crash, and that of the second. every: as few of the first ones."""
    for first in islice(crash(bench), None, None, every):
        with bench.fresh(Faulty(Fault.parse(first), seed="act")), suppress(Crash):
            bench.operation.act(bench.root)
        gc.collect()
        disk = Faulty(seed="recover")
        with using(disk), suppress(LastgoodError):
            manager(bench.root).close()
        gc.collect()
        for point in range(1, len(disk.calls) + 1):
            yield f"{first}+{point}:crash-before"


def struck_twice(bench: Bench, text: str) -> str:
    """Run a point of `twice`."""
    first, second = text.split("+")
    with bench.fresh(Faulty(Fault.parse(first), seed="act")), suppress(Crash):
        bench.operation.act(bench.root)
    gc.collect()
    with using(Faulty(Fault.parse(second), seed="recover")), suppress(Crash, LastgoodError):
        manager(bench.root).close()
    gc.collect()
    return bench.judged(returned=False)


def power(bench: Bench) -> Iterator[str]:
    """Points: a model and the number of a state."""
    for model in ("ordered", "posix"):
        for number, _ in enumerate(_states(bench, model)):
            yield f"{model}-{number}"


def cut(bench: Bench, text: str) -> str:
    """Run a point of `power`."""
    model, _, number = text.partition("-")
    state, last = _nth(bench, model, int(number))
    shutil.rmtree(bench.root, ignore_errors=True)
    state.write(bench.root)
    wrong = bench.judged(returned=last, power=True)
    return f"{wrong} [after event {state.after}: {state.label}]" if wrong else ""


def look(bench: Bench) -> Iterator[str]:
    """Points."""
    disk = Faulty(seed="look", reads=True)
    with bench.fresh(Faulty(seed="act")):
        bench.operation.act(bench.root)
    with using(disk):
        _resumed(bench)
    for point in range(1, len(disk.calls) + 1):
        for what in ("EIO", "ESTALE", "EMFILE", "EACCES"):
            yield f"{point}:{what}"
            yield f"{point}:{what}:sticky"


def overlooked(bench: Bench, text: str) -> str:
    """Run a point of `look`: a resume whose looking fails finds less, or says what is wrong."""
    fault = Fault.parse(text)
    with bench.fresh(Faulty(seed="act")):
        bench.operation.act(bench.root)
    gc.collect()
    with using(Faulty(fault, seed="look", reads=True)):
        try:
            _resumed(bench)
        except (LastgoodError, OSError):
            pass
        except Exception as raised:
            return f"I19: {type(raised).__name__} instead of an error of ours: {raised}"
    gc.collect()
    return bench.judged(returned=True, floor=bench.after.newest)


LANES: dict[str, tuple[Callable[[Bench], Iterator[str]], Callable[[Bench, str], str]]] = {
    "crash": (crash, struck),
    "error": (error, struck),
    "power": (power, cut),
    "twice": (twice, struck_twice),
    "look": (look, overlooked),
}
"""Name -> what gives the points, and what runs one."""


def points(lane: str, bench: Bench, every: int = 1) -> Iterator[str]:
    """The points of a lane for an operation; every: as few of them, spread over all."""
    if lane == "twice":  # each of the first crashes has to be made before it is known how many second ones there are
        return islice(twice(bench, max(1, every // 16)), None, None, min(every, 16))
    return islice(LANES[lane][0](bench), None, None, every)


def run(lane: str, bench: Bench, point: str) -> str:
    """The verdict on one point: "" if all that has to hold does."""
    return LANES[lane][1](bench, point)


def named(name: str) -> Operation:
    """The operation with this name."""
    return next(operation for operation in OPERATIONS if operation.name == name)


def _resumed(bench: Bench) -> None:
    records(bench.root)
    made = manager(bench.root)
    try:
        with suppress(LastgoodError):
            made.find("last")
    finally:
        made.close()


def _states(bench: Bench, model: str) -> list[Cut]:
    kept: dict[str, list[Cut]] = bench.__dict__.setdefault("states", {})
    if model not in kept:
        with bench.fresh(Faulty()):
            pass
        recorder = Recorder(bench.root)
        recorder.token = Faulty(seed="act").token  # type: ignore[method-assign]
        with using(recorder):
            bench.operation.act(bench.root)
        kept[model] = list(cuts(recorder.before, recorder.events, "ordered" if model == "ordered" else "posix"))
    return kept[model]


def _nth(bench: Bench, model: str, number: int) -> tuple[Cut, bool]:
    states = _states(bench, model)
    return states[number], states[number].after == states[-1].after
