"""Branches drawn in front of a listing, newest first, as `git log --graph` does."""

from __future__ import annotations

from collections.abc import Sequence

from lastgood.cli.table import Row
from lastgood.model import on_lineage


def lanes(rows: Sequence[Row]) -> list[str]:
    """One mark per line of the table, the header included; all of the same width."""
    ordered = [row for row in rows if row["id"] is not None and row["seq"]]
    parents = {row["id"]: _parent(row, ordered) for row in ordered}
    waiting: list[str | None] = []  # per lane, the id that it leads down to
    drawn = []
    for row in rows:
        id = row["id"]
        if id not in parents:
            drawn.append("".join("| " if lane is not None else "  " for lane in waiting))
            continue
        mine = [index for index, lane in enumerate(waiting) if lane == id]
        if not mine:
            free = next((index for index, lane in enumerate(waiting) if lane is None), len(waiting))
            if free == len(waiting):
                waiting.append(None)
            mine = [free]
        marks = ["| " if lane is not None else "  " for lane in waiting]
        for index in mine:
            marks[index] = "* " if index == mine[0] else "/ "
            waiting[index] = None
        waiting[mine[0]] = parents[id]
        drawn.append("".join(marks))
    wide = max((len(mark) for mark in drawn), default=0)
    return [" " * wide, *(mark.ljust(wide) for mark in drawn)]


def _parent(row: Row, rows: Sequence[Row]) -> str | None:
    """The nearest checkpoint on its way that is still there."""
    older = [r for r in rows if r["seq"] < row["seq"] and on_lineage(r["seq"], row["lineage"])]
    return max(older, key=lambda r: r["seq"])["id"] if older else None
