"""lastgood save: a checkpoint now, of a run that another process is training."""

from __future__ import annotations

import time
from pathlib import Path

import click

from lastgood.cli import text
from lastgood.cli.place import run_at, run_option
from lastgood.errors import LastgoodError, NoCheckpoint, UsageError
from lastgood.model import Record
from lastgood.repo import request
from lastgood.repo.layout import HIDDEN
from lastgood.repo.lock import at_work, described
from lastgood.repo.read import records

PAUSE = 0.1
"""Seconds between two looks at the run."""


@click.command()
@click.argument("run", required=False)
@run_option
@click.option("--stop", is_flag=True, help="Then leave, with status 75; the same command continues.")
@click.option("--wait", type=float, metavar="S", help="Wait until it is there, at most S seconds, and print its name.")
def save(root: str | None, run: str | None, stop: bool, wait: float | None) -> None:
    """Ask a run that is training for a checkpoint at its next step, from any terminal.

    With --wait the status is 0 only if a newer checkpoint was committed. Without it nothing is waited for. Any tool can
    ask the same way: `touch RUN/.lastgood/save-now`, or `save-and-stop`.
    """
    path = run_at(root, run)
    if wait is not None and not 0 <= wait < float("inf"):
        raise UsageError(f"--wait {wait:g}: so long can't be waited", hint="--wait 600")
    holder = at_work(path) if (path / HIDDEN).is_dir() else {}
    if not holder:
        raise NoCheckpoint(
            f"nobody is training in {text.plain(str(path))}: there is nothing that could be saved",
            hint="a run that `lastgood.manage` doesn't manage can't be asked",
        )
    before = _newest(path)
    request.ask(path, stop=stop)
    click.echo(f"asked {text.plain(described(holder))} for a checkpoint{' and to stop' if stop else ''}", err=True)
    if wait is not None:
        click.echo(_wait(path, before, wait, stop).name)


def _wait(path: Path, before: int, seconds: float, stop: bool) -> Record:
    """The checkpoint that came. Raises LastgoodError if none did; the request is taken back then."""
    end = time.monotonic() + seconds
    while True:
        working = bool(at_work(path))  # asked first: a run that saves and ends has saved when it is seen as ended
        newer = [r for r in records(path) if r.ours and r.seq > before]
        if newer:
            return max(newer, key=lambda r: r.seq)
        if not working or time.monotonic() >= end:
            break
        time.sleep(min(PAUSE, max(0.0, end - time.monotonic())))
    unheard = request.withdraw(path, stop=stop)
    what = "ended without a checkpoint" if not working else f"wrote no checkpoint within {seconds:g} s"
    raise LastgoodError(
        f"the run {what}" + ("; the request was taken back" if unheard else ", though it took the request"),
        hint="a step, or an evaluation, may take longer; `lastgood show` and the run's own output say more",
    )


def _newest(path: Path) -> int:
    return max((r.seq for r in records(path) if r.ours), default=0)
