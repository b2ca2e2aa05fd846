"""The counts, for people: on the terminal and in docs/faults.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.lanes import LANES
from faults.operations import OPERATIONS

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
BEGIN, END = "<!-- counts: written by scripts/faults --table -->", "<!-- end of counts -->"


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


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Operations down, lanes across: points, and how many of them were bad."""
    found = newest(rows)
    lines = [f"| operation | {' | '.join(LANES)} |", f"|---|{'--:|' * len(LANES)}"]
    for operation in OPERATIONS:
        cells = []
        for lane in LANES:
            row = found.get((lane, operation.name))
            cells.append(
                "" if row is None else f"{row['points']}" + (f" ({len(row['bad'])} bad)" if row["bad"] else "")
            )
        lines.append(f"| {operation.name} | {' | '.join(cells)} |")
    sums = [sum(row["points"] for (name, _), row in found.items() if name == lane) for lane in LANES]
    lines.append(f"| **all: {sum(sums)}** | {' | '.join(f'**{n}**' for n in sums)} |")
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Put the counts into the page."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(rows)}\n{END}{after}")
