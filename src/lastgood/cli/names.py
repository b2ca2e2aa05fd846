"""pin, unpin, tag, untag, note, record: what people and evaluation jobs add to a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from lastgood.cli import text
from lastgood.cli.place import REV, adopted, pick, place, run_option
from lastgood.errors import NoCheckpoint, UsageError
from lastgood.model import Record
from lastgood.repo import journal, metrics, pins
from lastgood.view import View, look


@click.command()
@click.argument("rev", type=REV)
@run_option
def pin(root: str | None, rev: str) -> None:
    """Hold a checkpoint: neither a policy nor `prune` deletes or strips it."""
    path, _, record = _one(root, rev, "pin")
    pins.add(path, record.id, pins.PIN)
    click.echo(f"pinned {record.name}; `lastgood unpin {rev}` lets go of it", err=True)


@click.command()
@click.argument("rev", type=REV)
@run_option
def unpin(root: str | None, rev: str) -> None:
    """Let go of a pinned checkpoint. Tags go on holding it."""
    path, _, record = _one(root, rev, "unpin")
    if not pins.remove(path, record.id, pins.PIN):
        raise UsageError(f"{record.name} isn't pinned", hint=_held(record.pinned))
    click.echo(f"unpinned {record.name}", err=True)


@click.command()
@click.argument("name", required=False)
@click.argument("rev", type=REV, required=False)
@run_option
@click.option("-f", "--force", is_flag=True, help="Take the tag from another checkpoint that has it.")
def tag(root: str | None, name: str | None, rev: str | None, force: bool) -> None:
    """Give a checkpoint a name that survives; without a NAME, list the tags. REV is `latest` if left out.

    Valid names follow git's rules for refs. A tagged checkpoint is never deleted or stripped.
    """
    path, word = place(root, rev)
    view = look(path)
    if name is None:
        for record in view.records:
            for held in record.pinned:
                if held != pins.PIN:
                    click.echo(f"{text.plain(held)}\t{record.name}")
        return
    pins.check_name(name)
    record = adopted(view, pick(view, word or "latest"), "tag")
    holder = next((r for r in view.records if name in r.pinned), None)
    if holder is not None and holder.id == record.id:
        return
    if holder is not None and not force:
        raise UsageError(f"{holder.name} has the tag {name} already", hint="--force moves it")
    pins.add(path, record.id, name)
    moved = f" (was {holder.name})" if holder is not None else ""
    click.echo(f"tagged {record.name} as {name}{moved}", err=True)


@click.command()
@click.argument("name")
@run_option
def untag(root: str | None, name: str) -> None:
    """Take a name away. The checkpoint stays until a policy or `prune` lets it go."""
    path, _ = place(root, None)
    holder = next((id for id, names in pins.readable(path).items() if name in names and name != pins.PIN), None)
    if holder is None:
        raise NoCheckpoint(f"no checkpoint has the tag {name!r}", hint="`lastgood tag` lists them")
    pins.remove(path, holder, name)
    click.echo(f"removed the tag {text.plain(name)}", err=True)


@click.command()
@click.argument("rev", type=REV)
@click.argument("words", nargs=-1)
@run_option
@click.option("--clear", is_flag=True, help="Remove the note.")
def note(root: str | None, rev: str, words: tuple[str, ...], clear: bool) -> None:
    """Write a line about a checkpoint; without a text, print it."""
    path, view, record = _one(root, rev, "note")
    line = " ".join(words)
    if not line and not clear:
        click.echo(text.plain(view.notes.get(record.id, "")))
        return
    if not line.isprintable() or len(line) > 2000:
        raise UsageError("a note is one line of at most 2000 characters that can be printed")
    pins.write_note(path, record.id, line)


@click.command()
@click.argument("rev", type=REV)
@click.argument("pairs", metavar="KEY=VALUE...", nargs=-1, required=True)
@run_option
def record(root: str | None, rev: str, pairs: tuple[str, ...]) -> None:
    """Add metrics to a checkpoint, from any process and while the run goes on: `lastgood record 500 mmlu=0.61`.

    They count for `best` and for every policy from then on. A later value of the same name wins.
    """
    path, _, chosen = _one(root, rev, "record")
    values = dict(_pair(pair) for pair in pairs)
    metrics.record(path, chosen.id, chosen.step, values)
    journal.append(path, "recorded", step=chosen.step, id=chosen.id, metrics={k: str(v) for k, v in values.items()})
    click.echo(f"{chosen.name}: " + "  ".join(f"{k}={v:g}" for k, v in values.items()), err=True)


def _one(root: str | None, rev: str, verb: str) -> tuple[Path, View, Record]:
    """(run, what is in it, the checkpoint that is meant). Raises UsageError for one without a manifest."""
    path, word = place(root, rev)
    view = look(path)
    return path, view, adopted(view, pick(view, word or "latest"), verb)


def _pair(pair: str) -> tuple[str, float]:
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise UsageError(f"{pair!r}: metrics are given as KEY=VALUE", hint="for instance mmlu=0.61")
    try:
        number: Any = float(value)
    except ValueError:
        raise UsageError(f"{value!r} is not a number", hint=f"{name}=0.61") from None
    if not math.isfinite(number):
        raise UsageError(f"{name}={value} can't rank anything", hint="leave a metric out that has no value")
    return name, metrics.checked(name, number)


def _held(names: tuple[str, ...]) -> str:
    return f"it is held by {', '.join(names)}: `lastgood untag NAME`" if names else ""
