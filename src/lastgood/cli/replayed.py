"""`plan RUN`: another policy on a real run's history, as people read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from lastgood.cli import text
from lastgood.cli.table import Column, Style, emit, emit_json, lines, terminal_width
from lastgood.errors import UsageError
from lastgood.planner.options import KEEP
from lastgood.planner.replay import Replay, replay
from lastgood.policy import Keep
from lastgood.pruning import ranks
from lastgood.view import View, look

SCHEMA = "lastgood.replay/1"


def show(path: Path, given: dict[str, Any], style: Style) -> None:
    """What the policy would have left, as a table or JSON."""
    others = [name for name in given if name not in KEEP and name not in ("monitor", "mode")]
    if others:
        option = f"--{others[0].replace('_', '-')}"
        raise UsageError(f"{option} belongs to a plan with --model", hint="of a run only the policy can be replayed")
    view = look(path)
    found = replay(view, policy_for(view, given))
    if style.json:
        emit_json(SCHEMA, {"run": str(path), **msgspec.to_builtins(found)})
        return
    emit(_lines(found, style))


def policy_for(view: View, given: dict[str, Any]) -> Keep:
    """The policy that was asked for, with the run's own metric; without rules the run's own policy."""
    asked = given.get("monitor", ())
    for name in (asked,) if isinstance(asked, str) else asked:
        ranks(view, name)
    rules = {KEEP[name]: value for name, value in given.items() if name in KEEP}
    named: dict[str, Any] = {name: given[name] for name in ("monitor", "mode") if name in given}
    if not rules:
        if view.keep is None and not named:
            raise UsageError("which policy?", hint="lastgood plan RUN --keep-last 2 --keep-best 3")
        own: dict[str, Any] = view.keep.options() if view.keep is not None else {}
        if "monitor" in named:
            own.pop("mode", None)
        return Keep(**{**own, **named})
    if "monitor" not in named and view.monitor is not None:
        named = {**view.metric, **named}
    return Keep(**rules, **named)


def _lines(found: Replay, style: Style) -> list[str]:
    less = found.bytes_now - found.bytes_then
    count = sum(row.then != "deleted" for row in found.rows)
    changed = sum(row.changed for row in found.rows)
    if not changed:
        answer = f"nothing would be different: {count} checkpoints, {style.size(found.bytes_then)}"
    else:
        word = f"{style.size(abs(less))} {'less' if less >= 0 else 'more'}"
        answer = f"{count} checkpoints, {style.size(found.bytes_then)}: {word}, {changed} would be different"
    columns = [
        Column("mark", "", str),
        Column("step", "STEP", str, right=True),
        Column("value", text.plain(found.keep.primary[0] or "metric").upper(), text.number, right=True),
        Column("now", "NOW", str),
        Column("then", "THEN", str),
        Column("size", "SIZE", style.size, right=True),
        Column("why", "WHY", str, shrink=True),
    ]
    rows = [
        {
            "mark": _mark(row.size_now, row.size_then) if row.changed else " ",
            "step": row.step,
            "value": row.value,
            "now": row.now,
            "then": row.then,
            "size": row.size_then,
            "why": " · ".join(map(text.plain, row.reasons)),
        }
        for row in reversed(found.rows)
    ]
    was = f"   (the run: {text.plain(found.was)})" if found.was else ""
    out = [answer, f"{text.plain(found.policy)}{was}", *lines(columns, rows, style, columns_wide=terminal_width())]
    out.append(f"at most {style.size(found.peak)} during a save")
    return [*out, *(f"note: {text.plain(note)}" for note in found.notes)]


def _mark(now: int, then: int) -> str:
    return "-" if then < now else "+"
