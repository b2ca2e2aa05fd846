"""SIGKILL at many random moments of real trainings, relaunched by the same command each time, then compared.

    scripts/kills [--door trainer|loop|accelerate|lightning|all] [--times 30] [--seed 0] [--fork]

A third of the kills falls anywhere in a life, a third into a save under way, a third where a restore is expected. What
counts is where the process was when it died. A training that got to its end begins anew.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from demo.__main__ import newest, staging
from demo.doors import DOORS, STEPS
from demo.lives import Forked, command, imports

LIMIT = 600.0
"""Seconds after which a process that doesn't get any further is a failure."""
PLACES = ("inside a save", "inside a restore", "elsewhere")


class Process(Protocol):
    """A life that has begun."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...


Start = Callable[[str, Path, int], Process]
"""(door, out, steps) -> the process, whose output goes to OUT.log."""


@dataclass
class Tally:
    """What became of the kills of one door. places: where they hit; resumed: launches after a kill that restored."""

    door: str
    places: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    resumed: int = 0
    identical: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.places.values())


@dataclass(frozen=True)
class Straight:
    """The run that nobody killed. seconds: from the beginning of its restore to its end; restore: of a full restore."""

    end: str
    losses: dict[int, str]
    seconds: float
    restore: float


def campaign(
    door: str,
    place: Path,
    times: int,
    *,
    start: Start,
    seed: int = 0,
    steps: int | None = None,
    tell: Callable[[str], None] = print,
) -> Tally:
    """Kill so many lives of this door's training, and run each training to its end."""
    rng, tally, steps = random.Random(f"{door} {seed}"), Tally(door), steps or STEPS[door]
    straight = _straight(door, place, start, steps)
    tell(f"{door}: {straight.seconds:.2f} s a life, {straight.restore:.2f} s a restore")
    while tally.kills < times:
        tally.runs += 1
        out = place / f"{door}-{tally.runs}"
        _clear(out)
        status = -1
        while status:
            begun = _newest(out)
            out.with_name(f"{out.name}.phase").unlink(missing_ok=True)
            process = start(door, out, steps)
            after = _kill(process, out, rng, straight, begun > 0) if tally.kills < times else 0.0
            status = _ended(process)
            restored = begun > 0 and _phase(out) == "training"
            tally.resumed += restored
            if status not in (0, -signal.SIGKILL):
                tally.faults.append(f"{out} ended with status {status}: {_tail(out)}")
                return tally
            if status:
                where = _where(out, begun)
                tally.places[where] += 1
                tell(f"  kill {tally.kills}: after {after:.3f} s, {where}, newest checkpoint {_newest(out)}")
        faults = _differs(out, straight)
        tally.faults += faults
        tally.identical += not faults
        if not faults:
            _clear(out)
    return tally


def _straight(door: str, place: Path, start: Start, steps: int) -> Straight:
    out = place / f"{door}-straight"
    _clear(out)
    process = start(door, out, steps)
    _wait(process, lambda: bool(_phase(out)))
    begun = time.monotonic()
    assert _ended(process) == 0, _tail(out)
    seconds = time.monotonic() - begun
    end, losses = _read(out, "end"), _losses(out)
    assert sorted(losses) == list(range(1, steps + 1)), f"{door} tells {len(losses)} losses of {steps} steps"
    assert not any(len(found) > 1 for found in losses.values())
    out.with_name(f"{out.name}.phase").unlink()
    process = start(door, out, steps)  # there is nothing left to train: it restores
    _wait(process, lambda: bool(_phase(out)))
    begun = time.monotonic()
    _wait(process, lambda: _phase(out) == "training")
    restore = time.monotonic() - begun
    assert _ended(process) == 0, _tail(out)
    # Some have a shorter way to say that nothing is left.
    restore = max(restore, seconds / 20)
    return Straight(end, {step: found.pop() for step, found in losses.items()}, seconds, restore)


def _kill(process: Process, out: Path, rng: random.Random, straight: Straight, restores: bool) -> float:
    """SIGKILL at a random moment; returns the seconds since its restore began. It may have ended before."""
    _wait(process, lambda: bool(_phase(out)))
    begun = time.monotonic()
    aim = rng.choice([place for place in PLACES if restores or place != "inside a restore"])
    wait = rng.uniform(0, straight.restore if aim == "inside a restore" else straight.seconds)
    _wait(process, lambda: time.monotonic() - begun >= wait)
    if aim == "inside a save":
        _wait(process, lambda: staging(out))
        time.sleep(rng.uniform(0, 0.01))
    process.kill()
    return time.monotonic() - begun


def _wait(process: Process, done: Callable[[], bool]) -> None:
    """Until it is so or the process has ended."""
    limit = time.monotonic() + LIMIT
    while process.poll() is None and not done():
        if time.monotonic() > limit:
            process.kill()
            raise AssertionError(f"nothing happened for {LIMIT} s")
        time.sleep(0.0005)


def _ended(process: Process) -> int:
    _wait(process, lambda: False)
    status = process.poll()
    assert status is not None
    return status


def _where(out: Path, begun: int) -> str:
    """Where the process died."""
    if _phase(out) == "training":
        return "inside a save" if staging(out) else "elsewhere"
    return "inside a restore" if begun and _phase(out) == "restoring" else "elsewhere"


def _differs(out: Path, straight: Straight) -> list[str]:
    """What isn't as in the run that nobody killed: the end, and each loss of each life."""
    losses = _losses(out)
    faults = [
        f"{out}: step {step} had the losses {sorted(found)}, not {straight.losses.get(step)}"
        for step, found in sorted(losses.items())
        if found != {straight.losses.get(step)}
    ]
    faults += [f"{out}: no loss of {len(straight.losses) - len(losses)} steps"] * (len(losses) != len(straight.losses))
    return faults + [f"{out}: ended differently"] * (_read(out, "end") != straight.end)


def _losses(out: Path) -> dict[int, set[str]]:
    """Step -> its losses in all lives; the last line of a life may be torn."""
    found: dict[int, set[str]] = {}
    for line in _read(out, "losses").splitlines():
        step, _, value = line.partition(" ")
        found.setdefault(int(step), set()).add(value)
    return found


def _read(out: Path, what: str) -> str:
    return out.with_name(f"{out.name}.{what}").read_text()


def _phase(out: Path) -> str:
    try:
        return _read(out, "phase")
    except OSError:
        return ""


def _newest(out: Path) -> int:
    """The highest step that was saved; 0 also where it died before there was a run."""
    return newest(out) if out.exists() else 0


def _tail(out: Path) -> str:
    return _read(out, "log")[-3000:]


def _clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for path in out.parent.glob(f"{out.name}.*"):
        path.unlink()


def shown(tallies: list[Tally]) -> Table:
    table = Table("front door", "kills", *PLACES, "resumed", "runs", "bit-identical")
    for tally in tallies:
        numbers = (tally.kills, *(tally.places[place] for place in PLACES), tally.resumed, tally.runs, tally.identical)
        table.add_row(tally.door, *map(str, numbers))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/kills", description=__doc__)
    parser.add_argument("--door", choices=[*DOORS, "all"], default="all")
    parser.add_argument("--times", type=int, default=30, help="kills for each front door")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="lives that have their imports already: much faster")
    parser.add_argument("--place", type=Path, default=Path("build/kills"))
    args = parser.parse_args()
    console = Console(highlight=False)
    start: Start = command
    if args.fork:
        imports()
        start = Forked
    tallies = []
    for door in [args.door] if args.door != "all" else DOORS:
        console.print(f"{door}, seed {args.seed}")
        tallies.append(campaign(door, args.place, args.times, seed=args.seed, start=start, tell=console.print))
    console.print(shown(tallies))
    faults = [fault for tally in tallies for fault in tally.faults]
    for fault in faults:
        console.print(f"[red]{fault}", markup=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
