"""lastgood watch: the log of a running run, as it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from lastgood import units
from lastgood.cli import text
from lastgood.cli.log import foot, listing, log_columns, title
from lastgood.cli.place import run_at, run_option
from lastgood.cli.table import Style, choose
from lastgood.repo import journal
from lastgood.repo.lock import RunLock
from lastgood.store import local


@click.command()
@click.argument("run", required=False)
@run_option
@click.option("--interval", default=2.0, type=click.FloatRange(0.1, 3600), help="Seconds between looks (default: 2).")
@click.option("--once", is_flag=True, help="Draw once and stop.")
def watch(root: str | None, run: str | None, interval: float, once: bool) -> None:
    """A live table of the run's checkpoints, its writer, its last events and the free space. Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    path = run_at(root, run)
    console = Console()
    if once or not console.is_terminal:
        console.print(_screen(path, console.height if console.is_terminal else 10_000))
        return
    with Live(_screen(path, console.height), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                live.update(_screen(path, console.height), refresh=True)
        except KeyboardInterrupt:
            pass


def _screen(path: Path, height: int) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows, head = listing(path, None)
    events = journal.read(path)[-5:]
    room = max(3, height - len(events) - 8)
    shown = choose(log_columns(Style(), head), ("step", "when", "train", "eval", "state", "size", "why"), Style())
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown:
        table.add_column(
            Text(text.plain(column.title)), justify="right" if column.right else "left", no_wrap=not column.shrink
        )
    for row in rows[:room]:
        cells = [text.plain(c.show(row[c.key])) if row.get(c.key) is not None else "-" for c in shown]
        table.add_row(*map(Text, cells), style="green" if row["best"] else "")
    free, _ = local.free(path)
    said = [Text(title(path, head, rows), style="bold"), Text(_writer(path))]
    tail = [Text(line) for line in foot(path, head, rows, rows[:room])]
    return Group(*said, table, *tail, Text(f"{units.size(free)} free"), *[Text(_event(event)) for event in events])


def _writer(path: Path) -> str:
    holder = RunLock(path).holder()
    if not holder:
        return "nobody is writing to it"
    since = holder.get("since")
    when = f" for {text.age(float(since))}" if isinstance(since, (int, float)) else ""
    return text.plain(f"written by process {holder.get('pid')} ({holder.get('command')}) on {holder.get('host')}{when}")


def _event(event: dict[str, Any]) -> str:
    clock = text.moment(event.get("time")).rpartition(" ")[2]
    what = f"{event.get('event')} {event.get('step', '')}".strip()
    reasons = event.get("reasons")
    why = f": {'; '.join(map(str, reasons))}" if isinstance(reasons, list) else ""
    return text.plain(f"{clock}  {what}{why}")
