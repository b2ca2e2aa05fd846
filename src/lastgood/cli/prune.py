"""lastgood prune: space, with the plan shown before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lastgood import units
from lastgood.cli import metric, text
from lastgood.cli.held import confirm, held
from lastgood.cli.place import run_at, run_option
from lastgood.cli.table import Style, emit, emit_json, forms
from lastgood.errors import Refused, UsageError
from lastgood.model import Record
from lastgood.policy import Decision
from lastgood.pruning import Scope, changed, husks, in_flux, occupied, plan, proven, ranks, short_of_room
from lastgood.repo import bin, gc, journal
from lastgood.store import local
from lastgood.view import View, look

SCHEMA = "lastgood.prune/1"


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
@click.option("--monitor", metavar="METRIC", multiple=True, help="What best means, METRIC:max say; again for more.")
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
    with held(path, dry_run) as door:
        if empty_trash:
            _empty(path, style, dry_run, yes)
            return
        view = look(path, outline=dry_run, sure=True)
        for name, _ in map(metric.split, rules["monitor"]):
            ranks(view, name)
        rules |= metric.named(rules["monitor"], rules["mode"])
        wanted = None if to_free is None else _size(to_free)
        if rules["within"] is not None:
            rules["within"] = _duration(rules["within"])
        decisions = plan(view, rules, to_free=wanted, scope=scope)
        seen = view
        if not dry_run and not no_verify and any(d.action != "keep" for d in decisions):
            view, decisions = proven(view, rules, decisions, _damaged, to_free=wanted, scope=scope)
        spared = [r for r in seen.records if incomplete and stock and r.state == "incomplete" and in_flux(seen.path(r))]
        todo = gc.plan([d.record for d in decisions], decisions, stock=stock)
        broken = husks(seen, stock) if incomplete else []
        for record in spared:
            if record not in broken:
                click.echo(f"{text.plain(record.name)} may be being written now: it stays", err=True)
        total = todo.bytes + sum(occupied(view.path(record)) for record in broken)
        free_now = (to_free is not None or short_of_room(view)) if now is None else now
        show_plan(view, decisions, todo, style, free_now=free_now, dry_run=dry_run, husks=broken)
        if dry_run or not (todo.items or broken):
            return
        count = len(todo.items) + len(broken)
        confirm("remove one thing?" if count == 1 else f"remove {count} things?", yes)
        if names := changed(seen):  # pins, tags and metrics need no lock
            raise Refused(
                f"{', '.join(map(text.plain, names[:5]))}: pins, tags or metrics were changed since the plan was made;"
                " nothing was removed",
                hint="run it again",
            )
        for decision in decisions:  # a Trainer syncs nothing: what stays must outlive a power cut before others go
            if decision.action == "keep" and decision.record.ours and not decision.record.id:
                manifest = decision.record.manifest
                local.sync_tree(path / decision.record.name, list(manifest.files) if manifest is not None else [])
        number = None if free_now else bin.begin(door, "prune")
        gc.execute(door, todo, undoable=number)
        for record in broken:
            _remove(door, record, number)
        told(total, free_now)


def _size(word: str) -> int:
    try:
        return units.parse_size(word)
    except ValueError:
        raise UsageError(f"--to-free {word!r} is not a size", hint="200GB, 1.5TiB, 500MiB") from None


def _duration(word: str) -> float:
    try:
        return units.parse_duration(word)
    except ValueError:
        raise UsageError(f"--keep-within {word!r} is not a time", hint="2d, 36h, 90m") from None


def _damaged(name: str, fault: str) -> None:
    click.echo(f"{text.plain(name)} is damaged ({text.plain(fault)}): it doesn't count", err=True)


def told(total: int, free_now: bool) -> None:
    said = f"freed {units.size(total)}" if free_now else f"moved {units.size(total)} to the trash"
    rest = "" if free_now else "; `lastgood undo` brings it back, `lastgood prune --empty-trash` frees the space"
    click.echo(said + rest, err=True)


def show_plan(
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


def _remove(root: Path, record: Record, number: str | None) -> None:
    if number is not None:
        bin.put(root, number, record.name)
    else:
        grave = bin.grave(root)
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
