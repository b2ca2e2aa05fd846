"""What a run directory says about several processes: who wrote, whose part is missing, what an index names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.finding import Repair
from lastgood.doctor.rule import Sight
from lastgood.errors import CorruptCheckpoint
from lastgood.format.inert import Node
from lastgood.layouts import dcp
from lastgood.layouts.found import files_of, is_directory
from lastgood.model import Record
from lastgood.store import local

SHARD = re.compile(r"(?:^|/)__(\d{1,6})_\d{1,6}\.distcp$")
ZERO = re.compile(r"zero_pp_rank_(\d{1,6})_mp_rank_\d{1,6}_optim_states\.pt$")
RANDOM = re.compile(r"^(?:rng_state|random_states)_(\d{1,6})\.(?:pth|pkl)$")
MANY = 100
"""Names beside the checkpoints that are looked into."""
WORLD = 1 << 20
"""No run has more processes: a larger number in a file is nonsense."""


def indices(disk: Disk, record: Record) -> Iterator[tuple[str, dcp.Index]]:
    """(folder, its index) of each part of a checkpoint that torch.distributed.checkpoint wrote and that can be read."""
    for name in disk.files(record):
        if name.rpartition("/")[2] != dcp.METADATA:
            continue
        try:
            yield name.rpartition("/")[0], dcp.read(disk.path(record) / Path(name).parent)
        except CorruptCheckpoint:
            continue


def ranks(disk: Disk, record: Record, pattern: re.Pattern[str]) -> set[int]:
    """Numbers of the processes whose files are there."""
    return {int(found[1]) for name in disk.files(record) if (found := pattern.search(name))}


def world(disk: Disk, record: Record) -> tuple[int, str]:
    """(number of processes that saved, how that is known); (0, "") if nothing says."""
    tree = disk.pickled(record, "training_args.bin") if "training_args.bin" in disk.files(record) else None
    state = tree.fields.get("distributed_state") if isinstance(tree, Node) else None
    told = state.fields.get("num_processes") if isinstance(state, Node) else None
    known = [(told, "training_args.bin says")] if type(told) is int and 0 < told <= WORLD else []
    for pattern, whose in ((SHARD, "shards"), (ZERO, "ZeRO optimizer files"), (RANDOM, "random states")):
        there = ranks(disk, record, pattern)
        known += [(max(there) + 1, f"its {whose} are numbered up to {max(there)}")] if there else []
    return max(known, default=(0, ""), key=lambda pair: pair[0])


def unfinished(disk: Disk) -> Iterator[tuple[str, dict[str, int]]]:
    """(folder relative to the run, its files): shards of torch.distributed.checkpoint without the index over them."""
    for record in disk.close:
        files = disk.files(record)
        folders = {name.rpartition("/")[0] for name in files if SHARD.search(name)}
        for folder in sorted(folders):
            prefix = f"{folder}/" if folder else ""
            if f"{prefix}{dcp.METADATA}" not in files:
                yield f"{record.name}/{folder}".rstrip("/"), {n: s for n, s in files.items() if n.startswith(prefix)}
    for name in sorted(disk.beside)[-MANY:]:
        path = disk.root / name
        if is_directory(path):
            there = local.names(path)
            if dcp.METADATA not in there and any(SHARD.search(n) or n == f"{dcp.METADATA}.tmp" for n in there):
                yield name, files_of(path)


def never_finished(case: Case) -> Iterator[Sight]:
    """Shards without `.metadata`."""
    assert case.disk is not None
    for name, files in unfinished(case.disk):
        top = name.split("/")[0]
        shards = sum(1 for file in files if SHARD.search(file))
        begun = any(file.endswith(f"{dcp.METADATA}.tmp") for file in files)
        yield Sight(
            where=top,
            saw=f"{name} holds {shards} shard{'s' if shards != 1 else ''} and no {dcp.METADATA}"
            + (f", but {dcp.METADATA}.tmp: the save ended while the index was written" if begun else ""),
            evidence=(f"{sum(files.values())} bytes in {len(files)} files; the index is written after the last shard",),
            repair=Repair("quarantine", top),
        )


def lost_shards(case: Case) -> Iterator[Sight]:
    """Files that an index names and that aren't there, by the process that wrote them."""
    assert case.disk is not None
    disk = case.disk
    for record in disk.close:
        files = disk.files(record)
        for folder, index in indices(disk, record):
            prefix = f"{folder}/" if folder else ""
            named = {item.file for item in index.items}
            lost = sorted(name for name in named if f"{prefix}{name}" not in files)
            if not lost:
                continue
            gone = sorted({int(found[1]) for name in lost if (found := SHARD.search(name))})
            left = sorted({int(found[1]) for name in named.difference(lost) if (found := SHARD.search(name))})
            tensors = sorted({item.name for item in index.items if item.file in lost})
            yield Sight(
                where=record.name,
                saw=f"{len(lost)} of {len(named)} shards are missing: {listed(prefix + name for name in lost)}",
                evidence=(
                    f"written by {processes(gone)}; there are those of {processes(left)}",
                    f"parts of {len(tensors)} tensors are in them: {listed(tensors)}",
                ),
            )


def few_random_states(case: Case) -> Iterator[Sight]:
    """Fewer random states than processes."""
    assert case.disk is not None
    disk = case.disk
    for record in disk.close:
        there = ranks(disk, record, RANDOM)
        total, known = world(disk, record)
        missing = sorted(set(range(min(total, 1 << 16))) - there)
        if not there or not missing:
            continue
        stem = next(name for name in disk.files(record) if RANDOM.search(name))
        yield Sight(
            where=record.name,
            saw=f"{len(there)} of {total} random states ({stem} ...) are there: {processes(missing)} missing",
            evidence=(known,),
        )


def processes(numbers: list[int]) -> str:
    """Which processes, in words: rank 3; ranks 8-15."""
    if not numbers:
        return "nobody"
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans[:6]) + (" ..." if len(spans) > 6 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {words}"


def listed(names: object, most: int = 4) -> str:
    """A few names and how many more there are."""
    items = [str(name)[:120] for name in names]  # type: ignore[attr-defined]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{', '.join(items[:most])}{more}"


def nearest(disk: Disk, wanted: str) -> tuple[str, ...]:
    """Folders near a place that isn't there: what is in the deepest part of the way that exists."""
    at = Path(wanted)
    while at != at.parent and not at.is_dir():
        at = at.parent
    try:
        names = sorted(name for name in os.listdir(at) if is_directory(at / name)) if at.parts[1:] else []
    except OSError:
        names = []
    here = [f"{at} is there and holds {listed(names) or 'no folders'}"] if at.parts[1:] else []
    known = [record.name for record in disk.records if record.ours][-3:]
    return (*here, *([f"the run {disk.root} holds {listed(known)}"] if known else []))
