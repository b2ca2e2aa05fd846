"""import and export: checkpoints from and for Lightning, Accelerate and torch.distributed.checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import click

from lastgood import policy, units
from lastgood.cli import text
from lastgood.cli.checkout import need_torch
from lastgood.cli.held import confirm, held
from lastgood.cli.place import REV, new_place, pick, place, run_option
from lastgood.errors import CorruptCheckpoint, NoCheckpoint, Refused, UsageError
from lastgood.layouts import scan
from lastgood.layouts.found import Found
from lastgood.model import TRAINERS, Head, Record, extend, lineage_in_force, next_seq
from lastgood.repo import journal, metrics
from lastgood.repo.commit import commit
from lastgood.repo.read import identify, records
from lastgood.repo.run import read_head, read_run, start_run, write_head
from lastgood.repo.staging import open_staging
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
    found = _sources(source)
    if step is not None and len(found) > 1:
        raise UsageError(f"--step belongs to one checkpoint, {source} holds {len(found)}")
    for item in found:
        faults = scan.problems(item.path, item.layout, full=True)
        if faults:
            raise CorruptCheckpoint(f"{item.path} is damaged: {'; '.join(faults[:3])}", hint="import another one")
        click.echo(f"IMPORT  {text.plain(item.path.name)}  {item.layout}, {units.size(item.size)}")
    if len(found) > 1:
        confirm(f"bring {len(found)} checkpoints into {text.plain(str(run))}?", yes)
    run.mkdir(parents=True, exist_ok=True)
    stock = [r.name for r in look(run).records if r.layout in TRAINERS and not r.id]
    if stock:
        raise Refused(
            f"{run} holds checkpoints of a stock Trainer ({', '.join(stock[:3])}), which a resume would pass over for"
            " the imported ones; nothing was imported",
            hint="`lastgood adopt` takes them in first, or import into a directory of its own",
        )
    with held(run, False):
        record = None
        for item in found:
            record = _bring(item, run, step, record)
            click.echo(
                f"{text.plain(item.path.name)} -> {record.name} ({record.state}, {units.size(record.size)})", err=True
            )
        goes_on = policy.latest(records(run))
        if record is not None and goes_on is not None and not _imported(goes_on):
            click.echo(
                f"they lie beside the run, which goes on from {goes_on.name}: name one to resume from it", err=True
            )


def _sources(source: Path) -> list[Found]:
    if source.is_file() or scan.recognised(source):
        return [scan.look(source)]
    found = scan.scan(source)
    # last.ckpt is a second copy of one that has a name of its own.
    named = [item for item in found if item.path.name != "last.ckpt"]
    kept = named + [item for item in found if item not in named and all(item.step != other.step for other in named)]
    if not kept:
        raise NoCheckpoint(
            f"{source} holds no checkpoint of Lightning, Accelerate or torch.distributed",
            hint="a Trainer's checkpoints stay where they are: `lastgood adopt`",
        )
    return kept


def _imported(record: Record) -> bool:
    return record.manifest is not None and "imported" in record.manifest.facts


def _bring(item: Found, run: Path, step: int | None, last: Record | None) -> Record:
    """last: the one that was brought in before."""
    from lastgood.convert.bring import stage
    from lastgood.convert.read import read

    content = read(item.path, item.layout, None)
    wanted = step if step is not None else content.step
    if wanted < 0:
        raise UsageError(f"nothing in {item.path.name} says which step it belongs to", hint="--step N")
    content.step = wanted
    identity = read_run(run) or start_run(run, identify(run))
    there = records(run)
    head = read_head(run, identity)
    seq, lineage = next_seq(there, head), lineage_in_force(there, head)
    newest = max((r for r in there if r.ours and r.current), key=lambda r: r.seq, default=None)
    if newest is not None and not _imported(newest):
        # Beside a run that has trained here: as its newest, a resume would take it and `prune` delete what was trained.
        write_head(run, Head(run=identity, lineage=lineage, next=seq + 1))
        newest = last
        lineage = last.manifest.lineage if last is not None and last.manifest is not None else ()
    staging = open_staging(run)
    try:
        stage(content, staging)
        record = commit(
            run,
            staging,
            run=identity,
            step=wanted,
            seq=seq,
            lineage=extend(lineage, seq),
            parent=newest.id if newest is not None else None,
            created=item.created or time.time(),
            environment={},
            arguments={},
            facts={"imported": {"layout": item.layout, "name": item.path.name}},
        )
    except BaseException:
        staging.discard()
        raise
    if item.metrics:
        metrics.record(run, record.id, wanted, item.metrics)
    journal.append(run, "saved", step=wanted, id=record.id, bytes=record.size, imported=item.path.name)
    return record


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
