"""SIGKILL before each call to the operating system of a save beside the previous one, then a resume: ours and others'.

    python -m faults.traced                  every subject, every point; goes on where it was stopped
    python -m faults.traced SUBJECT          one of them: trainer, managed, dcp-new, dcp-over, loop, torch-...
    python -m faults.traced SUBJECT POINT    one point again, with what the processes said

The calls are those that change something under the run directory, of all threads (`faults.tracer`): another way to
count than from within Python, and one that sees what libraries do.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from faults import kept, tracer
from faults.subjects import KEPT_BY_US, SUBJECTS, Subject, preload, quiet

KINDS = {
    "new": "resumed from the new one",
    "older": "resumed from the older good one",
    "silent": "resumed from neither, and said nothing",
    "crashed": "crashed, although a good one lay there",
    "lost": "nothing good was left",
}
GOOD = ("new", "older")


@dataclass(frozen=True, slots=True)
class Straight:
    """The save that nobody killed. before, after: files by name; first, second: what a resume brings back of each."""

    place: Path
    trace: tracer.Trace
    before: dict[str, bytes]
    after: dict[str, bytes]
    first: tuple[int, str]
    second: tuple[int, str]


@dataclass(slots=True)
class Bench:
    """Where one subject is tried."""

    subject: Subject
    place: Path
    made: Straight | None = field(default=None)

    @property
    def log(self) -> Path:
        return self.place / "log"

    def save(self, run: Path, version: int) -> None:
        """What a child does."""
        quiet()
        self.subject.save(run, version)

    def straight(self) -> Straight:
        """Version 1, then version 2 from it under the tracer, and what a resume makes of each."""
        if self.made is None:
            original, run = self.place / "original", self.fresh("straight")
            shutil.rmtree(original, ignore_errors=True)
            original.mkdir(parents=True)
            self.log.unlink(missing_ok=True)
            assert tracer.run(lambda: self.save(original, 1), self.log) == 0, self.log.read_text()
            shutil.copytree(original, run)
            traced = tracer.trace(lambda: self.save(run, 2), run, self.log)
            assert traced.status == 0, self.log.read_text()
            before, after = files(original), files(run)
            first, second = self.resumed(self.copy(original)), self.resumed(run)
            assert first is not None, self.log.read_text()
            assert second is not None, self.log.read_text()
            assert (first[0], second[0]) == (1, 2), "a resume finds another step than was saved"
            assert first[1] != second[1], "the versions can't be told apart"
            self.made = Straight(original, traced, before, after, first, second)
        return self.made

    def killed(self, point: int) -> Path:
        """The run after version 2 was killed before its `point`-th call."""
        straight = self.straight()
        run = self.copy(straight.place)
        done = tracer.trace(lambda: self.save(run, 2), run, self.log, tracer.kill_at(point))
        assert done.status == -9, f"point {point} was never reached; the save makes {len(done.calls)} calls"
        hit, meant = done.calls[-1], straight.trace.calls[point - 1]
        assert meant.thread or tracer.aimed(hit, str(meant)), f"point {point} hit {hit} instead of {meant}"
        return run

    def verdict(self, point: int) -> str:
        """One of KINDS."""
        return self.judged(self.killed(point))

    def judged(self, run: Path) -> str:
        """What a resume makes of a run. Looked at before it, as a resume may tidy up."""
        straight, now = self.straight(), files(run)
        there = [whole.items() <= now.items() for whole in (straight.before, straight.after)]
        found = self.resumed(run)
        if found is None:
            return "crashed" if any(there) else "lost"
        return "new" if found == straight.second else "older" if found == straight.first else "silent"

    def resumed(self, run: Path) -> tuple[int, str] | None:
        """What a resume brings back; None if it fails."""
        answer = self.place / "answer"
        answer.unlink(missing_ok=True)

        def resume() -> None:
            quiet()
            answer.write_text(json.dumps(self.subject.resume(run)))

        status = tracer.run(resume, self.log)
        if status:
            return None
        step, digest = json.loads(answer.read_text())
        return step, digest

    def copy(self, original: Path) -> Path:
        run = self.fresh("run")
        shutil.copytree(original, run)
        return run

    def fresh(self, name: str) -> Path:
        shutil.rmtree(self.place / name, ignore_errors=True)
        return self.place / name


def files(root: Path) -> dict[str, bytes]:
    """What a resume reads, without our own notes beside the checkpoints."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and KEPT_BY_US not in path.relative_to(root).parts
    }


@cache
def bench(name: str) -> Bench:
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() else None
    place = tempfile.TemporaryDirectory(prefix="lastgood-faults-", dir=base)
    _places.append(place)  # it goes when the process ends
    made = Bench(SUBJECTS[name], Path(place.name))
    preload(made.subject, made.place, made.log)
    return made


_places: list[tempfile.TemporaryDirectory[str]] = []


def points(*names: str) -> list[str]:
    """SUBJECT:POINT of these subjects; without any, of ours, which have to be good at every point."""
    names = names or tuple(name for name, subject in SUBJECTS.items() if subject.ours)
    return [f"{name}:{number + 1}" for name in names for number in range(len(bench(name).straight().trace.calls))]


def run(point: str) -> str:
    """What is wrong after this point; "" if nothing is."""
    name, _, number = point.partition(":")
    verdict = bench(name).verdict(int(number))
    return "" if verdict in GOOD else KINDS[verdict]


def sweep(name: str, console: Console, *, fresh: bool = False) -> Counter[str]:
    """How often each kind came about, over every point of this subject."""
    found = kept.sweep(
        f"traced-{name}",
        points(name),
        lambda point: bench(name).verdict(int(point.partition(":")[2])),
        console,
        fresh=fresh,
        settled=bool,
    )
    return Counter(found.values())


def table(counts: dict[str, Counter[str]]) -> Table:
    meaning = "\n".join(f"{kind}: {meant}" for kind, meant in KINDS.items())
    made = Table("killed before each call of a save", "points", *KINDS, caption=meaning)
    for name, counted in counts.items():
        made.add_row(SUBJECTS[name].title, str(counted.total()), *(str(counted[kind]) for kind in KINDS))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.traced", description=__doc__)
    parser.add_argument("subject", nargs="?", choices=sorted(SUBJECTS))
    parser.add_argument("point", nargs="?", type=int)
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has found")
    args = parser.parse_args()
    console, why = Console(), tracer.missing()
    if why:
        console.print(f"skipped: {why}")
        return 0
    if args.point is not None:
        one = bench(args.subject)
        verdict = one.verdict(args.point)
        console.print(one.log.read_text(), highlight=False, markup=False)
        console.print(f"{args.subject}, before call {args.point} ({one.straight().trace.calls[args.point - 1]}):")
        console.print(KINDS[verdict])
        return verdict not in GOOD
    names = [args.subject] if args.subject else list(SUBJECTS)
    counts = {name: sweep(name, console, fresh=args.fresh) for name in names}
    console.print(table(counts))
    return any(counts[name][kind] for name in names if SUBJECTS[name].ours for kind in KINDS if kind not in GOOD)


if __name__ == "__main__":
    sys.exit(main())
