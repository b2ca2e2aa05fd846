"""Real power cuts: an operation is killed before each of its calls, or has returned, and the disk loses what it hadn't.

    python -m faults.cuts                 every point that has no verdict yet; goes on where it was stopped
    python -m faults.cuts POINT           one again, e.g. "xfs committed save_and_prune(three) 17"

The disk is an ext4 or xfs of its own (`faults.disks`). "cut": it keeps what was made durable. "committed": just before,
somebody else's fsync commits the journal, so that names are kept whose content never got there. Afterwards the file
system is mounted again, which replays its journal, and judged. Point "end" is an operation that has returned.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lastgood.repo.read import records
from lastgood.store.fs import FileSystem, using

from faults import disks, kept, tracer
from faults.judge import Known, verdict
from faults.operations import OPERATIONS, Operation

MOMENTS = ("cut", "committed")
AT_EVERY_CALL = (
    "next_save(three)",
    "next_save(adopted)",
    "save_and_prune(three)",
    "save_and_strip(three)",
    "save_again(three)",
    "take_in(stock)",
    "prune_mixed(three)",
    "undo(pruned)",
    "undo(stripped)",
    "empty(pruned)",
)
"""The operations that are cut at every call; the others when they have returned."""
BY_NAME = {operation.name: operation for operation in OPERATIONS}
MAY_BE_BACK = ("save_and_prune", "prune_now", "empty", "evaluate")
"""What these delete may be back as a whole after a power cut, which harms nobody: the next save deletes it again."""
END = "end"


@dataclass(frozen=True, slots=True)
class Bench:
    """One operation on one kind of file system.

    image: the run as it is before, durable; calls: what the operation does; before, after: the run without it, with it.
    """

    operation: Operation
    place: Path
    image: Path
    calls: tuple[str, ...]
    before: Known
    after: Known

    def verdict(self, moment: str, point: int | None) -> str:
        """What is wrong after a cut before this call, or after all of them."""
        copy = disks.copied(self.image, self.place / "copy")
        with disks.mounted(copy, self.place / "at") as disk:
            root = disk.at / "run"
            look = tracer.kill_at(0 if point is None else point)
            done = tracer.trace(lambda: act(self.operation, root), root, self.place / "log", look)
            if done.status != (0 if point is None else -signal.SIGKILL):
                return f"ended with status {done.status}: {(self.place / 'log').read_text()[-500:]}"
            if point is not None and not tracer.aimed(done.calls[-1], self.calls[point - 1]):
                return f"hit {done.calls[-1]} instead of {self.calls[point - 1]}"
            if moment == "committed":
                disk.commit()
            disk.cut()
        with disks.mounted(copy, self.place / "at") as disk:
            return self.judged(disk.at / "run", returned=point is None)

    def judged(self, root: Path, *, returned: bool) -> str:
        """The judge's words, and those for what is saved and gone."""
        deletes = self.operation.act.__name__ in MAY_BE_BACK
        if returned and deletes:
            there = Counter(record.step for record in records(root) if record.ours)
            if gone := sorted(Counter(self.after.ours.values()) - there):
                return f"I2: {self.operation.name} had returned, and the checkpoints of steps {gone} are gone"
        with using(Named("judge")):
            done = returned and not deletes
            return verdict(root, self.operation, self.before, self.after, returned=done, power=True)


@dataclass
class Named(FileSystem):
    """The file system as it is, but for names that are random otherwise: the judge compares ids with those it knows."""

    seed: str
    drawn: int = 0

    def token(self, count: int) -> str:
        """See FileSystem."""
        self.drawn += 1
        return hashlib.blake2b(f"{self.seed} {self.drawn}".encode(), digest_size=count).hexdigest()


def act(operation: Operation, root: Path) -> None:
    """What a child does: the operation, the same each time."""
    with using(Named("act")):
        operation.act(root)


@cache
def bench(kind: str, name: str) -> Bench:
    operation = BY_NAME[name]
    place = Path(_place().name) / f"{kind}-{len(os.listdir(_place().name))}"
    place.mkdir()

    def fill(at: Path) -> None:
        (at / "run").mkdir()
        with using(Named("before")):
            operation.before(at / "run")

    image = disks.prepared(kind, place / "image", fill)
    with disks.mounted(disks.copied(image, place / "copy"), place / "at") as disk:
        root = disk.at / "run"
        before = Known.of(root)
        done = tracer.trace(lambda: act(operation, root), root, place / "log")
        assert done.status == 0, (place / "log").read_text()
        return Bench(operation, place, image, tuple(map(str, done.calls)), before, Known.of(root))


@cache
def _place() -> tempfile.TemporaryDirectory[str]:
    """In memory where there is room: the images are small, and what counts happens in their file systems."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="lastgood-cuts-", dir=memory if memory.is_dir() else None)


def missing() -> dict[str, str]:
    """What can't be tried here, and why."""
    found = {kind: tracer.missing() or disks.missing(kind) for kind in disks.MAKE}
    return {kind: why for kind, why in found.items() if why}


def points(kinds: Sequence[str] = (), names: Sequence[str] = ()) -> list[str]:
    """FILE SYSTEM, MOMENT, OPERATION, CALL of each; without arguments of all that can be tried here."""
    return list(_points(kinds or [kind for kind in disks.MAKE if kind not in missing()], names or list(BY_NAME)))


def _points(kinds: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    for kind in kinds:
        for name in names:
            calls = range(1, len(bench(kind, name).calls) + 1) if name in AT_EVERY_CALL else ()
            yield from (f"{kind} {moment} {name} {point}" for moment in MOMENTS for point in (*calls, END))


def run(point: str) -> str:
    """What is wrong after this point; "" if nothing is."""
    kind, moment, name, number = point.split(" ")
    return bench(kind, name).verdict(moment, None if number == END else int(number))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.cuts", description=__doc__)
    parser.add_argument("point", nargs="?")
    parser.add_argument("--every", type=int, default=1, help="only each n-th point")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has found")
    args = parser.parse_args()
    console = Console()
    for kind, why in missing().items():
        console.print(f"skipped {kind}: {why}")
    if args.point:
        fault = run(args.point)
        console.print(fault or "nothing is wrong", highlight=False)
        return bool(fault)
    found = kept.sweep("cuts", points()[:: args.every], run, console, fresh=args.fresh)
    counts = counted(found)
    every = f" --every {args.every}" if args.every > 1 else ""
    kept.publish("cuts", f"python -m faults.cuts{every}", counts)
    made = Table("power cut", "points", "bad")
    for what, (tried, bad) in counts.items():
        made.add_row(what, str(tried), str(bad))
    console.print(made)
    return any(found.values())


def counted(found: dict[str, str]) -> dict[str, tuple[int, int]]:
    """File system, moment and operation -> (points, bad)."""
    tried = Counter(point.rpartition(" ")[0] for point in found)
    bad = Counter(point.rpartition(" ")[0] for point, fault in found.items() if fault)
    return {what: (count, bad[what]) for what, count in tried.items()}


if __name__ == "__main__":
    sys.exit(main())
