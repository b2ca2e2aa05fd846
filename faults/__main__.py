"""The runner: all lanes over all operations, side by side, to be stopped and gone on with at any time.

python -m faults                                  everything that isn't done yet
python -m faults --every 20 --lane crash          a sample
python -m faults --point "crash next_save(three) 17:crash-before"
python -m faults --table                          what was found so far, into docs/faults.md
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from faults import lanes, table
from faults.operations import OPERATIONS

HERE = Path(__file__).parent
DONE = HERE.parent / "build" / "faults" / "done.jsonl"
"""One line for each lane and operation that is through."""


def work(lane: str, name: str, every: int) -> dict[str, Any]:
    """All points of a lane for one operation, in a process of its own."""
    started, bad, count = time.perf_counter(), [], 0
    memory = Path("/dev/shm")
    scratch = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - a run says what it recovers from, a thousand times
    try:
        bench = lanes.Bench(lanes.named(name), scratch)
        gc.collect()
        gc.freeze()  # each point looks for garbage several times: not in torch, where an operation needed it
        for point in lanes.points(lane, bench, every):
            count += 1
            if wrong := lanes.run(lane, bench, point):
                bad.append([point, wrong])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    seconds = round(time.perf_counter() - started, 1)
    return {"lane": lane, "operation": name, "every": every, "points": count, "bad": bad, "seconds": seconds}


def done() -> list[dict[str, Any]]:
    """What earlier runs of this found."""
    return [json.loads(line) for line in DONE.read_text().splitlines()] if DONE.exists() else []


def todo(chosen: Iterable[str], part: str, every: int) -> list[tuple[str, str, int]]:
    """What isn't through yet at this density."""
    through = {(row["lane"], row["operation"]) for row in done() if row["every"] <= every}
    units = [(lane, operation.name, every) for lane in chosen for operation in OPERATIONS if part in operation.name]
    return [unit for unit in units if unit[:2] not in through]


def replay(text: str) -> str:
    """The verdict on one point, from its text: LANE OPERATION POINT."""
    lane, name, point = text.split()
    with tempfile.TemporaryDirectory() as scratch:
        return lanes.run(lane, lanes.Bench(lanes.named(name), Path(scratch)), point)


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--lane", "chosen", multiple=True, type=click.Choice(list(lanes.LANES)), help="These alone.")
@click.option("--operation", "part", default="", help="Those with this in their name.")
@click.option("--every", default=1, type=click.IntRange(1), show_default=True, help="Try one of so many points.")
@click.option("--jobs", default=os.cpu_count() or 1, type=click.IntRange(1), show_default=True)
@click.option("--again", is_flag=True, help="Forget what was found before.")
@click.option("--point", default="", help="Run one point: LANE OPERATION POINT.")
@click.option("--table", "only_table", is_flag=True, help="Write docs/faults.md from what was found.")
def main(chosen: tuple[str, ...], part: str, every: int, jobs: int, again: bool, point: str, only_table: bool) -> None:
    if point:
        wrong = replay(point)
        click.echo(wrong or "good")
        sys.exit(1 if wrong else 0)
    if only_table:
        table.write(done())
        return
    if again:
        DONE.unlink(missing_ok=True)
    DONE.parent.mkdir(parents=True, exist_ok=True)
    units = todo(chosen or tuple(lanes.LANES), part, every)
    with Progress(transient=True) as bar, ProcessPoolExecutor(jobs) as pool:
        task = bar.add_task("faults", total=len(units))
        for future in as_completed([pool.submit(work, *unit) for unit in units]):
            row = future.result()
            with DONE.open("a") as file:
                file.write(f"{json.dumps(row)}\n")
            bar.update(task, advance=1, description=f"{row['lane']} {row['operation']}")
            for where, wrong in row["bad"]:
                bar.console.print(f"{row['lane']} {row['operation']} {where}: {wrong}", markup=False)
    click.echo(table.summary(done()))
    sys.exit(1 if any(row["bad"] for row in done()) else 0)


if __name__ == "__main__":
    main()
