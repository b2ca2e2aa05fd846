"""Listings: columns that can be chosen and sorted, JSON, and lines for scripts."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
import msgspec

from lastgood import units
from lastgood.cli import text
from lastgood.errors import UsageError

Row = Mapping[str, Any]
F = TypeVar("F", bound=Callable[..., Any])


class Column(msgspec.Struct, frozen=True):
    """show: the value as people read it. right: numbers. shrink: may be cut on a narrow terminal."""

    key: str
    title: str
    show: Callable[[Any], str]
    right: bool = False
    shrink: bool = False


class Style(msgspec.Struct, frozen=True):
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
        return str(count) if self.bytes or not self.header else units.size(count, si=self.si)


def options(function: F) -> F:
    """The options that every listing has: they arrive as one `style`."""

    @click.option("-o", "columns", metavar="COL,...", help="Columns to show, in this order.")
    @click.option("--sort", metavar="COL", help="Sort by a column; --sort=-COL turns it round.")
    @click.option("-H", "script", is_flag=True, help="For scripts: no header, tabs, exact values.")
    @functools.wraps(function)
    def wrapped(*args: Any, columns: str | None, sort: str | None, script: bool, style: Style, **rest: Any) -> Any:
        chosen = tuple(word.strip() for word in columns.split(",")) if columns else ()
        wanted = msgspec.structs.replace(style, columns=chosen, sort=sort, header=not script)
        return function(*args, style=wanted, **rest)

    return forms(wrapped)  # type: ignore[return-value]


def forms(function: F) -> F:
    """The options of what isn't a listing: the form of the output, and of sizes in it."""

    @click.option("--json", "as_json", is_flag=True, help="JSON with a versioned schema (docs/json.md).")
    @click.option("--bytes", "exact", is_flag=True, help="Sizes in bytes.")
    @click.option("--si", is_flag=True, help="Sizes in powers of 1000.")
    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, exact: bool, si: bool, **rest: Any) -> Any:
        return function(*args, style=Style(json=as_json, bytes=exact, si=si), **rest)

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
    cells = [_cells(column, rows) for column in columns]
    titles = [text.plain(column.title) for column in columns]
    widths = [max(text.width(title), _widest(column)) for title, column in zip(titles, cells, strict=True)]
    if columns_wide is not None:
        _narrow(columns, widths, columns_wide)
    shown = [
        _padded([title, *column], width, spec.right)
        for spec, title, column, width in zip(columns, titles, cells, widths, strict=True)
        if width
    ]
    table = ["  ".join(row).rstrip() for row in zip(*shown, strict=True)]
    return [click.style(table[0], bold=True), *table[1:]]


# Column by column, and with one look at all of a column's text: a listing may have ten thousand rows.


def _cells(column: Column, rows: Sequence[Row]) -> list[str]:
    key, show = column.key, column.show
    cells = [show(row[key]) if row.get(key) is not None else "-" for row in rows]
    whole = "".join(cells)
    return cells if whole.isascii() and whole.isprintable() else [text.plain(cell) for cell in cells]


def _widest(cells: Sequence[str]) -> int:
    ascii_only = "".join(cells).isascii()
    return max(map(len if ascii_only else text.width, cells), default=0)


def _padded(cells: Sequence[str], wide: int, right: bool) -> list[str]:
    if "".join(cells).isascii() and max(map(len, cells)) <= wide:
        return [cell.rjust(wide) for cell in cells] if right else [cell.ljust(wide) for cell in cells]
    short = [text.fit(cell, wide) for cell in cells]
    gaps = [" " * (wide - text.width(cell)) for cell in short]
    return [gap + cell if right else cell + gap for gap, cell in zip(gaps, short, strict=True)]


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
    return max(20, _screen()[0]) if sys.stdout.isatty() else None


def _screen() -> tuple[int, int]:
    """(columns, lines); 80 by 24 for a terminal that doesn't say."""
    try:
        columns, lines = os.get_terminal_size()
    except OSError:
        return 80, 24
    return columns or 80, lines or 24


def emit(found: Sequence[str]) -> None:
    """Data to stdout; through the pager if it is more than a screen of a terminal."""
    whole = "\n".join(found)
    if sys.stdout.isatty() and len(found) > _screen()[1] and os.environ.get("PAGER") != "":
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
