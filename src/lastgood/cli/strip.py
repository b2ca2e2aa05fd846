"""strip and undo: the weights stay, what only a resume needs goes; and back again."""

from __future__ import annotations

from collections.abc import Mapping

import click

from lastgood.cli.held import confirm, held
from lastgood.cli.place import REV, pick, place, run_at, run_option
from lastgood.cli.prune import show_plan, told
from lastgood.cli.table import Style, forms
from lastgood.errors import Refused, UsageError
from lastgood.model import Record
from lastgood.policy import Decision
from lastgood.pruning import last_good, short_of_room
from lastgood.repo import bin, gc
from lastgood.view import look


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
    with held(path, dry_run) as door:
        view = look(path, sure=True)
        named = [pick(view, word) for word in (*((first,) if first else ()), *revs[1:])]
        chosen = list({record.name: record for record in named}.values())  # one by two names is stripped once
        decisions = [Decision(record, "strip", ("asked for",)) for record in chosen]
        good = last_good(view, full=not dry_run)
        for record in chosen:
            _may_strip(record, good, view.protect)
        todo = gc.plan(view.records, decisions)
        free_now = short_of_room(view) if now is None else now
        show_plan(view, decisions, todo, style, free_now=free_now, dry_run=dry_run)
        if dry_run:
            return
        confirm(f"strip {len(todo.items)} checkpoints?", yes)
        gc.execute(door, todo, undoable=None if free_now else bin.begin(door, "strip"))
        told(todo.bytes, free_now)


def _may_strip(record: Record, good: Record | None, protect: Mapping[str, str]) -> None:
    if record.state == "weights":
        raise UsageError(f"{record.name} holds the weights alone already")
    if not record.id or record.state != "full":
        raise Refused(f"{record.name} isn't a full checkpoint of this run", hint="`lastgood adopt` takes stock ones in")
    if record.pinned:
        raise Refused(f"{record.name} is held by {', '.join(record.pinned)}", hint="`lastgood unpin` or `untag` first")
    if record.id in protect:
        raise Refused(f"{record.name} stays as it is: {protect[record.id]}")
    if good is None:
        raise Refused("no full checkpoint is good: nothing is stripped", hint="`lastgood verify --full` says why")
    if good.name == record.name:
        raise Refused(f"{record.name} is the last good checkpoint: without it the run can't be resumed")


@click.command()
@run_option
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
def undo(root: str | None, yes: bool) -> None:
    """Bring back what the last `prune` or `strip` moved to the trash; again for the one before."""
    path = run_at(root, None)
    with held(path, False) as door:
        for line in bin.undo(door):
            click.echo(line)
