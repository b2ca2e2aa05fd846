"""Deletion: planned from decisions, shown, then executed, never on anything that isn't provably ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lastgood.errors import RunLocked
from lastgood.format import guard
from lastgood.format import manifest as codec
from lastgood.model import Head, Manifest, Record, lineage_in_force, next_seq, stripped
from lastgood.policy import Decision
from lastgood.repo import after, bin, journal, leases, pins, poison, reserve
from lastgood.repo.bin import GRAVE, grave
from lastgood.repo.layout import hidden
from lastgood.repo.read import held_by, identify, records
from lastgood.repo.run import read_head, write_head
from lastgood.store import local
from lastgood.store.dissolve import STEP

RESUME_ONLY = frozenset({"optimizer.safetensors", "resume.json"})
"""Files that only a full checkpoint has: what an interrupted strip may leave behind."""
OWN = ("run.json", "head.json", "policy.json", "trail.jsonl", "lock.json")
"""What only the holder of the run's lock replaces: a temporary file of theirs is nobody's any more."""


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


def plan(found: Sequence[Record], decisions: Sequence[Decision], *, stock: bool = False) -> Plan:
    """What the decisions mean on disk. Raises ValueError for a decision against a record that must stay.

    stock: checkpoints that were written without lastgood may be deleted too; never done unasked.
    """
    known = {record.name for record in found}
    items = []
    for decision in decisions:
        record = decision.record
        if decision.action == "keep":
            continue
        theirs = not record.id and (not stock or decision.action == "strip")
        if not record.ours or record.pinned or theirs or record.name not in known or record.manifest is None:
            raise ValueError(f"refusing to {decision.action} {record.name}: it is pinned or not of this run")
        items.append(Item(record, decision.action, decision.reasons, gain(decision)))
    # Deletions first: on a full disk they make the room that a strip's new manifest needs.
    return Plan(tuple(sorted(items, key=lambda item: item.action != "delete")))


def gain(decision: Decision) -> int:
    """Bytes that a decision frees."""
    record = decision.record
    if decision.action == "keep" or record.manifest is None:
        return 0
    return record.size if decision.action == "delete" else record.size - stripped(record.manifest).size


def execute(
    root: Path,
    todo: Plan,
    *,
    undoable: str | None = None,
    sightings: leases.Sightings | None = None,
    graves: list[Path] | None = None,
) -> None:
    """Carry it out. Raises OSError; what was done until then is complete, the rest is untouched.

    undoable: the number of an operation of `bin.begin`, to put things there instead of freeing their space.
    sightings: of leases, by a process that goes on. graves: takes the directories of what is large and out of sight,
    which the caller removes when there is time for it (`store.dissolve`); what it doesn't the next `sweep` does.
    """
    if undoable is not None and any(item.action == "delete" for item in todo.items):
        _reserve_numbers(root, todo)
    patience = 10.0
    for item in todo.items:
        with leases.alone(root, patience) as had:
            patience = patience if had else 0.1  # somebody was stopped while holding it: waited for once, not each time
            why = _held_now(root, item.record.id, sightings)
            if why:  # by somebody else since the plan was made: that needs no lock of the run
                journal.append(root, "spared", step=item.record.step, id=item.record.id, reasons=[why])
            elif item.action == "delete":
                _delete(root, item, undoable, graves)
            else:
                _strip(root, item, undoable, graves)


def _held_now(root: Path, id: str, sightings: leases.Sightings | None) -> str:
    if held_by(root).get(id):
        return "pinned meanwhile"
    return leases.in_force(root, sightings).get(id, "")


def _reserve_numbers(root: Path, todo: Plan) -> None:
    """No save may get the number of one that `undo` can bring back: two with the same one are on each other's way."""
    found, run = records(root, sure=True), identify(root, sure=True)
    head = read_head(root, run, sure=True)
    number = next_seq(found, head)
    gone = {item.record.name for item in todo.items if item.action == "delete"}
    if run is not None and next_seq([record for record in found if record.name not in gone], head) < number:
        write_head(root, Head(run=run, lineage=lineage_in_force(found, head), next=number))


def _delete(root: Path, item: Item, undoable: str | None, graves: list[Path] | None) -> None:
    name, facts = item.record.name, {"step": item.record.step, "id": item.record.id}
    if undoable is not None:
        bin.put(root, undoable, name)
        journal.append(root, "deleted", **facts, bytes=item.bytes, reasons=item.reasons, undo=undoable)
        return
    hole = grave(root)
    # The rename makes it vanish as a whole: half a checkpoint is never seen under its name.
    reserve.spend(root, lambda: local.vanish(root / name, hole))
    journal.append(root, "deleted", **facts, bytes=item.bytes, reasons=item.reasons)
    if graves is not None and item.bytes > STEP:
        graves.append(hole)
    else:
        local.remove_tree(hole)
    after.remove(root, item.record.id)


def _strip(root: Path, item: Item, undoable: str | None, graves: list[Path] | None) -> None:
    manifest = item.record.manifest
    assert manifest is not None
    directory, light = root / item.record.name, stripped(manifest)
    gone = sorted(manifest.files.keys() - light.files.keys())
    if undoable is not None:
        bin.put_manifest(root, undoable, item.record.name)
    # The manifest first: from here on it is a weights-only checkpoint, whatever files are still beside it.
    reserve.spend(root, lambda: local.replace(directory / codec.NAME, codec.encode(light)))
    for name in gone:
        if undoable is not None:
            bin.put(root, undoable, f"{item.record.name}/{name}")
        elif graves is not None and manifest.files[name].size > STEP:
            _bury(root, directory / name, graves)
        else:
            local.unlink(directory / name)
    reserve.spend(root, lambda: _guard(directory, light))
    local.sync_dir(directory)
    facts = {"step": item.record.step, "id": item.record.id, "bytes": item.bytes, "reasons": item.reasons}
    journal.append(root, "stripped", **facts, **({} if undoable is None else {"undo": undoable}))


def _bury(root: Path, path: Path, graves: list[Path]) -> None:
    """A large file out of a checkpoint: by a move, which takes no time."""
    hole = grave(root)
    reserve.spend(root, lambda: local.make_dir(hole, fresh=True))
    local.vanish(path, hole / path.name)
    graves.append(hole)


def _guard(directory: Path, light: Manifest) -> None:
    """A stock Trainer that finds no optimizer.pt trains on with a fresh one: let it fail loudly instead."""
    if light.layout:
        for name in guard.NAMES:
            if name not in light.files and local.size(directory / name) != len(guard.content(name)):
                local.replace(directory / name, guard.content(name))


def _clear(root: Path, place: str, name: str) -> None:
    """Out of the way first: who was fenced off may be writing there, or removing it, this very moment."""
    at = hidden(root, place, name)
    with suppress(FileNotFoundError):
        if place == "tmp":
            hole = grave(root)
            local.vanish(at, hole)
            at = hole
        local.remove(at)


def sweep(root: Path, sightings: leases.Sightings | None = None) -> None:
    """Remove what interrupted saves, deletions and strips left. Only the holder of the run's lock may call it.

    sightings: of leases, by a process that goes on.
    """
    if hidden(root).is_symlink():
        return
    for place in ("tmp", "trash"):
        if not hidden(root, place).is_symlink():  # what is behind a link isn't ours to delete
            for name in local.names(hidden(root, place)):
                _clear(root, place, name)
    for name in local.names(root):
        if name.startswith(GRAVE):
            local.remove(root / name)
    for name in local.names(hidden(root)):
        if local.torn(name, OWN):
            local.unlink(hidden(root, name))
    _sweep_names(root)
    leases.sweep(root, sightings)
    held_back = bin.held_back(root)
    for record in records(root):
        for name in local.names(root / record.name):
            if local.torn(name, (codec.NAME, *guard.NAMES) if record.ours else (codec.NAME,)):
                local.unlink(root / record.name / name)
        if record.state == "weights" and record.manifest is not None:
            if record.id in held_back:
                try:
                    bin.rescue(root / record.name, record.manifest, held_back[record.id])
                except OSError:
                    continue  # no room: as it is, it harms nobody, and the next sweep tries again
            for name in RESUME_ONLY - record.manifest.files.keys():
                local.unlink(root / record.name / name)
            _guard(root / record.name, record.manifest)


def _sweep_names(root: Path) -> None:
    """What is said of checkpoints is written without the run's lock, under one of its own."""
    told = (pins.NAME, pins.NOTES, poison.NAME)
    if any(local.torn(name, told) for name in local.names(hidden(root))):
        with suppress(RunLocked), pins.alone(root):
            for name in local.names(hidden(root)):
                if local.torn(name, told):
                    local.unlink(hidden(root, name))
