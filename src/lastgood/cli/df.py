"""df and du: where the space went, what of it can be had back, and when there is none left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lastgood import policy, units
from lastgood.cli.place import run_at, run_option
from lastgood.cli.table import Column, Row, Style, choose, emit, emit_json, lines, options, ordered, terminal_width
from lastgood.forecast import Forecast, forecast
from lastgood.manager import RESERVE
from lastgood.model import Record
from lastgood.repo import gc, journal
from lastgood.repo.layout import HIDDEN
from lastgood.repo.reserve import held
from lastgood.store import local
from lastgood.store.quota import quota, room
from lastgood.view import View, look

HIDDEN_KINDS = {"undo": "trash", "trash": "leftovers", "tmp": "leftovers", "quarantine": "quarantine"}


@click.command()
@click.argument("run", required=False)
@run_option
@options
def df(root: str | None, run: str | None, style: Style) -> None:
    """Space by kind of checkpoint: logical, on disk, and what `prune` could free; then the disk and its forecast.

    On disk counts blocks, and files that several checkpoints share (hard links) once. Reclaimable is what the run's
    own policy lets go, what interrupted saves left, and the trash.
    """
    path = run_at(root, run)
    view = look(path)
    rows = kinds(view)
    disk = _disk(view)
    if style.json:
        emit_json("lastgood.df/1", {"kinds": rows, "disk": disk})
        return
    known = [
        Column("kind", "KIND", str),
        Column("count", "COUNT", str, right=True),
        Column("logical", "LOGICAL", style.size, right=True),
        Column("disk", "ON DISK", style.size, right=True),
        Column("reclaimable", "RECLAIMABLE", style.size, right=True),
    ]
    table = lines(choose(known, [c.key for c in known], style), ordered(rows, known, style), style)
    if style.header:
        free = f"disk {disk['mount']}: {style.size(disk['free'])} free of {style.size(disk['total'])}"
        if disk["quota"]:
            free += f", quota {style.size(disk['quota']['limit'])} ({style.size(disk['quota']['used'])} used)"
        table += [free, f"disk full: {disk['forecast']}"]
    emit(table)


@click.command()
@click.argument("run", required=False)
@run_option
@options
def du(root: str | None, run: str | None, style: Style) -> None:
    """Space per checkpoint and part, the largest first."""
    path = run_at(root, run)
    view = look(path)
    parts = sorted({part for r in view.records if r.manifest is not None for part in r.manifest.parts})
    rows = [_by_part(record, parts) for record in view.records]
    rows.sort(key=lambda row: -row["total"])
    if style.json:
        emit_json("lastgood.du/1", {"checkpoints": rows})
        return
    known = [
        Column("name", "NAME", str, shrink=True),
        Column("state", "STATE", str),
        *[Column(part, part.upper(), style.size, right=True) for part in parts],
        Column("total", "TOTAL", style.size, right=True),
    ]
    shown = choose(known, [c.key for c in known], style)
    emit(lines(shown, ordered(rows, known, style), style, columns_wide=terminal_width()))


def _by_part(record: Record, parts: Sequence[str]) -> dict[str, Any]:
    manifest = record.manifest
    row: dict[str, Any] = {"name": record.name, "state": record.state, "total": record.size}
    for part in parts:
        names = manifest.parts.get(part, ()) if manifest is not None else ()
        row[part] = sum(manifest.files[name].size for name in names) if manifest is not None else 0
    return row


def kinds(view: View) -> list[Row]:
    """One row per kind of checkpoint, then what lies beside them, then the sum."""
    free = {d.record.name: gc.gain(d) for d in _decisions(view)}
    table: dict[str, dict[str, Any]] = {}
    seen: set[tuple[int, int]] = set()

    def add(kind: str, path: Path, reclaimable: int | None) -> None:
        row = table.setdefault(kind, {"kind": kind, "count": 0, "logical": 0, "disk": 0, "reclaimable": 0})
        logical, disk = _weigh(path, seen)
        row["count"] += 1
        row["logical"] += logical
        row["disk"] += disk
        row["reclaimable"] += disk if reclaimable is None else reclaimable

    for record in view.records:
        own = view.adopted_or_ours(record)
        kind = record.state if own or not record.layout else f"{record.layout} {record.state}"
        add(kind, view.path(record), free.get(record.name, 0) if own else 0)
    for folder, kind in HIDDEN_KINDS.items():
        for name in local.names(view.root / HIDDEN / folder):
            add(kind, view.root / HIDDEN / folder / name, None)
    rows = list(table.values())
    keys = ("count", "logical", "disk", "reclaimable")
    return [*rows, {"kind": "total", **{key: sum(row[key] for row in rows) for key in keys}}]


def _decisions(view: View) -> tuple[policy.Decision, ...]:
    if view.keep is None:
        return ()
    return policy.decide(view.native, view.keep, protect=view.protect)


def _weigh(path: Path, seen: set[tuple[int, int]]) -> tuple[int, int]:
    """(bytes of the files, bytes of their blocks that nothing seen before shares)."""
    logical = disk = 0
    found = [path] if path.is_file() else [Path(at) / name for at, _, names in os.walk(path) for name in names]
    for file in found:
        try:
            status = file.lstat()
        except OSError:
            continue
        logical += status.st_size
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            disk += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
    return logical, disk


def _disk(view: View) -> dict[str, Any]:
    import shutil

    total = shutil.disk_usage(view.root).total
    free, inodes = local.free(view.root)
    limits = quota(view.root)
    guess = _forecast(view, room(view.root) + held(view.root))
    when = "" if guess.seconds is None else f", about {units.span(guess.seconds)} at the pace of the last ones"
    return {
        "mount": str(_mount(view.root)),
        "total": total,
        "free": free,
        "inodes_free": inodes if inodes >= 0 else None,
        "quota": None if limits is None else {"used": limits[0], "limit": limits[1]},
        "saves_left": guess.saves,
        "seconds_left": guess.seconds,
        "forecast": guess.text + when,
    }


def _forecast(view: View, free: int) -> Forecast:
    saves = [
        (float(event["time"]), int(event["bytes"]))
        for event in journal.read(view.root)
        if event.get("event") == "saved" and isinstance(event.get("bytes"), int) and _number(event.get("time"))
    ]
    if not saves:  # a run that isn't managed has no journal
        made = sorted((r.manifest.created, r.size) for r in view.records if r.ours and r.manifest is not None)
        saves = [(created, size) for created, size in made if created > 0]
    return forecast(saves, view.keep, free=free, reserve=RESERVE)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mount(path: Path) -> Path:
    at = path.resolve()
    while not at.is_mount() and at != at.parent:
        at = at.parent
    return at
