"""lastgood beside what people use: killed at every call of a save, and the power cut after a save has returned.

    python -m faults.peers                everything; goes on where it was stopped, writes docs/faults-peers.json
    python -m faults.peers POINT          one cut again, e.g. "dcp-new xfs committed"

The kills are those of `faults.traced`. A cut comes when the save of version 2 has returned, so that a resume has to
find that one; "committed" is explained in `faults.cuts`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from faults import disks, kept, traced, tracer
from faults.cuts import MOMENTS
from faults.subjects import SUBJECTS

RESULTS = Path(__file__).parent.parent / "docs" / "faults-peers.json"
COMMAND = "python -m faults.peers"


def points(names: Sequence[str] = ()) -> list[str]:
    """SUBJECT, FILE SYSTEM, MOMENT of each cut that can be tried here."""
    kinds = [kind for kind in disks.MAKE if not disks.missing(kind)]
    return [f"{name} {kind} {moment}" for name in names or SUBJECTS for kind in kinds for moment in MOMENTS]


def verdict(point: str) -> str:
    """One of `traced.KINDS`, for the resume after the cut."""
    name, kind, moment = point.split(" ")
    bench = traced.bench(name)
    image, at = bench.place / kind, bench.place / "at"
    straight = bench.straight()
    disks.prepared(kind, image, lambda disk: shutil.copytree(straight.place, disk / "run"))
    with disks.mounted(image, at) as disk:
        saved = tracer.run(lambda: bench.save(disk.at / "run", 2), bench.log)
        assert saved == 0, bench.log.read_text()
        if moment == "committed":
            disk.commit()
        disk.cut()
    with disks.mounted(image, at) as disk:
        found = bench.judged(disk.at / "run")
    image.unlink()
    return found


def run(point: str) -> str:
    """What is wrong after this point; "" if nothing is. Good is only what had been saved."""
    found = verdict(point)
    return "" if found == "new" else f"the save had returned, and then: {traced.KINDS[found]}"


def measure(console: Console, *, fresh: bool = False) -> dict[str, Any]:
    """Counts of both, with what they were measured with."""
    kills = {name: traced.sweep(name, console, fresh=fresh) for name in SUBJECTS}
    cuts = kept.sweep("peers", points(), verdict, console, fresh=fresh, settled=bool)
    return {
        "command": COMMAND,
        "with": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("torch", "transformers", "safetensors")},
        },
        "kinds": traced.KINDS,
        "subjects": {
            name: {
                "title": subject.title,
                "ours": subject.ours,
                "points": kills[name].total(),
                "kills": {kind: kills[name][kind] for kind in traced.KINDS},
                "cuts": {p.partition(" ")[2]: found for p, found in cuts.items() if p.startswith(f"{name} ")},
            }
            for name, subject in SUBJECTS.items()
        },
    }


def table(found: dict[str, Any]) -> Table:
    """Power cuts; the table of kills is `traced.table`."""
    places = list(next(iter(found["subjects"].values()))["cuts"])
    made = Table("power cut after a save returned", *places)
    for row in found["subjects"].values():
        made.add_row(row["title"], *(row["cuts"].get(place, "") for place in places))
    return made


def bad(found: dict[str, Any]) -> list[str]:
    """What is wrong with ours."""
    ours = [row for row in found["subjects"].values() if row["ours"]]
    killed = [
        f"{row['title']}, killed: {kind}"
        for row in ours
        for kind in row["kills"]
        if row["kills"][kind] and kind not in traced.GOOD
    ]
    cut = [f"{row['title']}, {place}: {kind}" for row in ours for place, kind in row["cuts"].items() if kind != "new"]
    return killed + cut


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.peers", description=__doc__)
    parser.add_argument("point", nargs="?")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has found")
    args = parser.parse_args()
    console = Console()
    if why := tracer.missing():
        console.print(f"skipped: {why}")
        return 0
    if args.point:
        console.print(run(args.point) or "nothing is wrong", highlight=False)
        return 0
    for kind in disks.MAKE:
        if why := disks.missing(kind):
            console.print(f"skipped {kind}: {why}")
    found = measure(console, fresh=args.fresh)
    RESULTS.write_text(f"{json.dumps(found, indent=1)}\n")
    console.print(traced.table({name: Counter(row["kills"]) for name, row in found["subjects"].items()}))
    console.print(table(found))
    for fault in bad(found):
        console.print(fault, style="red")
    return bool(bad(found))


if __name__ == "__main__":
    sys.exit(main())
