"""Disk use over the run as text: what lies there between saves, and the peaks during them. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from lastgood.planner.machine import Machine
from lastgood.planner.outcome import Outcome

ROWS = 6
BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", "     ####"


def chart(
    outcomes: Sequence[Outcome], machine: Machine, wide: int, *, unicode: bool, size: Callable[[int], str]
) -> list[str]:
    """One panel per system, all to the same scale, `wide` columns in all. size: bytes as people read them.

    unicode: block characters; otherwise # and : alone.
    """
    top = max([1, *(outcome.peak for outcome in outcomes)])
    room = None if machine.disk is None else max(0, machine.disk - machine.used)
    if room is not None and room < 2 * top:
        top = max(top, room)
    last = max([1, *(use.step for outcome in outcomes for use in outcome.uses)])
    labels = [size(top), size(top // 2), "0"]
    gap = max(map(len, labels))
    inner = wide - gap - 2
    out = []
    for outcome in outcomes:
        out.append(f"{outcome.name}: {outcome.policy}"[:wide])
        for row, cells in enumerate(_panel(outcome, last, top, inner, unicode, room)):
            label = labels[0] if row == 0 else labels[1] if row == ROWS // 2 else ""
            out.append(f"{label:>{gap}} {'│' if unicode else '|'}{cells}".rstrip())
        line = "└" + "─" * inner if unicode else "+" + "-" * inner
        out.append(f"{labels[2]:>{gap}} {line}")
        out.append(_axis(last, gap, inner, outcome))
    solid, peak = ("█", "░") if unicode else ("#", ":")
    out.append(f"{'':>{gap}}  {solid} between saves   {peak} during a save")
    if room is not None and room <= top:
        out.append(f"{'':>{gap}}  {'╌' if unicode else '-'} the disk has room for {size(room)}")
    return out


def _panel(
    outcome: Outcome, last: int, top: int, inner: int, unicode: bool, room: int | None
) -> list[str]:  # highest row first
    columns = [_column(outcome, last * c / inner, last * (c + 1) / inner) for c in range(inner)]
    unit = top / ROWS
    shapes, haze, limit = (BLOCKS, "░", "╌") if unicode else (ASCII, ":", "-")
    out = []
    for row in reversed(range(ROWS)):
        low, cells = row * unit, ""
        at_limit = room is not None and room <= top and low < room <= low + unit
        for held, peak in columns:
            filled = shapes[max(0, min(8, round((held - low) / unit * 8)))]
            if filled == " ":
                filled = haze if peak - low > unit / 2 else limit if at_limit else " "
            cells += filled
        out.append(cells)
    return out


def _column(outcome: Outcome, begin: float, end: float) -> tuple[int, int]:
    """(most bytes between saves, most during a save) from one step to another."""
    steps = [use.step for use in outcome.uses]
    first, after = bisect_right(steps, begin), bisect_right(steps, end)
    before = [outcome.uses[first - 1].bytes] if first else [0]
    inside = outcome.uses[first:after]
    held = max([*before, *(use.bytes for use in inside)])
    return held, max([held, *(use.peak for use in inside)])


def _axis(last: int, gap: int, inner: int, outcome: Outcome) -> str:
    """Steps below the panel; a crash is marked."""
    line = [" "] * (inner + 1)
    marks = {0: "0", inner // 2: str(last // 2), inner: f"step {last}"}
    if outcome.crash is not None:
        marks[round(outcome.crash.step / last * inner)] = f"^crash {outcome.crash.step}"
    for place, word in sorted(marks.items(), key=lambda item: not item[1].startswith("^")):
        start = max(0, min(place if word[0] in "0^" else place - len(word) // 2, inner + 1 - len(word)))
        if all(cell == " " for cell in line[max(0, start - 1) : start + len(word) + 1]):
            line[start : start + len(word)] = word
    return (" " * (gap + 1) + "".join(line)).rstrip()
