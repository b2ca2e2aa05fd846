"""Give checkpoints that a Trainer wrote without lastgood manifests of this run; no file of theirs changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lastgood.format import manifest as codec
from lastgood.model import FORMAT, Head, Manifest, Record, Span, extend, lineage_in_force, next_seq, on_lineage
from lastgood.repo import journal, metrics
from lastgood.repo.layout import new_id
from lastgood.repo.read import records
from lastgood.repo.run import read_head, read_run, start_run, write_head
from lastgood.store import local


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One checkpoint to adopt. files: relative names; parts: part -> some of them."""

    path: Path
    step: int
    layout: str
    parts: Mapping[str, tuple[str, ...]]
    files: Sequence[str]
    created: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    arguments: Mapping[str, object] = field(default_factory=dict)
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """Checkpoints of one run, oldest first. after: the checkpoint with a manifest that they continue, if any."""

    items: Sequence[Candidate]
    after: Record | None = None


def adopt(root: Path, chains: Sequence[Chain], *, progress: Callable[[int], None] | None = None) -> list[Manifest]:
    """Write their manifests. A chain that continues where the run is moves it on; the others are branches beside it.

    In a run without checkpoints of its own the last chain becomes the current branch. Raises OSError; what was
    adopted until then stays adopted, and calling again goes on with the rest.
    """
    run = read_run(root) or start_run(root)
    before = records(root)
    own = [record for record in before if record.ours]
    head = read_head(root, run)
    way: tuple[Span, ...] = lineage_in_force(own, head)
    seq, made = next_seq(before, head), []
    newest = max((record.seq for record in own if on_lineage(record.seq, way)), default=0)
    for chain in chains:
        after = chain.after.manifest if chain.after is not None else None
        lineage, parent = ((), None) if after is None else (after.lineage, after.id)
        moves_on = after is not None and after.seq == newest
        for item in sorted(chain.items, key=lambda item: item.step):
            lineage = extend(lineage, seq)
            manifest = _manifest(run, item, seq, lineage, parent, progress)
            if item.metrics:
                metrics.record(root, manifest.id, item.step, item.metrics)
            local.replace(item.path / codec.NAME, codec.encode(manifest))
            journal.append(root, "adopted", step=item.step, id=manifest.id, bytes=manifest.size)
            made.append(manifest)
            parent, seq = manifest.id, seq + 1
        if moves_on and chain.items:
            way, newest = lineage, seq - 1
    if own and made and made[-1].lineage != way:
        write_head(root, Head(run=run, lineage=way, next=seq))
    return made


def _manifest(
    run: str,
    item: Candidate,
    seq: int,
    lineage: tuple[Span, ...],
    parent: str | None,
    progress: Callable[[int], None] | None,
) -> Manifest:
    files = {}
    for name in item.files:
        files[name] = local.digest(item.path / name)
        if progress is not None:
            progress(files[name].size)
    return Manifest(
        format=FORMAT,
        id=new_id(),
        run=run,
        step=item.step,
        seq=seq,
        lineage=lineage,
        parent=parent,
        created=item.created,
        parts={part: tuple(names) for part, names in item.parts.items()},
        files=files,
        arguments=dict(item.arguments),
        facts={} if item.loss is None else {"loss": item.loss},
        layout=item.layout,
    )
