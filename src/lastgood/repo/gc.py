"""Deletion: planned from decisions, shown, then executed, never on anything that isn't provably ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from lastgood.format import manifest as codec
from lastgood.model import Manifest, Record
from lastgood.policy import Decision
from lastgood.repo import journal
from lastgood.repo.layout import hidden, new_id
from lastgood.repo.read import records
from lastgood.store import local

RESUME_ONLY = frozenset({"optimizer.safetensors", "resume.json"})
"""Files that only a full checkpoint has: what an interrupted strip may leave behind."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to do. bytes: what it frees."""

    record: Record
    action: Literal["delete", "strip"]
    reasons: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    items: tuple[Item, ...] = ()

    @property
    def bytes(self) -> int:
        """Freed by all of it."""
        return sum(item.bytes for item in self.items)


def plan(found: Sequence[Record], decisions: Sequence[Decision]) -> Plan:
    """What the decisions mean on disk. Raises ValueError for a decision against a record that must stay."""
    known = {record.name for record in found}
    items = []
    for decision in decisions:
        record = decision.record
        if decision.action == "keep":
            continue
        if not record.ours or record.pinned or record.name not in known or record.manifest is None:
            raise ValueError(f"refusing to {decision.action} {record.name}: it is pinned or not of this run")
        freed = record.size if decision.action == "delete" else record.size - _stripped(record.manifest).size
        items.append(Item(record, decision.action, decision.reasons, freed))
    return Plan(tuple(items))


def execute(root: Path, todo: Plan) -> None:
    """Carry it out. Raises OSError; what was done until then is complete, the rest is untouched."""
    for item in todo.items:
        if item.action == "delete":
            _delete(root, item)
        else:
            _strip(root, item)


def _delete(root: Path, item: Item) -> None:
    trash = hidden(root, "trash")
    local.make_dirs(trash)
    grave = trash / new_id()
    # The rename makes it vanish as a whole: half a checkpoint is never seen under its name.
    local.vanish(root / item.record.name, grave)
    journal.append(root, "deleted", step=item.record.step, id=item.record.id, bytes=item.bytes, reasons=item.reasons)
    local.remove_tree(grave)


def _strip(root: Path, item: Item) -> None:
    manifest = item.record.manifest
    assert manifest is not None
    directory, light = root / item.record.name, _stripped(manifest)
    # The manifest first: from here on it is a weights-only checkpoint, whatever files are still beside it.
    local.replace(directory / codec.NAME, codec.encode(light))
    for name in manifest.files.keys() - light.files.keys():
        local.unlink(directory / name)
    local.sync_dir(directory)
    journal.append(root, "stripped", step=item.record.step, id=item.record.id, bytes=item.bytes, reasons=item.reasons)


def _stripped(manifest: Manifest) -> Manifest:
    names = manifest.parts.get("model", ())
    files = {name: entry for name, entry in manifest.files.items() if name in names}
    return msgspec.structs.replace(manifest, parts={"model": names}, files=files)


def sweep(root: Path) -> None:
    """Remove what interrupted saves, deletions and strips left. Only the holder of the run's lock may call it."""
    for place in ("tmp", "trash"):
        for name in local.names(hidden(root, place)):
            path = hidden(root, place, name)
            if path.is_dir() and not path.is_symlink():
                local.remove_tree(path)
            else:
                local.unlink(path)
    for record in records(root):
        if record.state == "weights" and record.manifest is not None:
            for name in RESUME_ONLY - record.manifest.files.keys():
                local.unlink(root / record.name / name)
