"""The counts, for people: on the terminal and in docs/faults.md."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.lanes import LANES
from faults.operations import OPERATIONS

HERE = Path(__file__).parent.parent
PAGE = HERE / "docs" / "faults.md"
PEERS = HERE / "docs" / "faults-peers.json"
INVARIANTS = {
    1: "after any crash the newest committed checkpoint, or an older one, is found; never a mix",
    2: "what a save reported as done survives a loss of power",
    3: "a save that failed leaves the others as they were, and the next one needs no cleaning by hand",
    4: "recovering twice is recovering once",
    5: "an error of a sync is never swallowed: nothing is published",
    6: "looking changes nothing",
    7: "damage is found before anything is restored",
    8: "nothing is restored in part without a word",
    9: "what is saved comes back bit for bit",
    10: "the last good, pinned, best, evaluated and resumed-from ones are never deleted",
    11: "what isn't ours is never deleted or moved",
    12: "space can be freed on a full disk",
    13: "nothing is left lying about for good",
    14: "a save that was said to fit fits",
    15: "of two writers one writes",
    16: "a reader sees one state, or is told that it is gone",
    17: "many ranks commit together or not at all",
    18: "nothing depends on clocks, times of files or names of hosts",
    19: "a failing disk ends no training, and says so",
    20: "a signal ends a run in time, with a checkpoint or the one before",
    21: "no pickle is written, and none is run",
    22: "no input leads out of the run, or takes unbounded memory or time",
    23: "no secret is written down",
    24: "the dashboard answers nobody who has no business there",
    25: "scanners find nothing",
    26: "every old format opens; a newer one is refused",
}


def newest(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """(lane, operation) -> the densest run of it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["lane"], row["operation"]
        if key not in found or row["points"] >= found[key]["points"]:
            found[key] = row
    return found


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line per lane."""
    found = newest(rows)
    lines = []
    for lane in LANES:
        some = [row for (name, _), row in found.items() if name == lane]
        points, bad = sum(row["points"] for row in some), sum(len(row["bad"]) for row in some)
        lines.append(f"{lane:8}{len(some):4} operations {points:8} points {bad:4} bad")
    points, bad = sum(row["points"] for row in found.values()), sum(len(row["bad"]) for row in found.values())
    return "\n".join([*lines, f"{'':8}{'':15} {points:8} points {bad:4} bad"])


def counts(rows: Sequence[dict[str, Any]]) -> str:
    """Operations down, lanes across: points, and how many of them were bad."""
    found = newest(rows)
    bad = sum(len(row["bad"]) for row in found.values())
    lines = [f"| operation | {' | '.join(LANES)} |", f"|---|{'--:|' * len(LANES)}"]
    for operation in OPERATIONS:
        cells = []
        for lane in LANES:
            row = found.get((lane, operation.name), {"points": "", "bad": []})
            cells.append(f"{row['points']} ({len(row['bad'])} bad)" if row["bad"] else f"{row['points']}")
        lines.append(f"| {operation.name.replace('_', ' ')} | {' | '.join(cells)} |")
    sums = [sum(row["points"] for (name, _), row in found.items() if name == lane) for lane in LANES]
    lines.append(f"| **{sum(sums)} points, {bad} bad** | {' | '.join(f'**{n}**' for n in sums)} |")
    every = {lane: sorted({row["every"] for (name, _), row in found.items() if name == lane}) for lane in LANES}
    dense = [" or ".join("all" if n == 1 else f"1 of {n}" for n in every[lane]) for lane in LANES]
    lines.append(f"| points run (`--every`) | {' | '.join(dense)} |")
    return "\n".join(lines) + "\n"


def peers() -> str:
    """What became of those who save in other ways."""
    told = json.loads(PEERS.read_text())
    kinds, cuts = told["kinds"], ("ext4 cut", "ext4 committed", "xfs cut", "xfs committed")
    lines = [f"| | killed at | {' | '.join(kinds.values())} | power: {' | '.join(cuts)} |"]
    lines.append(f"|---|--:|{'--:|' * len(kinds)}{'---|' * len(cuts)}")
    for subject in told["subjects"].values():
        kills = [str(subject["kills"].get(kind, 0)) for kind in kinds]
        after = [subject.get("cuts", {}).get(cut, "") for cut in cuts]
        lines.append(f"| {subject['title']} | {subject['points']} | {' | '.join([*kills, *after])} |")
    versions = ", ".join(f"{name} {version}" for name, version in told["with"].items())
    return "\n".join([*lines, "", f"With {versions}.", ""])


def invariants() -> str:
    """Each with the files of its tests and how many there are."""
    found: dict[int, dict[str, int]] = {}
    for path in sorted((HERE / "tests").glob("test_*.py")):
        for name in re.findall(r"^ *def test_((?:I\d+_)+)", path.read_text(), re.MULTILINE):
            for number in re.findall(r"\d+", name):
                tests = found.setdefault(int(number), {})
                tests[path.stem] = tests.get(path.stem, 0) + 1
    lines = ["| | | tests |", "|--:|---|---|"]
    for number, text in INVARIANTS.items():
        tests = ", ".join(f"{name} ({n})" for name, n in found.get(number, {}).items())
        lines.append(f"| I{number} | {text} | {tests or 'none: not built yet'} |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Put all three into the page."""
    text = PAGE.read_text()
    for name, content in (("counts", counts(rows)), ("peers", peers()), ("invariants", invariants())):
        begin, end = f"<!-- {name}: written by scripts/faults --table -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}{content}{end}{rest.split(end)[1]}"
    PAGE.write_text(text)
