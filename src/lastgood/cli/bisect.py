"""lastgood bisect: the last healthy checkpoint, by losses, by the tensors themselves, or by a command."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from lastgood import checkup
from lastgood.cli import text
from lastgood.cli.place import adopted, pick, run_at, run_option
from lastgood.cli.table import Style, emit, emit_json, forms
from lastgood.errors import LastgoodError, NoCheckpoint, UsageError
from lastgood.halves import Verdict, search
from lastgood.model import Record
from lastgood.repo import journal, poison
from lastgood.supervise.command import PLACE, fill
from lastgood.view import View, look

SCHEMA = "lastgood.bisect/1"
_COLOUR = {"good": "green", "bad": "red", "skipped": "yellow"}


class Tested(msgspec.Struct, frozen=True):
    """One checkpoint that was looked at. seen: what says so."""

    record: Record
    verdict: Verdict
    seen: tuple[str, ...]


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", metavar="[-- CMD...]", nargs=-1)
@run_option
@click.option("--mark", is_flag=True, help="Mark the bad ones as poisoned: no resume takes them any more.")
@click.option("--unmark", metavar="REV", help="This checkpoint is healthy after all; nothing is searched.")
@forms
def bisect(root: str | None, command: tuple[str, ...], mark: bool, unmark: str | None, style: Style) -> None:
    """Find the last healthy checkpoint on the current branch.

    Without CMD the losses of every step and all numbers in the files are looked at, the newest checkpoint first. With
    CMD, in which `{checkpoint}` becomes the path, by halves as git bisect run: status 0 is good, 125 can't be told,
    anything else up to 127 is bad, and everything after a bad one is. Nothing is changed but by --mark and --unmark.
    Status 3 if none is healthy.

    \b
    lastgood -C out bisect --mark -- python evaluate.py {checkpoint}
    """
    path = run_at(root, None)
    view = look(path)
    if unmark is not None:
        _unmark(view, unmark, command, mark)
        return
    order = sorted((r for r in view.records if r.ours and r.current), key=lambda r: r.seq)
    if not order:
        raise NoCheckpoint(f"there is no checkpoint to look at in {text.plain(str(path))}")
    if command and not any(PLACE in word for word in command):
        raise UsageError(f"the command doesn't say where the checkpoint goes: {PLACE} stands for its path")
    tested = _by_command(view, order, command) if command else _by_numbers(view, order)
    good = max((t.record for t in tested if t.verdict == "good"), key=lambda r: r.seq, default=None)
    bad = _bad(order, tested, good, command)
    marked = _mark(path, bad) if mark else []
    if style.json:
        emit_json(SCHEMA, _content(tested, good, bad, marked))
    else:
        emit(_lines(tested, good, bad, marked))
    if good is None:
        raise click.exceptions.Exit(3)


def _by_numbers(view: View, order: Sequence[Record]) -> list[Tested]:
    """The newest first, until one is healthy: each is read whole."""
    losses = checkup.by_trail(view.root)
    tested: list[Tested] = []
    for record in reversed(order):
        seen = [f"marked: {record.poisoned}"] if record.poisoned else []
        seen += [losses[record.id]] if record.id in losses and losses[record.id] != record.poisoned else []
        verdict: Verdict = "bad" if seen else "good"
        try:
            tensors = checkup.by_tensors(view, record)
            seen += [*tensors[:3], *([f"and {len(tensors) - 3} more tensors"] if len(tensors) > 3 else [])]
            verdict = "bad" if seen else "good"
        except LastgoodError as error:
            seen, verdict = [*seen, error.message], verdict if seen else "skipped"
        tested.append(Tested(record, verdict, tuple(seen) or ("losses and tensors are finite",)))
        if verdict == "good":
            break
    return tested


def _by_command(view: View, order: Sequence[Record], command: Sequence[str]) -> list[Tested]:
    tested: list[Tested] = []

    def test(record: Record) -> Verdict:
        code = _status(fill(command, view.path(record)))
        if code < 0 or code > 127:
            raise LastgoodError(
                f"the command ended with {code} for {record.name}: that is neither good nor bad",
                hint="0 good, 125 can't be told, 1 to 127 bad; nothing was marked",
            )
        verdict: Verdict = "good" if code == 0 else "skipped" if code == 125 else "bad"
        tested.append(Tested(record, verdict, (f"status {code}",)))
        return verdict

    search(order, test)
    return sorted(tested, key=lambda item: -item.record.seq)


def _status(line: Sequence[str]) -> int:
    try:
        # What it prints is for the person: our own result alone goes to standard output.
        return subprocess.run(line, stdout=2, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise UsageError(f"{line[0]} can't be run: {error.strerror or error}") from error


def _bad(
    order: Sequence[Record], tested: Sequence[Tested], good: Record | None, command: Sequence[str]
) -> dict[str, tuple[Record, str]]:
    """id -> (record, reason) of the ones to mark: those seen to be bad; by halves all after the first of them."""
    seen = {t.record.id: (t.record, "; ".join(t.seen)) for t in tested if t.verdict == "bad" and t.record.id}
    if not command or not seen:
        return seen
    first = min((record for record, _ in seen.values()), key=lambda r: r.seq)
    word = f"bisect: {shlex.join(command)[:200]}"
    return {
        r.id: (r, f"{word}: {seen[r.id][1]}" if r.id in seen else f"{word}: after {first.name}, which is bad")
        for r in order
        if r.id and r.seq >= first.seq and (good is None or r.seq > good.seq)
    }


def _mark(path: Path, bad: dict[str, tuple[Record, str]]) -> list[str]:
    new = {id: reason for id, (record, reason) in bad.items() if not record.poisoned}
    if new:
        poison.mark(path, new)
    for id, reason in new.items():
        journal.append(path, "poisoned", step=bad[id][0].step, id=id, reason=reason)
    return [bad[id][0].name for id in new]


def _unmark(view: View, rev: str, command: Sequence[str], mark: bool) -> None:
    if command or mark:
        raise UsageError("--unmark takes a mark away and searches nothing", hint="lastgood bisect --unmark REV")
    record = adopted(view, pick(view, rev), "unmark")
    if not record.poisoned:
        raise UsageError(f"{record.name} isn't marked as poisoned")
    poison.mark(view.root, {record.id: ""})
    journal.append(view.root, "healed", step=record.step, id=record.id, reason=record.poisoned)
    click.echo(f"{record.name} counts as healthy again (was: {text.plain(record.poisoned)})", err=True)


def _content(
    tested: Sequence[Tested], good: Record | None, bad: dict[str, tuple[Record, str]], marked: Sequence[str]
) -> dict[str, Any]:
    first = min((record for record, _ in bad.values()), key=lambda r: r.seq, default=None)
    rows = [{"name": t.record.name, "step": t.record.step, "verdict": t.verdict, "seen": list(t.seen)} for t in tested]
    return {
        "good": good.name if good is not None else None,
        "first_bad": first.name if first is not None else None,
        "tested": rows,
        "marked": list(marked),
    }


def _lines(
    tested: Sequence[Tested], good: Record | None, bad: dict[str, tuple[Record, str]], marked: Sequence[str]
) -> list[str]:
    wide = max(text.width(text.plain(t.record.name)) for t in tested)
    out = []
    for item in tested:
        name = text.plain(item.record.name)
        word = click.style(f"{item.verdict.upper():<7}", fg=_COLOUR[item.verdict])
        out.append(f"{name}{' ' * (wide - text.width(name))}  {word}  {' · '.join(map(text.plain, item.seen))}")
    newer = [record for record, _ in bad.values() if good is None or record.seq > good.seq]
    if good is None:
        out.append("none of them is healthy")
    elif not newer and tested[0].record is good:
        out.append(f"{text.plain(good.name)} is the newest, and healthy")
    else:
        out.append(f"{text.plain(good.name)} is the last healthy one")
    unmarked = [record for record, _ in bad.values() if not record.poisoned]
    if marked:
        out.append(f"marked as poisoned: {', '.join(map(text.plain, marked))}")
    elif unmarked:
        out.append("a resume would still take the newest: `lastgood bisect --mark` keeps it from the bad ones")
    return out
