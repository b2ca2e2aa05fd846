"""What a run directory says about resuming: saves that were cut off, other runs' checkpoints, paths that are gone."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from lastgood.doctor.case import NOW, Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.finding import Repair, Severity
from lastgood.doctor.named import SENTINEL, judge, listing, resumes
from lastgood.doctor.rule import Sight
from lastgood.layouts.progress import STATE
from lastgood.model import TRAINERS, Record
from lastgood.repo.layout import step_of
from lastgood.resumption import newer_stock
from lastgood.store import local

MANY = 50
"""Incomplete checkpoints that are looked at."""
_LEFT = re.compile(r"tmp-checkpoint-\d+|checkpoint-\d+.*[._-](?:incomplete|partial|tmp|temp)")
_TORN = (".incomplete", ".tmp", ".partial")


def beyond(case: Case) -> Iterator[Sight]:
    """Of a managed run: complete checkpoints without a manifest that came further than its newest."""
    disk = disk_of(case)
    if disk.good is None or not disk.good.id:
        return
    further = newer_stock(disk.view, disk.good)
    if further:
        names = ", ".join(record.name for record in further[-3:])
        yield Sight(
            where=further[-1].name,
            saw=f"{names} without a manifest, beyond {disk.good.name}",
            repair=Repair("adopt"),
        )


def disk_of(case: Case) -> Disk:
    assert case.disk is not None, "only called where there is a run directory"
    return case.disk


def begun(disk: Disk) -> list[Record]:
    """A Trainer's checkpoints that lack something by their names, sizes and trainer_state.json."""
    broken = [r for r in disk.records if r.state == "incomplete" and not r.id and r.layout in TRAINERS]
    return broken[-MANY:]


def severity_of(disk: Disk, record: Record) -> Severity:
    """An error for what `resume_from_checkpoint=True` takes: the highest number; else it only lies in the way."""
    highest = max((r.step for r in disk.records if r.state != "foreign"), default=-1)
    return "error" if record.step >= highest else "warning"


def aside(case: Case, record: Record) -> Repair | None:
    """Into quarantine, if another one is good and nobody holds this one. A save under way is waited for then."""
    disk = disk_of(case)
    if disk.good is None or record.pinned or disk.good.name == record.name:
        return None
    return Repair("quarantine", record.name)


def _cut(case: Case, record: Record, saw: str, *evidence: str, fix: tuple[str, ...] = ()) -> Sight:
    disk = disk_of(case)
    writing = case.under_way(disk.path(record))
    now = (f"the last write there was less than {NOW} s ago: if a save is under way, look again when it is done",)
    return Sight(
        saw=saw,
        where=record.name,
        evidence=(*evidence, *(now if writing else ())),
        severity="info" if writing else severity_of(disk, record),
        fix=fix,
        repair=aside(case, record),
    )


def stateless(case: Case) -> Iterator[Sight]:
    """CKR003: no trainer_state.json."""
    disk = disk_of(case)
    for record in begun(disk):
        names = disk.files(record)
        if names and STATE not in names and not _marks(names):
            kind, text = judge(disk.path(record))
            why = "the save was interrupted"
            if kind == "model":
                why += " after the weights, or this is an exported model"
            yield _cut(case, record, f"{record.name} has no {STATE}: {why}", text)


def unreadable(case: Case) -> Iterator[Sight]:
    """CKR004: JSON that isn't."""
    disk = disk_of(case)
    for record, name, why in broken_json(disk):
        sight = _cut(case, record, f"{name} {why}")
        if name not in STOPPING:
            means = "a Trainer resumes all the same; who loads the model from there stops, or goes on without it"
            sight = msgspec.structs.replace(sight, means=means, severity=_at_most_warning(sight.severity))
        yield sight


STOPPING = (STATE, "config.json")
"""JSON files without which a Trainer's resume stops."""


def _at_most_warning(severity: Severity | None) -> Severity | None:
    return "warning" if severity == "error" else severity


def broken_json(disk: Disk) -> list[tuple[Record, str, str]]:
    """(checkpoint, file, what is wrong with it): trainer_state.json anywhere, other JSON of the close ones."""
    found = []
    chosen = {r.name: r for r in (*begun(disk), *disk.close) if not r.id and r.layout in TRAINERS}
    for record in chosen.values():
        for name, size in disk.files(record).items():
            if not name.endswith(".json") or (name != STATE and (record not in disk.close or "/" in name)):
                continue
            if size == 0:
                found.append((record, name, "is empty (0 bytes)"))
            elif disk.json(record, name) is None and size < 1 << 26:
                found.append((record, name, _why(disk, record, name, size)))
            elif name == STATE and type(disk.state(record).get("global_step")) is not int:
                found.append((record, name, "has no global_step"))
    return found


def _why(disk: Disk, record: Record, name: str, size: int) -> str:
    try:
        data = local.read(disk.path(record) / name, 1 << 26)
        if not data.strip(b"\0"):
            return f"holds {size} zero bytes: its content never reached the disk"
        json.loads(data)
    except OSError as error:
        return f"can't be read: {error.strerror or error}"
    except (ValueError, RecursionError) as error:
        return f"isn't JSON ({size} bytes): {str(error)[:100] or 'nested too deeply'}"
    return "holds nothing (null)"


def weightless(case: Case) -> Iterator[Sight]:
    """CKR002: everything but the weights."""
    disk = disk_of(case)
    for record in begun(disk):
        if STATE in disk.files(record) and not _marks(disk.files(record)) and "no file with weights" in record.problem:
            yield _cut(case, record, f"{record.name} holds no weights", judge(disk.path(record))[1])


def leftovers(case: Case) -> Iterator[Sight]:
    """CKR014: what says of itself that it isn't finished."""
    disk = disk_of(case)
    for record in disk.records:
        if record.state == "foreign" or record.id:
            continue  # a managed save gets its name when it is complete
        names = list(record.manifest.files if record.manifest is not None else disk.files(record))
        marks = _marks(names)
        cut = record.layout == "accelerate" and record.state == "incomplete" and "is empty" not in record.problem
        if marks:
            yield _cut(case, record, f"{record.name} holds {', '.join(marks[:3])}", listing(dict(disk.files(record))))
        elif not names and record.state == "incomplete" and record.layout in TRAINERS:
            yield _cut(case, record, f"{record.name} is empty: the save was interrupted as it began")
        elif cut:
            yield _cut(case, record, f"{record.name}: {record.problem}", listing(dict(disk.files(record))))
    for name in disk.beside[:10_000]:
        if _LEFT.fullmatch(name):
            path = disk.root / name
            now = case.under_way(path)
            yield Sight(
                saw=f"{name} is a save that never got its name",
                where=name,
                evidence=(("written to less than a minute ago: a save may be under way",) if now else ()),
                severity="info" if now else "warning",
                repair=Repair("quarantine", name),
            )


def _marks(names: Iterable[str]) -> list[str]:
    return [name for name in names if name == SENTINEL or name.endswith(_TORN)]


def no_optimizer(case: Case) -> Iterator[Sight]:
    """CKR016: what a Trainer resumes from without a word, though optimizer or schedule aren't there."""
    disk, last = disk_of(case), _last(disk_of(case))
    if last is None or last.state != "weights" or (case.settings is not None and case.settings.save_only_model):
        return
    files = disk.files(last)
    if last.layout == "fsdp" or (last.layout == "trainer" and "pytorch_model_fsdp.bin" in files):
        return
    wanted = ("scheduler.pt",) if last.layout == "deepspeed" else ("optimizer.pt", "scheduler.pt")
    gone = [name for name in wanted if name not in files and name.replace(".pt", ".bin") not in files]
    if gone:
        saved = disk.arguments(last).get("save_only_model") is True
        yield Sight(
            saw=f"{last.name} has no {' and no '.join(gone)}" + (" (save_only_model=True)" if saved else ""),
            where=last.name,
            evidence=(listing(dict(files)),),
            means="a stock Trainer resumes from it all the same, without a word: the optimizer starts empty and the"
            " learning rate at the beginning of its schedule (it loads either both files or neither)",
            fix=(resumes(disk, disk.good.name),) if disk.good is not None else (),
        )


def _last(disk: Disk) -> Record | None:
    """The one that a stock Trainer takes for resume_from_checkpoint=True."""
    own = [r for r in disk.records if r.layout in TRAINERS and step_of(r.name) is not None and r.state != "foreign"]
    return max(own, key=lambda r: r.step, default=None)


def lost_best(case: Case) -> Iterator[Sight]:
    """CKR010: the best checkpoint is recorded by a path that is gone."""
    disk = disk_of(case)
    record = disk.good or _last(disk)
    if record is None or record.layout not in TRAINERS:
        return
    state = disk.state(record)
    best = state.get("best_model_checkpoint")
    if not isinstance(best, str) or not os.path.isabs(best) or "\0" in best or os.path.isdir(best):
        return
    arguments = disk.arguments(record)
    needed = arguments.get("load_best_model_at_end") is True or bool(arguments.get("save_total_limit"))
    yield _relinked(case, record, best, "warning" if needed else "info")


def _relinked(case: Case, record: Record, best: str, severity: Severity) -> Sight:
    disk = disk_of(case)
    name = Path(best.replace("\\", "/")).name
    here = disk.root / name
    found = any(r.name == name and r.state != "foreign" for r in disk.records)
    repair = None
    if found and not record.id:  # an adopted one is hashed: its files stay as they are
        state = {**disk.state(record), "best_model_checkpoint": str(here.absolute())}
        repair = Repair("relink", f"{record.name}/{STATE}", json.dumps(state, indent=2, sort_keys=True) + "\n")
    return Sight(
        saw=f"the best checkpoint is recorded as {best[:300]}, which isn't there",
        where=record.name,
        evidence=(f"{name} lies in {disk.root}: the run was moved or renamed",)
        if found
        else (f"there is no {name} in {disk.root} either: it was deleted",),
        severity=severity,
        fix=(f"lastgood doctor --fix {shlex.quote(str(disk.root))}  # writes {here.absolute()} into {STATE}",)
        if repair is not None
        else (),
        repair=repair,
    )


def no_tag(case: Case) -> Iterator[Sight]:
    """CKR013: DeepSpeed's shards are there, the file that names them isn't."""
    disk = disk_of(case)
    for record in disk.close:
        if record.layout == "deepspeed":
            yield from _tag(disk, record.name, sorted(disk.files(record)), own=bool(record.id))
    if any(_TAG.fullmatch(name) for name in disk.beside):
        names = [f"{name}/{file}" for name in disk.beside if _TAG.fullmatch(name) for file in _names(disk.root / name)]
        yield from _tag(disk, "", [*names, *disk.beside], own=False)


_TAG = re.compile(r"global_step(\d{1,18})")


def _names(path: Path) -> list[str]:
    try:
        return local.names(path)
    except OSError:
        return []


def _tag(disk: Disk, where: str, names: Sequence[str], *, own: bool) -> Iterator[Sight]:
    shards: dict[str, int] = {}
    for name in names:
        tag, _, rest = name.partition("/")
        if _TAG.fullmatch(tag):
            shards[tag] = shards.get(tag, 0) + rest.endswith("optim_states.pt")
    if not shards:
        return
    most = max(shards.values())
    newest = max((tag for tag in shards if shards[tag] == most), key=lambda tag: int(tag[11:]))
    folder = disk.root / where
    try:
        named = local.read(folder / "latest", 4096).decode("utf-8", "replace").strip()
    except OSError:
        named = ""
    if named and is_tag(folder, named):
        return
    file = f"{where}/latest" if where else "latest"
    yield Sight(
        saw=f"{file} names {named[:100]!r}, which isn't there" if named else f"there is no file {file}",
        where=where or disk.root.name,
        evidence=(f"{newest} is complete: {most} files with optimizer states",),
        fix=(f"printf {newest} > {shlex.quote(str(folder / 'latest'))}",),
        repair=None if own else Repair("relink", file, newest),
    )


def is_tag(folder: Path, name: str) -> bool:
    return "/" not in name and name not in ("", ".", "..") and os.path.isdir(folder / name)


def half_trained(case: Case) -> Iterator[Sight]:
    """CKR015: the last checkpoint was saved on SIGTERM, and the run ended there as if it were done."""
    disk, last = disk_of(case), disk_of(case).newest
    if last is None or last.layout not in TRAINERS or last.state != "full":
        return
    arguments, state = disk.arguments(last), disk.state(last)
    every, end = arguments.get("save_steps"), state.get("max_steps")
    if arguments.get("enable_jit_checkpoint") is not True or not isinstance(end, int) or not 0 < last.step < end:
        return
    if arguments.get("save_strategy") != "steps" or not isinstance(every, (int, float)) or not every >= 1:
        return
    if last.step % int(every) == 0:
        return
    exported = [n for n in disk.beside if n in ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")]
    yield Sight(
        saw=f"{last.name} was saved between two saves (every {int(every)}), at step {last.step} of {end}",
        where=last.name,
        evidence=(f"{exported[0]} beside it may be that half-trained model",) if exported else (),
        fix=(resumes(disk, last.name),),
    )
