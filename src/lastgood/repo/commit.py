"""The commit: manifest last, everything durable, then one rename. Before it there is nothing, after it all of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lastgood.errors import Conflict
from lastgood.format import manifest as codec
from lastgood.model import FORMAT, Manifest, Record, Span, State, checkpoint_name, on_lineage
from lastgood.repo import journal, leases, poison, reserve
from lastgood.repo.layout import plain
from lastgood.repo.read import id_at, records
from lastgood.repo.run import raise_format
from lastgood.repo.staging import Staging, explained
from lastgood.store import local


def commit(
    root: Path,
    staging: Staging,
    *,
    run: str,
    step: int,
    seq: int,
    lineage: tuple[Span, ...],
    parent: str | None,
    created: float,
    environment: Mapping[str, str],
    arguments: Mapping[str, object],
    facts: Mapping[str, object],
) -> Record:
    """Publish what was staged as a checkpoint. Raises SaveFailed (nothing was published) or Conflict."""
    staging.flush()
    manifest = Manifest(
        format=FORMAT,
        id=staging.id,
        run=run,
        step=step,
        seq=seq,
        lineage=lineage,
        parent=parent,
        created=created,
        parts={part: tuple(names) for part, names in staging.parts.items()},
        files={name: staging.files[name] for names in staging.parts.values() for name in names},
        environment=dict(environment),
        arguments=dict(arguments),
        facts=dict(facts),
    )
    content = codec.encode(manifest)
    with explained(staging.directory):
        raise_format(root)
        # All that is large is there: for want of a block for the record it must not have been for nothing.
        reserve.spend(root, lambda: local.write(staging.directory / codec.NAME, [content], sync=False))
    started = time.perf_counter()
    staging.sync()
    with explained(staging.directory):
        name = _make_room(root, manifest)
        _publish(staging.directory, root / name)
    if local.read(root / name / codec.NAME, codec.LIMIT) != content:
        raise Conflict(
            f"{plain(root) / name} was written by somebody else at the same moment", hint="run one writer at a time"
        )
    staging.seconds["sync"] = time.perf_counter() - started
    state: State = "full" if manifest.full else "weights"
    return Record(name=name, step=step, state=state, manifest=manifest, poisoned=poison.reason(manifest, {}))


def _publish(source: Path, target: Path) -> None:
    try:
        local.rename(source, target)
    except OSError:
        # The rename may have happened and its fsync failed. A save that reports a failure must not
        # leave a checkpoint behind that might vanish with the next power cut. But only ours: where the rename
        # failed, the one with that name is of another writer.
        if not source.exists() and id_at(target) == source.name:
            with suppress(OSError):
                local.rename(target, source)
        raise


def _make_room(root: Path, manifest: Manifest) -> str:
    """The name to publish under. A checkpoint of our own that has it moves aside; anything else keeps it."""
    name = checkpoint_name(manifest.step)
    if name not in local.names(root):
        return name
    taken = next((record for record in records(root) if record.name == name), None)
    # Nor does one that is being evaluated: whoever reads it would go on with the files of the other one.
    if taken is None or not taken.ours or taken.id in leases.in_force(root):
        return checkpoint_name(manifest.step, manifest.id)
    aside = checkpoint_name(manifest.step, taken.id)
    local.rename(root / name, root / aside)
    left = not on_lineage(taken.seq, manifest.lineage)
    reason = "of a branch that was left" if left else "saved again at the same step"
    journal.append(root, "displaced", step=taken.step, id=taken.id, to=aside, reason=reason)
    return name
