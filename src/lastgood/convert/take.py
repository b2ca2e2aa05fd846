"""Take another tool's checkpoint into a run: read, staged and committed, in its place among those that are there."""

from __future__ import annotations

import time
from pathlib import Path

from lastgood import policy
from lastgood.errors import NoCheckpoint, Refused, UsageError
from lastgood.layouts import scan
from lastgood.layouts.found import Found
from lastgood.model import TRAINERS, Head, Record, extend, lineage_in_force, next_seq
from lastgood.repo import journal, metrics
from lastgood.repo.commit import commit
from lastgood.repo.read import identify, records
from lastgood.repo.run import read_head, read_run, start_run, write_head
from lastgood.repo.staging import open_staging
from lastgood.view import look


def sources(source: Path) -> list[Found]:
    """The checkpoint at a path, or all in a directory, each once. Raises NoCheckpoint."""
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


def fits(run: Path) -> None:
    """Raises Refused for a directory in which what is taken in would hide what is there."""
    stock = [r.name for r in look(run).records if r.layout in TRAINERS and not r.id]
    if stock:
        raise Refused(
            f"{run} holds checkpoints of a stock Trainer ({', '.join(stock[:3])}), which a resume would pass over for"
            " the imported ones; nothing was imported",
            hint="`lastgood adopt` takes them in first, or import into a directory of its own",
        )


def take(item: Found, run: Path, *, step: int | None, after: Record | None) -> Record:
    """Commit it as a checkpoint of the run, which begins here if there is none yet.

    step: the one that it belongs to, where nothing in it says. after: the one that was taken in before it. Raises
    UsageError without a step, and what reading and saving raise; every checkpoint
    of the run is then as it was.
    """
    # torch comes with these two: a wrong source is told before anybody waits for it.
    from lastgood.convert.bring import stage
    from lastgood.convert.read import read

    content = read(item.path, item.layout, None)
    wanted = step if step is not None else content.step
    if wanted < 0:
        raise UsageError(f"nothing in {item.path.name} says which step it belongs to", hint="--step N")
    content.step = wanted
    identity = read_run(run, sure=True) or start_run(run, identify(run, sure=True))
    there = records(run, sure=True)
    head = read_head(run, identity, sure=True)
    seq, lineage = next_seq(there, head), lineage_in_force(there, head)
    newest = max((r for r in there if r.ours and r.current), key=lambda r: r.seq, default=None)
    if newest is not None and not _taken(newest):
        # Beside a run that has trained here: as its newest, a resume would take it and `prune` delete what was trained.
        write_head(run, Head(run=identity, lineage=lineage, next=seq + 1))
        newest = after
        lineage = after.manifest.lineage if after is not None and after.manifest is not None else ()
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


def trained(run: Path) -> Record | None:
    """The checkpoint that the run goes on from, if it was trained here: what was taken in lies beside it."""
    newest = policy.latest(records(run))
    return None if newest is None or _taken(newest) else newest


def _taken(record: Record) -> bool:
    return record.manifest is not None and "imported" in record.manifest.facts
