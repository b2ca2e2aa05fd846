"""prune, strip, undo: space, with the plan shown before anything is touched."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from lastgood import policy
from lastgood.cli import text
from lastgood.cli.place import REV, pick, place, run_at, run_option
from lastgood.cli.table import Style, emit, emit_json, forms
from lastgood.errors import NotEnoughSpace, Refused, RunLocked, UsageError
from lastgood.manager import RESERVE
from lastgood.model import Record
from lastgood.policy import Decision, Keep
from lastgood.repo import bin, gc, journal
from lastgood.repo.layout import HIDDEN
from lastgood.repo.lock import RunLock
from lastgood.store import local
from lastgood.view import View, look

SCHEMA = "lastgood.prune/1"
HIDDEN_FOLDERS = ("tmp", "trash", "undo", "quarantine")
TRAINERS = ("trainer", "fsdp", "deepspeed")
"""Layouts whose checkpoints `--stock` may delete: directories of their own, one per step."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What the plan may range over besides this run's own checkpoints."""

    stock: bool = False
    abandoned: bool = False
    incomplete: bool = False


@click.command()
@click.argument("run", required=False)
@run_option
@forms
@click.option("--keep-last", "last", type=int, metavar="N", help="Keep the newest N.")
@click.option("--keep-best", "best", type=int, metavar="N", help="Keep the best N by --monitor.")
@click.option("--keep-every", "every", type=int, metavar="K", help="Keep those at multiples of K steps.")
@click.option("--keep-within", "within", metavar="TIME", help="Keep those saved within 2d, 36h ... of the newest.")
@click.option(
    "--keep-total", "total", type=int, metavar="N", help="N in all, the newest and the best: save_total_limit."
)
@click.option("--full", type=int, metavar="N", help="Full state only for the newest N; the others keep their weights.")
@click.option("--monitor", metavar="METRIC", help="What best means; else the run's own metric.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Whether a lower or a higher value is better.")
@click.option("--to-free", metavar="SIZE", help="Only as much as frees 200GB, the oldest first; frees it at once.")
@click.option("--stock", is_flag=True, help="Also checkpoints that a Trainer wrote without lastgood.")
@click.option("--abandoned", is_flag=True, help="Also those on branches that were left.")
@click.option("--incomplete", is_flag=True, help="Also what interrupted saves left behind.")
@click.option("--now/--trash", "now", default=None, help="Free the space at once, or keep it for `undo`.")
@click.option("--empty-trash", is_flag=True, help="Free what earlier prunes moved to the trash.")
@click.option("--no-verify", is_flag=True, help="Don't hash the newest checkpoint before others are deleted.")
@click.option("-n", "--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
def prune(
    root: str | None, run: str | None, style: Style, to_free: str | None, stock: bool, abandoned: bool,
    incomplete: bool, now: bool | None, empty_trash: bool, no_verify: bool, dry_run: bool, yes: bool, **rules: Any,
) -> None:  # fmt: skip
    """Delete checkpoints by policy. The plan is shown first, with a reason for each.

    A checkpoint that any rule wants is kept. Without rules the run's own policy is applied. Never deleted: the last
    good one, the best one, pinned and tagged ones, other runs' ones. What goes is moved to the trash, from where
    `lastgood undo` brings it back, unless the disk has no room for the next save: then its space is freed at once.
    """
    path = run_at(root, run)
    scope = Scope(stock, abandoned, incomplete)
    with held(path, dry_run):
        if empty_trash:
            _empty(path, style, dry_run, yes)
            return
        view = look(path, outline=dry_run)
        decisions = plan(view, rules, to_free=to_free, scope=scope)
        if not dry_run and not no_verify and any(d.action == "delete" for d in decisions):
            view, decisions = _proven(view, rules, decisions, to_free=to_free, scope=scope)
        todo = gc.plan([d.record for d in decisions], decisions, stock=stock)
        husks = _husks(view, stock) if incomplete else []
        total = todo.bytes + sum(occupied(view.path(record)) for record in husks)
        free_now = (to_free is not None or _short(view)) if now is None else now
        _show(view, decisions, todo, style, free_now=free_now, dry_run=dry_run, husks=husks)
        if dry_run or not (todo.items or husks):
            return
        confirm(f"remove {len(todo.items) + len(husks)} things?", yes)
        number = None if free_now else bin.begin(path, "prune")
        gc.execute(path, todo, undoable=number)
        for record in husks:
            _remove(path, record, number)
        _told(total, free_now)


def _told(total: int, free_now: bool) -> None:
    said = f"freed {text.size(total)}" if free_now else f"moved {text.size(total)} to the trash"
    rest = "" if free_now else "; `lastgood undo` brings it back, `lastgood prune --empty-trash` frees the space"
    click.echo(said + rest, err=True)


def plan(view: View, rules: dict[str, Any], *, to_free: str | None = None, scope: Scope = Scope()) -> list[Decision]:
    """One decision per checkpoint: the policy's, then narrowed to what was asked for. Pure but for the view's reads."""
    keep = _keep(view, rules, to_free)
    native = {record.name: record for record in view.native}
    found = [
        record if record.id or (scope.stock and record.layout in TRAINERS) else native.get(record.name, record)
        for record in view.records
    ]
    found = [msgspec.structs.replace(r, state="stock") if r.ours and not r.id and not scope.stock else r for r in found]
    if not any(record.id for record in found):
        found = [msgspec.structs.replace(r, current=True) if r.ours else r for r in found]
    decisions = [_whole(decision) for decision in policy.decide(found, keep, protect=view.protect)]
    if scope.abandoned:
        decisions = [_abandoned(decision) for decision in decisions]
    if to_free is None:
        return decisions
    try:
        wanted = text.parse_size(to_free)
    except ValueError:
        raise UsageError(f"--to-free {to_free!r} is not a size", hint="200GB, 1.5TiB, 500MiB") from None
    enough = policy.enough(decisions, wanted, lambda decision: gc.gain(_whole(decision)))
    enough = tuple(_whole(decision) for decision in enough)
    freed = sum(gc.gain(decision) for decision in enough)
    if freed < wanted:
        raise NotEnoughSpace(
            f"only {text.size(freed)} of the wanted {text.size(wanted)} can be freed: the rest is the last good"
            " checkpoint, the best, or held",
            hint="fewer rules, `lastgood unpin`, --stock, --abandoned; `lastgood df` shows what takes the space",
        )
    return list(enough)


def _keep(view: View, rules: dict[str, Any], to_free: str | None) -> Keep:
    chosen = {name: value for name, value in rules.items() if value is not None}
    if "within" in chosen:
        try:
            chosen["within"] = text.parse_duration(chosen["within"])
        except ValueError:
            raise UsageError(f"--keep-within {chosen['within']!r} is not a time", hint="2d, 36h, 90m") from None
    limits = chosen.keys() - {"monitor", "mode"}
    if not limits and to_free is None:
        if view.keep is None or view.keep.options().keys() <= {"monitor", "mode"}:
            raise UsageError(
                "what is to be kept? The run has no policy of its own that lets anything go",
                hint="lastgood prune --keep-last 2 --keep-best 3 --dry-run",
            )
        # As it is, without a metric that the run itself doesn't go by: what the live run would do, and its reasons.
        return Keep(**{**view.keep.options(), **chosen})
    if not limits and to_free is not None:
        chosen = {"last": 1, **chosen}
    if "monitor" not in chosen and view.monitor is not None:
        chosen |= {"monitor": view.monitor, "mode": chosen.get("mode", view.mode)}
    return Keep(**chosen)


def _whole(decision: Decision) -> Decision:
    """A stock checkpoint without its optimizer would be resumed from with a fresh one, silently: all or nothing."""
    if decision.action == "strip" and not decision.record.id:
        return Decision(decision.record, "keep", (*decision.reasons, "whole, because it isn't adopted"))
    return decision


def _abandoned(decision: Decision) -> Decision:
    record = decision.record
    if record.ours and record.id and not record.current and not record.pinned:
        return Decision(record, "delete", ("on a branch that was left",))
    return decision


def _proven(view: View, rules: dict[str, Any], decisions: list[Decision], **how: Any) -> tuple[View, list[Decision]]:
    """Deleting the others makes the newest the last good one: it is hashed first, and passed over if damaged."""
    while True:
        newest = policy.latest([d.record for d in decisions])
        if newest is None:
            raise Refused("no full checkpoint is good: nothing is deleted", hint="`lastgood verify --full` says why")
        faults = view.problems(newest, full=True)
        if not faults:
            return view, decisions
        click.echo(f"{text.plain(newest.name)} is damaged ({text.plain(faults[0])}): it doesn't count", err=True)
        swap = msgspec.structs.replace(newest, state="incomplete", problem=faults[0])
        view = msgspec_replace(view, newest.name, swap)
        decisions = plan(view, rules, **how)


def msgspec_replace(view: View, name: str, record: Record) -> View:
    """The view with another record in the place of `name`."""

    def swapped(found: Sequence[Record]) -> tuple[Record, ...]:
        return tuple(record if r.name == name else r for r in found)

    return msgspec.structs.replace(view, native=swapped(view.native), records=swapped(view.records))


def _short(view: View) -> bool:
    """Whether the disk, as it is, has no room for one more save like the newest."""
    newest = policy.latest(view.records)
    free, inodes = local.free(view.root)
    return free < (newest.size if newest is not None else 0) + RESERVE or 0 <= inodes <= 64


def _show(
    view: View,
    decisions: Sequence[Decision],
    todo: gc.Plan,
    style: Style,
    *,
    free_now: bool,
    dry_run: bool,
    husks: Sequence[Record] = (),
) -> None:
    gains = {item.record.name: item.bytes for item in todo.items}
    gains |= {record.name: occupied(view.path(record)) for record in husks}
    gone = {record.name: f"incomplete: {record.problem}" for record in husks}
    decisions = [
        Decision(d.record, "delete", (gone[d.record.name],)) if d.record.name in gone else d for d in decisions
    ]
    freed = sum(gains.values())
    rows: list[dict[str, Any]] = [
        {
            "name": d.record.name,
            "step": d.record.step,
            "id": d.record.id or None,
            "state": d.record.state,
            "action": d.action if d.record.ours or d.action != "keep" else "skip",
            "bytes": gains.get(d.record.name, 0),
            "reasons": list(d.reasons),
        }
        for d in reversed(decisions)
    ]
    if style.json:
        emit_json(SCHEMA, {"dry_run": dry_run, "frees": freed, "at_once": free_now, "decisions": rows})
        return
    wide = max((text.width(row["name"]) for row in rows), default=0)
    out = []
    for row in rows:
        word = {"keep": "KEEP  ", "strip": "STRIP ", "delete": "DELETE", "skip": "SKIP  "}[row["action"]]
        colour = {"strip": "yellow", "delete": "red", "skip": "bright_black"}.get(row["action"])
        gap = " " * (wide - text.width(row["name"]))
        size = f"-{style.size(row['bytes'])}" if row["bytes"] else row["state"]
        reasons = " · ".join(map(text.plain, row["reasons"]))
        out.append(f"{click.style(word, fg=colour)}  {text.plain(row['name'])}{gap}  {size:>11}  {reasons}")
    emit(out)
    total = sum(record.size for record in view.records)
    share = f" of {style.size(total)} ({100 * freed // total} %)" if total and not husks else ""
    if not gains:
        click.echo("nothing to remove", err=True)
    elif dry_run:
        where = "freed at once" if free_now else "kept in the trash for `lastgood undo`"
        click.echo(f"would remove {style.size(freed)}{share}, {where}. Run again without --dry-run.", err=True)
    else:
        click.echo(f"removes {style.size(freed)}{share}", err=True)


def occupied(path: Path) -> int:
    """Bytes of the files in a directory whose manifest doesn't say, or can't be read."""
    return sum(local.size(Path(at) / name) or 0 for at, _, names in os.walk(path) for name in names)


def _husks(view: View, stock: bool) -> list[Record]:
    """Incomplete directories that are provably this run's, or any of a stock run if --stock says so."""
    run = view.run
    return [
        r
        for r in view.records
        if r.state == "incomplete"
        and not r.pinned
        and ((r.manifest is not None and r.manifest.run == run and run) or (stock and r.layout in TRAINERS))
    ]


def _remove(root: Path, record: Record, number: str | None) -> None:
    if number is not None:
        bin.put(root, number, record.name)
    else:
        grave = gc._grave(root)
        local.vanish(root / record.name, grave)
        local.remove(grave)
    journal.append(root, "deleted", step=record.step, id=record.id, reasons=[f"incomplete: {record.problem}"])


def _empty(path: Path, style: Style, dry_run: bool, yes: bool) -> None:
    count, total = len(bin.operations(path)), bin.size(path)
    click.echo(f"{count} operations in the trash, {style.size(total)}", err=True)
    if dry_run or not count:
        return
    confirm("free it? It can't be undone then", yes)
    click.echo(f"freed {style.size(bin.empty(path))}", err=True)


@click.command()
@click.argument("revs", metavar="REV...", type=REV, nargs=-1, required=True)
@run_option
@forms
@click.option("--now/--trash", "now", default=None, help="Free the space at once, or keep it for `undo`.")
@click.option("-n", "--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
def strip(root: str | None, revs: tuple[str, ...], style: Style, now: bool | None, dry_run: bool, yes: bool) -> None:
    """Make full checkpoints weights-only: the weights stay, what only a resume needs goes.

    The last good checkpoint and pinned or tagged ones are refused: a run must stay resumable.
    """
    path, first = place(root, revs[0])
    with held(path, dry_run):
        view = look(path)
        named = [pick(view, word) for word in (*((first,) if first else ()), *revs[1:])]
        chosen = list({record.name: record for record in named}.values())  # one by two names is stripped once
        decisions = [Decision(record, "strip", ("asked for",)) for record in chosen]
        for record in chosen:
            _may_strip(view, record)
        todo = gc.plan(view.records, decisions)
        free_now = _short(view) if now is None else now
        _show(view, decisions, todo, style, free_now=free_now, dry_run=dry_run)
        if dry_run:
            return
        confirm(f"strip {len(todo.items)} checkpoints?", yes)
        gc.execute(path, todo, undoable=None if free_now else bin.begin(path, "strip"))
        _told(todo.bytes, free_now)


def _may_strip(view: View, record: Record) -> None:
    if record.state == "weights":
        raise UsageError(f"{record.name} holds the weights alone already")
    if not record.id or record.state != "full":
        raise Refused(f"{record.name} isn't a full checkpoint of this run", hint="`lastgood adopt` takes stock ones in")
    if record.pinned:
        raise Refused(f"{record.name} is held by {', '.join(record.pinned)}", hint="`lastgood unpin` or `untag` first")
    newest = policy.latest(view.records)
    if newest is not None and newest.name == record.name:
        raise Refused(f"{record.name} is the last good checkpoint: without it the run can't be resumed")


@click.command()
@run_option
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
def undo(root: str | None, yes: bool) -> None:
    """Bring back what the last `prune` or `strip` moved to the trash; again for the one before."""
    path = run_at(root, None)
    with held(path, False):
        for line in bin.undo(path):
            click.echo(line)


def confirm(question: str, yes: bool) -> None:
    """Ask on a terminal; elsewhere --yes is needed. Raises Refused."""
    if yes:
        return
    if not sys.stdin.isatty() or os.environ.get("LASTGOOD_NO_INPUT"):
        raise Refused("nothing was done: there is nobody to ask", hint="--yes says that the plan is meant")
    if not click.confirm(question, err=True):
        raise Refused("nothing was done")


@contextlib.contextmanager
def held(root: Path, dry_run: bool) -> Iterator[None]:
    """The run's writer lock for a verb that changes checkpoints. Raises RunLocked while a training run has it."""
    if dry_run:
        yield
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
        gc.sweep(root) if (root / ".lastgood").is_dir() else None
        yield
    finally:
        lock.release()
