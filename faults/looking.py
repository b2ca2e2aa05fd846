"""What is in a run directory, seen from outside, and whether the model agrees."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lastgood.errors import NoCheckpoint
from lastgood.format import manifest as codec
from lastgood.manager import Manager
from lastgood.model import Record, on_lineage
from lastgood.policy import Keep
from lastgood.repo import bin, leases
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import id_at, records
from lastgood.repo.run import read_run
from lastgood.run import open as open_run

from faults.model import Kept, Model

T = TypeVar("T")
Snapshot = dict[str, tuple[int, int, bytes | str | None]]


def snapshot(root: Path) -> Snapshot:
    """Relative name -> mode, time and content of all there is."""
    found: Snapshot = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found[os.path.relpath(path, root)] = (status.st_mode, status.st_mtime_ns, _content(path, status.st_mode))
    return found


def _content(path: str, mode: int) -> bytes | str | None:
    if stat.S_ISLNK(mode):
        return os.readlink(path)
    if not stat.S_ISREG(mode):
        return None
    with open(path, "rb") as file:
        return file.read()


def compare(root: Path, before: Model, after: Model, *, exact: bool, ways: Iterable[frozenset[str]] = ()) -> Model:
    """The model of what is there; AssertionError where that can't be.

    exact: as `after` has it; else each thing as it was before or is after. ways: where it may stand in between.
    """
    found = {record.id: record for record in records(root) if record.id}
    run = read_run(root) or ""
    assert run == before.run or after.run not in (before.run, ""), "the run has another identity"
    assert exact is False or (run == before.run) is (after.run == before.run), "the run has no identity of its own"
    after = after.copy()
    if after.run != before.run:
        after.there = {id: k if k.run != after.run else replace(k, run=run) for id, k in after.there.items()}
        after.run = run
    for record in sorted(found.values(), key=lambda r: r.seq):
        if record.id not in before.there and record.id not in after.there and not _in_bin(before, record.id):
            fresh = [k for k in after.there.values() if k.id.startswith("new") and k.step == record.step]
            assert fresh, f"{record.name} comes from nowhere"
            after.called(fresh[0].id, record.id)
    bins = _bins(root)
    way = _way(found.values(), before, after, run, ways)
    assert way is not None, "where the run stands is neither where it stood nor where it goes"
    if exact:
        assert found.keys() == after.there.keys(), f"there: {_names(found)}, not {_of(after)}"
        assert [(set(moved), light) for moved, light in after.bin] == bins, "the trash holds something else"
    now = replace(after, there={}, way=way, run=run)
    known = {**before.there, **after.there}
    for moved, _ in (*before.bin, *after.bin):
        known |= {id: kept for id, kept in moved.items() if id not in known}
    for id in known:
        _one(id, found.get(id), before, after, now, known, {i for moved, _ in bins for i in moved}, exact)
    now.bin = tuple(({i: known[i] for i in moved}, light) for moved, light in bins)
    now.leased = frozenset(leases.in_force(root))
    assert not exact or now.leased == after.leased, "leases"
    _order(found, now)
    return now


def _one(
    id: str,
    record: Record | None,
    before: Model,
    after: Model,
    now: Model,
    known: Mapping[str, Kept],
    in_bin: set[str],
    exact: bool,
) -> None:
    old, new = before.there.get(id), after.there.get(id)
    if record is None:
        assert not (old and new), f"I3, I10: {known[id]} is gone"
        somewhere = (old or _in_bin(before, id)) and (new or _in_bin(after, id))
        assert not somewhere or id in in_bin, f"I3: {known[id]} is neither there nor in the trash"
        return
    assert old or new, f"{record.name} is back from the dead"
    options = [k for k in ([new] if exact else [old, new]) if k is not None]
    kept = options[-1]
    if kept.run != now.run:
        assert record.state == "foreign", f"{record.name} of another run is {record.state}"
        now.there[id] = kept
        return
    if kept.damage == "cut":
        assert record.state == "incomplete", f"I7: {record.name} is {record.state}"
        now.there[id] = replace(
            kept, names=_fact(frozenset(record.pinned), [k.names for k in options], record, "names")
        )
        return
    full = record.state == "full"
    assert record.ours, f"I1: {record.name} is {record.state}: {record.problem}"
    now.there[id] = replace(
        kept,
        full=_fact(full, [k.full for k in options], record, "full"),
        poisoned=_fact(record.poisoned, [k.poisoned for k in options], record, "poisoned"),
        names=_fact(frozenset(record.pinned), [k.names for k in options], record, "names"),
        loss=_fact(record.metrics.get("eval_loss"), [k.loss for k in options], record, "loss"),
    )
    assert record.step == kept.step


def _fact(value: T, allowed: Sequence[T], record: Record, what: str) -> T:
    assert value in allowed, f"{record.name}: {what} is {value!r}, not {allowed}"
    return value


def _way(
    found: Iterable[Record], before: Model, after: Model, run: str, between: Iterable[frozenset[str]]
) -> frozenset[str] | None:
    """Of the ways the one that the disk shows, the later one if it is several."""
    ours = {record.id: record.current for record in found if record.ours}
    current = {id for id, is_current in ours.items() if is_current}
    ways = [after.way, *between, *([before.way] if before.run == run else [])]
    if any(id.startswith("new") for id in after.way):  # the save that makes it came to nothing
        ways = [*ways[1:], after.way]
    return next((way for way in ways if current == ours.keys() & way), None)


def _order(found: Mapping[str, Record], now: Model) -> None:
    """Numbers tell the order, and lineages tell who led to whom (I15)."""
    ours = [(kept, found[kept.id]) for kept in now.ours()]
    assert [r.seq for _, r in ours] == sorted({r.seq for _, r in ours}), "I15: two with one number, or out of order"
    for kept, record in ours:
        assert record.manifest is not None
        for other, theirs in ours:
            assert on_lineage(theirs.seq, record.manifest.lineage) is (other.id in kept.way), (
                f"{theirs.name} on the way to {record.name}?"
            )


def _in_bin(model: Model, id: str) -> bool:
    return any(id in moved for moved, _ in model.bin)


def _bins(root: Path) -> list[tuple[set[str], frozenset[str]]]:
    found = []
    for number in bin.operations(root):
        place = root / HIDDEN / "undo" / number
        ids: dict[bool, set[str]] = {True: set(), False: set()}
        for path in place.iterdir():
            if path.is_dir() and (id := id_at(path)):
                ids[path.name.endswith(".stripped")].add(id)
        found.append((ids[False], frozenset(ids[True])))
    return found


def bytes_are(root: Path, model: Model, known: Mapping[str, Mapping[str, bytes]]) -> None:
    """I3: what is there is what was written, byte for byte."""
    for record in records(root):
        if record.id not in model.there or record.id not in known:
            continue
        kept = model.there[record.id]
        names = record.manifest.files if record.manifest is not None else {}
        for name in names:
            data = (root / record.name / name).read_bytes()
            assert data == known[record.id][name], f"I3: {record.name}/{name} has another content"
        expected = known[record.id].keys() if kept.full else {"model.safetensors"}
        assert expected <= names.keys(), f"I3: {record.name} lacks files"


def foreign_is(root: Path, foreign: Mapping[str, bytes | str | None]) -> None:
    """I11: what isn't ours is as it was."""
    for name, content in foreign.items():
        path = root / name
        assert os.path.lexists(path), f"I11: {name} is gone"
        assert _content(str(path), os.lstat(path).st_mode) == content, f"I11: {name} has changed"


def swept(root: Path, model: Model) -> None:
    """I13: after a writer has opened the run nothing is left of what was cut short."""
    for place in ("tmp", "trash"):
        assert not list((root / HIDDEN / place).glob("*")), f"I13: something is left in {place}"
    for path in (root / HIDDEN).iterdir():
        assert not path.name.startswith("."), f"I13: {path.name} is left"
    for record in records(root):
        if record.id in model.there and record.manifest is not None and record.ours and not record.layout:
            # A cut strip leaves rng_state.pth and the like in an adopted one: whose they are isn't known then.
            files = {
                p.relative_to(root / record.name).as_posix() for p in (root / record.name).rglob("*") if p.is_file()
            }
            extra = files - record.manifest.files.keys() - {codec.NAME}
            assert not extra, f"I13: {extra} in {record.name}"


def answers(root: Path, model: Model, keep: Keep) -> None:
    """I1: last, best and each step are what the model says."""
    asker = Manager(root=root, keep=keep)
    steps = {kept.step for kept in model.ours()}
    expected = {"last": model.last(), "best": model.best(), **{step: model.at(step) for step in steps}}
    for what, kept in expected.items():
        try:
            found = asker.find(what).record.id  # type: ignore[arg-type]
        except NoCheckpoint:
            found = ""
        assert found == (kept.id if kept else ""), f"I1: {what} is {found or 'nothing'}, not {kept}"
    run = open_run(root)
    assert {c.id for c in run.checkpoints if c.ours} == {k.id for k in model.ours()}
    assert len(run.branches) >= bool(model.ours())
    assert run.trail == ()
    assert all("event" in line for line in run.history)


def _names(found: Mapping[str, Record]) -> list[str]:
    return sorted(f"{r.name} ({r.state})" for r in found.values())


def _of(model: Model) -> list[str]:
    return sorted(f"checkpoint-{k.step} {k.id}" for k in model.there.values())
