"""Give checkpoints that a Trainer wrote without lastgood manifests of this run; no file of theirs changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lastgood.format import manifest as codec
from lastgood.model import FORMAT, Head, Manifest, Span, extend, lineage_in_force, next_seq, on_lineage
from lastgood.repo import journal, metrics
from lastgood.repo.layout import hidden, new_id
from lastgood.repo.read import records
from lastgood.repo.run import read_head, read_run, start_run, write_head
from lastgood.store import local

PLAN = "adopting.json"


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


class _Place(msgspec.Struct, frozen=True):
    """Where in the run a checkpoint comes: what of its manifest doesn't lie in its files."""

    id: str
    seq: int
    lineage: tuple[Span, ...]
    parent: str | None


class _Plan(msgspec.Struct, frozen=True):
    """`adopting.json`, while an adoption goes on: name -> place. next: the first number that it leaves free."""

    run: str = ""
    next: int = 1
    places: dict[str, _Place] = {}


def adopt(
    root: Path, chains: Sequence[Sequence[Candidate]], *, progress: Callable[[int], None] | None = None
) -> list[Manifest]:
    """Write their manifests, each chain a branch of its own, the last one the current branch.

    In a run that has checkpoints of its own these stay current. Raises OSError; what was adopted until then stays
    adopted, and calling again goes on with the rest, in the places that the first call gave them.
    """
    run = read_run(root) or start_run(root)
    before, head, old = records(root), read_head(root, run), _unfinished(root, run)
    own = [record for record in before if record.ours and record.id not in {place.id for place in old.places.values()}]
    if any(record.seq >= place.seq for record in own for place in old.places.values()):
        # The run went on in the meantime: what is left of the plan comes too late to be part of its way.
        own, old = [record for record in before if record.ours], _Plan()
    places, seq, ends = dict(old.places), max(next_seq(before, head), old.next), []
    for chain in chains:
        lineage: tuple[Span, ...] = ()
        parent = None
        for item in sorted(chain, key=lambda item: item.step):
            if item.path.name not in places:
                places[item.path.name] = _Place(new_id(), seq, extend(lineage, seq), parent)
                seq += 1
            lineage, parent = places[item.path.name].lineage, places[item.path.name].id
        ends.append(lineage)
    if not places:
        return []
    way = lineage_in_force(own if own else before, head)
    if not own and ends and (not old.places or not way or on_lineage(way[-1][1], ends[-1])):
        way = ends[-1]
    # Before the first manifest: wherever this is cut short, the run stands where it will stand in the end.
    local.replace(hidden(root, PLAN), msgspec.json.encode(_Plan(run, seq, places)))
    write_head(root, Head(run=run, lineage=way, next=seq))
    made = [
        _adopt(root, run, item, places[item.path.name], progress)
        for chain in reversed(chains)
        for item in sorted(chain, key=lambda item: item.step)
    ]
    local.unlink(hidden(root, PLAN))
    return sorted(made, key=lambda manifest: manifest.seq)


def _unfinished(root: Path, run: str) -> _Plan:
    """The plan of an adoption that was cut short."""
    try:
        plan = msgspec.json.decode(local.read(hidden(root, PLAN), 64 << 20), type=_Plan)
    except (OSError, msgspec.MsgspecError):
        return _Plan()
    return plan if plan.run == run else _Plan()


def _adopt(root: Path, run: str, item: Candidate, place: _Place, progress: Callable[[int], None] | None) -> Manifest:
    manifest = _manifest(run, item, place, progress)
    if item.metrics:
        metrics.record(root, manifest.id, item.step, item.metrics)
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
