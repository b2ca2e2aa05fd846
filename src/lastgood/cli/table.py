"""Listings: columns that can be chosen and sorted, JSON, and lines for scripts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from lastgood.cli import text
from lastgood.errors import UsageError

Row = Mapping[str, Any]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Column:
    """show: the value as people read it. right: numbers. shrink: may be cut on a narrow terminal."""

    key: str
    title: str
    show: Callable[[Any], str]
    right: bool = False
    shrink: bool = False


@dataclass(frozen=True, slots=True)
class Style:
    """What the user asked of a listing."""

    json: bool = False
    columns: tuple[str, ...] = ()
    sort: str | None = None
    header: bool = True
    bytes: bool = False
    si: bool = False

    def size(self, count: int | None) -> str:
        if count is None:
            return "-"
        return str(count) if self.bytes or not self.header else text.size(count, si=self.si)


def options(function: F) -> F:
    """The options that every listing has: they arrive as one `style`."""
    import functools

    @click.option("--json", "as_json", is_flag=True, help="JSON with a versioned schema (docs/json.md).")
    @click.option("-o", "columns", metavar="COL,...", help="Columns to show, in this order.")
    @click.option("--sort", metavar="COL", help="Sort by a column; -COL turns it round.")
    @click.option("-H", "script", is_flag=True, help="For scripts: no header, tabs, exact values.")
    @click.option("--bytes", "exact", is_flag=True, help="Sizes in bytes.")
    @click.option("--si", is_flag=True, help="Sizes in powers of 1000.")
    @functools.wraps(function)
    def wrapped(
        *args: Any,
        as_json: bool,
        columns: str | None,
        sort: str | None,
        script: bool,
        exact: bool,
        si: bool,
        **rest: Any,
    ) -> Any:
        chosen = tuple(word.strip() for word in columns.split(",")) if columns else ()
        return function(*args, style=Style(as_json, chosen, sort, not script, exact, si), **rest)

    return wrapped  # type: ignore[return-value]


def choose(known: Sequence[Column], default: Sequence[str], style: Style) -> list[Column]:
    """The columns to show. Raises UsageError for one that doesn't exist."""
    table = {column.key: column for column in known}
    wanted = style.columns or tuple(default)
    unknown = [key for key in wanted if key not in table]
    if unknown:
        raise UsageError(f"there is no column {', '.join(unknown)}", hint=f"columns: {', '.join(table)}")
    return [table[key] for key in wanted]


def ordered(rows: Sequence[Row], known: Sequence[Column], style: Style) -> list[Row]:
    """The rows by the column that --sort names; missing values last."""
    if style.sort is None:
        return list(rows)
    key = style.sort.removeprefix("-")
    if key not in {column.key for column in known}:
        raise UsageError(f"there is no column {key}", hint=f"columns: {', '.join(c.key for c in known)}")
    there = [row for row in rows if row.get(key) is not None]
    turned = style.sort.startswith("-")
    try:
        there.sort(key=lambda row: row[key], reverse=turned)
    except TypeError:  # lists, or text beside numbers
        there.sort(key=lambda row: str(row[key]), reverse=turned)
    return there + [row for row in rows if row.get(key) is None]


def lines(
    columns: Sequence[Column], rows: Sequence[Row], style: Style, *, columns_wide: int | None = None
) -> list[str]:
    """The table as text. columns_wide: the terminal's width; None doesn't cut anything."""
    if not style.header:
        return ["\t".join(_exact(row.get(c.key)) for c in columns) for row in rows]
    cells = [[text.plain(c.show(row[c.key])) if row.get(c.key) is not None else "-" for c in columns] for row in rows]
    titles = [text.plain(column.title) for column in columns]
    widths = [max(map(text.width, column)) for column in zip(titles, *cells, strict=True)]
    if columns_wide is not None:
        _narrow(columns, widths, columns_wide)
    return [click.style(_line(columns, titles, widths), bold=True), *(_line(columns, row, widths) for row in cells)]


def _line(columns: Sequence[Column], cells: Sequence[str], widths: Sequence[int]) -> str:
    parts = []
    for column, cell, wide in zip(columns, cells, widths, strict=True):
        if wide == 0:
            continue
        short = cell if len(cell) <= wide and cell.isascii() else text.fit(cell, wide)
        gap = " " * (wide - text.width(short))
        parts.append(gap + short if column.right else short + gap)
    return "  ".join(parts).rstrip()


def _narrow(columns: Sequence[Column], widths: list[int], wide: int) -> None:
    """Cut what may be cut; then leave columns out from the right, never the first."""
    over = sum(widths) + 2 * (len(widths) - 1) - wide
    for index, column in reversed(list(enumerate(columns))):
        if over > 0 and column.shrink:
            cut = min(over, max(0, widths[index] - max(8, len(column.title))))
            widths[index] -= cut
            over -= cut
    for index in reversed(range(1, len(widths))):
        if over <= 0:
            break
        over -= widths[index] + 2
        widths[index] = 0


def _exact(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return text.plain("; ".join(map(str, value)))
    return repr(value) if isinstance(value, float) else text.plain(str(value))


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; COLUMNS counts even where it is none; None: unlimited."""
    if os.environ.get("COLUMNS", "").isdigit():
        return max(20, int(os.environ["COLUMNS"]))
    return max(20, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def emit(found: Sequence[str]) -> None:
    """Data to stdout; through the pager if it is more than a screen of a terminal."""
    whole = "\n".join(found)
    if sys.stdout.isatty() and len(found) > shutil.get_terminal_size().lines and os.environ.get("PAGER") != "":
        click.echo_via_pager(f"{whole}\n")
    elif found:
        click.echo(whole)


def emit_json(schema: str, content: Mapping[str, Any]) -> None:
    """One JSON object that names its schema; NaN and infinity become null, as JSON has no word for them."""
    try:
        out = json.dumps({"schema": schema, **content}, indent=1, allow_nan=False, default=str)
    except ValueError:
        out = json.dumps(_valid({"schema": schema, **content}), indent=1, allow_nan=False, default=str)
    click.echo(out)


def _valid(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _valid(item) for key, item in value.items()}
    return [_valid(item) for item in value] if isinstance(value, (list, tuple)) else value
