"""Give checkpoints that a Trainer wrote without lastgood manifests of this run; no file of theirs changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lastgood.format import manifest as codec
from lastgood.model import FORMAT, Head, Manifest, Span, extend, lineage_in_force, next_seq
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


def adopt(
    root: Path, chains: Sequence[Sequence[Candidate]], *, progress: Callable[[int], None] | None = None
) -> list[Manifest]:
    """Write their manifests, each chain a branch of its own, the last one the current branch.

    In a run that has checkpoints of its own these stay current. Raises OSError; what was adopted until then stays
    adopted, and calling again goes on with the rest.
    """
    run = read_run(root) or start_run(root)
    before = records(root)
    own = [record for record in before if record.ours]
    head = read_head(root, run)
    way: tuple[Span, ...] = lineage_in_force(own, head)
    seq, made = next_seq(before, head), []
    for chain in chains:
        lineage: tuple[Span, ...] = ()
        parent = None
        for item in sorted(chain, key=lambda item: item.step):
            lineage = extend(lineage, seq)
            manifest = _manifest(run, item, seq, lineage, parent, progress)
            if item.metrics:
                metrics.record(root, manifest.id, item.step, item.metrics)
            local.replace(item.path / codec.NAME, codec.encode(manifest))
            journal.append(root, "adopted", step=item.step, id=manifest.id, bytes=manifest.size)
            made.append(manifest)
            parent, seq = manifest.id, seq + 1
    if own and made:
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
