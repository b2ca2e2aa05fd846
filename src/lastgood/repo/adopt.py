"""Give checkpoints that a Trainer wrote without lastgood manifests of this run; no file of theirs changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lastgood.format import manifest as codec
from lastgood.model import FORMAT, Head, Manifest, Record, Span, extend, lineage_in_force, next_seq, on_lineage
from lastgood.repo import journal, metrics
from lastgood.repo.layout import new_id
from lastgood.repo.read import identify, records
from lastgood.repo.run import forget_head, raise_format, read_head, read_run, start_run, write_head
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


class _Place(msgspec.Struct, frozen=True):
    """Where in the run a checkpoint comes: what of its manifest doesn't lie in its files."""

    id: str
    seq: int
    lineage: tuple[Span, ...]
    parent: str | None


def adopt(root: Path, chains: Sequence[Chain], *, progress: Callable[[int], None] | None = None) -> list[Manifest]:
    """Write their manifests. A chain that continues where the run is moves it on; the others are branches beside it.

    Where the run isn't anywhere yet, the last chain becomes the current branch. Raises OSError; what was adopted until
    then stays adopted, and calling again goes on with the rest.
    """
    run = read_run(root, sure=True) or start_run(root, identify(root, sure=True))
    before, head = records(root, sure=True), read_head(root, run, sure=True)
    way = lineage_in_force(before, head)
    seq = next_seq(before, head)
    newest = max((record.seq for record in before if record.ours and on_lineage(record.seq, way)), default=0)
    start, placed = newest, []
    for chain in chains:
        after = chain.after.manifest if chain.after is not None else None
        lineage, parent = ((), None) if after is None else (after.lineage, after.id)
        moves_on = start == 0 or (after is not None and after.seq == newest)
        for item in sorted(chain.items, key=lambda item: item.step):
            place = _Place(new_id(), seq, extend(lineage, seq), parent)
            placed.append((item, place))
            lineage, parent, seq = place.lineage, place.id, seq + 1
        if moves_on and chain.items:
            way, newest = lineage, seq - 1
    if placed:
        raise_format(root)
        # Before the first manifest: wherever this is cut short, the run stands where it will stand in the end.
        write_head(root, Head(run=run, lineage=way, next=seq))
    made = [_adopt(root, run, item, place, progress) for item, place in placed]
    if made and made[-1].lineage == way:
        forget_head(root)  # the newest says the same
    return made


def _adopt(root: Path, run: str, item: Candidate, place: _Place, progress: Callable[[int], None] | None) -> Manifest:
    manifest = _manifest(run, item, place, progress)
    if item.metrics:
        metrics.record(root, manifest.id, item.step, item.metrics)
    # A Trainer syncs nothing, and what has a manifest may let older ones go: it must outlive a power cut.
    local.sync_tree(item.path, item.files)
    local.replace(item.path / codec.NAME, codec.encode(manifest))
    journal.append(root, "adopted", step=item.step, id=manifest.id, bytes=manifest.size)
    return manifest


def _manifest(
    run: str,
    item: Candidate,
    place: _Place,
    progress: Callable[[int], None] | None,
) -> Manifest:
    files = {}
    for name in item.files:
        files[name] = local.digest(item.path / name)
        if progress is not None:
            progress(files[name].size)
    return Manifest(
        format=FORMAT,
        id=place.id,
        run=run,
        step=item.step,
        seq=place.seq,
        lineage=place.lineage,
        parent=place.parent,
        created=item.created,
        parts={part: tuple(names) for part, names in item.parts.items()},
        files=files,
        arguments=dict(item.arguments),
        facts={} if item.loss is None else {"loss": item.loss},
        layout=item.layout,
    )
