"""import and export: checkpoints from and for Lightning, Accelerate and torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from lastgood import units
from lastgood.cli import text
from lastgood.cli.checkout import need_torch
from lastgood.cli.held import confirm, held
from lastgood.cli.place import REV, new_place, pick, place, run_option
from lastgood.convert.take import fits, sources, take, trained
from lastgood.errors import CorruptCheckpoint, UsageError
from lastgood.layouts import scan
from lastgood.store import local
from lastgood.view import look

TOOLS = ("lightning", "accelerate", "dcp")


@click.command("import")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="The step it belongs to, where nothing in it says.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask before several are brought in.")
def import_(source: Path, run: Path, step: int | None, yes: bool) -> None:
    """Bring a checkpoint of Lightning, Accelerate or torch.distributed, or all of a directory, into a run.

    RUN is made if it isn't there. Weights, optimizer, scheduler and random states are copied into files without
    pickle; the source stays as it is. Everything in it is loaded with torch's weights_only, or not at all. Needs torch.
    """
    need_torch("import")
    found = sources(source)
    if step is not None and len(found) > 1:
        raise UsageError(f"--step belongs to one checkpoint, {source} holds {len(found)}")
    for item in found:
        faults = scan.problems(item.path, item.layout, full=True)
        if faults:
            raise CorruptCheckpoint(f"{item.path} is damaged: {'; '.join(faults[:3])}", hint="import another one")
        click.echo(f"IMPORT  {text.plain(item.path.name)}  {item.layout}, {units.size(item.size)}")
    if len(found) > 1:
        confirm(f"bring {len(found)} checkpoints into {text.plain(str(run))}?", yes)
    local.make_dirs(run)
    fits(run)
    with held(run, False):
        record = None
        for item in found:
            record = take(item, run, step=step, after=record)
            click.echo(
                f"{text.plain(item.path.name)} -> {record.name} ({record.state}, {units.size(record.size)})", err=True
            )
        goes_on = trained(run)
        if record is not None and goes_on is not None:
            click.echo(
                f"they lie beside the run, which goes on from {goes_on.name}: name one to resume from it", err=True
            )


@click.command()
@click.argument("rev", type=REV)
@click.argument("target", type=click.Path(path_type=Path))
@run_option
@click.option("--to", "tool", type=click.Choice(TOOLS), required=True, help="Whose checkpoint it becomes.")
@click.option("--prefix", default="", help="lightning: put before every name of the model, for instance `model.`.")
def export(root: str | None, rev: str, target: Path, tool: str, prefix: str) -> None:
    """Write a checkpoint in the form of another tool: a .ckpt file, or a directory for Accelerate or DCP.

    Works for managed, imported and stock Trainer checkpoints, FSDP's sharded ones among them. What the other tool has
    no place for is named. Needs torch.
    """
    need_torch("export")
    from lastgood.convert.read import read
    from lastgood.convert.write import to_accelerate, to_dcp, to_lightning

    path, word = place(root, rev)
    view = look(path)
    record = pick(view, word or "latest")
    new_place(target, path)
    if prefix and tool != "lightning":
        raise UsageError("--prefix is for lightning")
    for fault in view.problems(record, full=True):
        raise CorruptCheckpoint(f"{record.name} is damaged: {fault}", hint="export another one")
    content = read(view.path(record), record.layout, record.manifest)
    if tool == "lightning":
        notes = to_lightning(content, target, prefix)
    else:
        notes = (to_accelerate if tool == "accelerate" else to_dcp)(content, target)
    for note in notes:
        click.echo(f"not in it: {text.plain(note)}", err=True)
    click.echo(f"{text.plain(record.name)} -> {text.plain(str(target))}", err=True)
