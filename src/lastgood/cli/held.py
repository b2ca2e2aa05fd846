"""Before something is changed: ask, and hold the run."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from lastgood.errors import Refused, RunLocked
from lastgood.repo import gc
from lastgood.repo.layout import HIDDEN
from lastgood.repo.lock import RunLock

HIDDEN_FOLDERS = ("tmp", "trash", "undo", "quarantine")


def confirm(question: str, yes: bool) -> None:
    """Ask on a terminal; elsewhere --yes is needed. Raises Refused."""
    if yes:
        return
    if not sys.stdin.isatty() or os.environ.get("LASTGOOD_NO_INPUT"):
        raise Refused("nothing was done: there is nobody to ask", hint="--yes says that the plan is meant")
    while True:
        click.echo(f"{question} [y/N]: ", nl=False, err=True)
        _until_typed()
        answer = sys.stdin.readline().strip().lower()
        if answer in ("y", "yes"):
            return
        if answer in ("", "n", "no"):
            raise Refused("nothing was done")
        click.echo("Error: answer y or n", err=True)


def _until_typed() -> None:
    """Wait for a line on the terminal, so that a ^C counts from the moment that the question is shown.

    input() looks for signals and then blocks in read(): one that arrives in between is lost until the next key.
    """
    if os.name != "posix":  # there select() knows sockets only
        return
    heard, told = socket.socketpair()
    with heard, told:
        told.setblocking(False)
        before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        try:
            select.select([sys.stdin, heard], [], [])
        finally:
            signal.set_wakeup_fd(before)


@contextlib.contextmanager
def held(root: Path, dry_run: bool) -> Iterator[Path]:
    """The run's writer lock for a verb that changes checkpoints. Raises RunLocked while a training run has it.

    Gives the run's directory as changes have to name it: they fail if a training takes over meanwhile.
    """
    if dry_run:
        yield root
        return
    for name in ("", *HIDDEN_FOLDERS):
        if (root / HIDDEN / name).is_symlink():
            raise Refused(f"{root / HIDDEN / name} is a link: what is behind it isn't ours to change or delete")
    lock = RunLock(root)
    try:
        lock.acquire(anonymous=True)
    except RunLocked as error:
        raise RunLocked(
            error.message,
            hint="a running training prunes by itself; pins, tags and metrics can be changed meanwhile",
        ) from None
    try:
        gc.sweep(lock.door) if (root / HIDDEN).is_dir() else None
        yield lock.door
    except FileNotFoundError:
        if lock.door == root or lock.still_held():
            raise
        raise RunLocked(f"a training took {root} over meanwhile; what was done until then is complete") from None
    finally:
        lock.release()
