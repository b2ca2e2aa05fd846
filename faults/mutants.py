"""The harness, tried out: each step that makes lastgood safe is taken away in turn, and something has to turn red.

    python -m faults.mutants               all of them, side by side
    python -m faults.mutants NAME...       some

A mutant is a copy of the package with one piece of its text replaced. It is caught by a lane of `faults` over one
operation, or by tests; the unchanged package passes both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.mutations import ON_DISK, Mutant
from faults.mutations_behind import BEHIND
from faults.mutations_copies import COPIES
from faults.mutations_known import KNOWN

HERE = Path(__file__).parent.parent
PACKAGE = HERE / "src" / "lastgood"
RED = 3
"""Exit status of a lane that found something: not that of a traceback."""


MUTANTS: Sequence[Mutant] = (*ON_DISK, *BEHIND, *KNOWN, *COPIES)


def caught(mutant: Mutant) -> str:
    """How it was caught, in one line; "" if it survived. Raises ValueError if the package has changed meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(HERE / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("tests", "faults", "demo", "examples", "docs", "benchmarks"):
            (place / name).symlink_to(HERE / name)
        shutil.copy(HERE / "pyproject.toml", place)
        path = place / "src" / "lastgood" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.name}: {mutant.file} has that text {text.count(mutant.old)} times")
        path.write_text(text.replace(mutant.old, mutant.new))
        return red(mutant, place)


def red(mutant: Mutant, place: Path) -> str:
    """Run what has to catch it against the package in `place`."""
    home = {"PYTHONPATH": f"{place / 'src'}:{place}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m"]
    if mutant.red.startswith("test_"):
        options = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "-c", os.fspath(HERE / "pyproject.toml")]
        command += ["pytest", *options, "--rootdir", os.fspath(HERE), *mutant.red.split()]
        folder, failed = HERE / "tests", 1  # pytest: tests failed; any other status is a mistake in the table
    else:
        lane, operation, every = mutant.red.split()
        command += ["faults.mutants", "--lane", lane, operation, every]
        folder, failed = place, RED
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **home}, capture_output=True, text=True, check=False, timeout=900
    )
    lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    if done.returncode not in (0, failed):
        raise RuntimeError(f"{mutant.name}: {' '.join(command)} ended with {done.returncode}: {lines[-1:]}")
    return (lines[-1] if lines else mutant.red)[:160] if done.returncode else ""


def lane(name: str, operation: str, every: int) -> str:
    """The first bad point of a lane, in words; "" if there is none."""
    from faults import lanes

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as scratch:
        chosen = lanes.named(operation)
        try:
            bench = lanes.Bench(chosen, Path(scratch))
        except Exception as error:  # nothing was broken yet, and it can't even do what it is for
            return f"{operation} fails undisturbed: {type(error).__name__}: {error}"
        for point in lanes.points(name, bench, every):
            if wrong := lanes.run(name, bench, point):
                return f"{name} {operation} {point}: {wrong}"
    return ""


def main(arguments: Sequence[str]) -> int:
    """The number of mutants that survived."""
    if arguments[:1] == ["--lane"]:
        wrong = lane(arguments[1], arguments[2], int(arguments[3]))
        print(wrong)
        return RED if wrong else 0
    chosen = [mutant for mutant in MUTANTS if not arguments or mutant.name in arguments]
    survived = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, how in zip(chosen, pool.map(caught, chosen), strict=True):
            survived += not how
            print(f"{'caught  ' if how else 'SURVIVED'}  {mutant.name}: {how or mutant.red}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutants caught")
    return survived


if __name__ == "__main__":
    sys.exit(min(RED, main(sys.argv[1:])))
