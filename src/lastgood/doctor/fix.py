"""`--fix`: what can be mended without losing anything is planned, shown and done. Nothing is ever deleted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from lastgood.adoption import candidates
from lastgood.doctor.disk import Disk
from lastgood.doctor.finding import Finding, Repair
from lastgood.pruning import in_flux
from lastgood.repo.adopt import adopt
from lastgood.repo.layout import HIDDEN, hidden, new_id
from lastgood.repo.lock import RunLock
from lastgood.repo.quarantine import quarantine
from lastgood.store import local
from lastgood.view import look


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One repair. why_not: set if it is left undone, and why."""

    repair: Repair
    code: str
    why_not: str = ""

    def __str__(self) -> str:
        name = self.repair.name
        text = {
            "quarantine": f"move {name} to {HIDDEN}/quarantine",
            "relink": f"correct the path in {name}; the file as it is goes to {HIDDEN}/quarantine",
            "adopt": "give the intact checkpoints of the Trainer manifests",
        }[self.repair.kind]
        return f"{self.code}  {text}" + (f": not done, {self.why_not}" if self.why_not else "")


def steps(disk: Disk, findings: Sequence[Finding], *, ended: bool = False) -> tuple[Step, ...]:
    """What `--fix` would do, each thing once. ended: whoever wrote checkpoints here is known to have ended."""
    planned: dict[Repair, Step] = {}
    for finding in findings:
        repair = finding.repair
        if repair is not None and repair not in planned:
            why_not = _why_not(disk, repair, ended)
            planned[repair] = Step(repair=repair, code=finding.code, why_not=why_not)
    return tuple(planned.values())


def execute(root: Path, todo: Sequence[Step]) -> Iterator[str]:
    """Do it, and say of each what was done. Raises RunLocked while a training run writes here, OSError for the disk.

    What was done until an error stays done; the rest is as it was.
    """
    todo = [step for step in todo if not step.why_not]
    if not todo:
        return
    lock = RunLock(root)
    lock.acquire(anonymous=True)  # to move something aside takes no room, and a full disk is when it is wanted
    try:
        for step in todo:
            repair = step.repair
            if repair.kind == "quarantine":
                yield f"{step.code}  {repair.name} is now {quarantine(root, repair.name)}"
            elif repair.kind == "relink":
                yield f"{step.code}  {repair.name} is corrected; as it was: {_relink(root, repair)}"
        if any(step.repair.kind == "adopt" for step in todo):
            yield _adopt(root)
    finally:
        lock.release()


def _why_not(disk: Disk, repair: Repair, ended: bool) -> str:
    if repair.kind == "adopt":
        return ""
    path = disk.root / repair.name
    record = next((r for r in disk.records if r.name == repair.name.split("/")[0]), None)
    if not os.path.lexists(path) or path.is_symlink() or HIDDEN in Path(repair.name).parts:
        return "it isn't there, or is a link"
    if any(parent.is_symlink() for parent in path.parents if disk.root in parent.parents):
        return "it lies behind a link"
    if any(place.is_symlink() for place in (disk.root / HIDDEN, hidden(disk.root, "quarantine"))):
        return f"{HIDDEN}/quarantine is, or lies behind, a link: what is moved there would leave the run"
    if repair.kind == "relink":
        managed = record is not None and bool(record.id)
        return "its manifest has its hash; resume with lastgood, which goes by the step" if managed else ""
    if record is not None and record.pinned:
        return f"it is held: {', '.join(record.pinned)}"
    if record is not None and disk.good is not None and record.name == disk.good.name:
        return "it is what a resume would take"
    if record is not None and record.state == "foreign":
        return "it belongs to another run"
    if not ended and path.is_dir() and in_flux(path):
        return "it was written to lately: a Trainer may be in the middle of it; run this again in a while"
    return ""


def _relink(root: Path, repair: Repair) -> str:
    path = root / repair.name
    kept = hidden(root, "quarantine", f"{repair.name.replace('/', '.')}.{new_id()[:8]}")
    local.make_dirs(kept.parent)
    local.write(kept, [local.read(path, 1 << 30)])
    local.replace(path, repair.text.encode())
    return kept.relative_to(root).as_posix()


def _adopt(root: Path) -> str:
    chains, skipped = candidates(look(root))
    made = adopt(root, chains)
    return f"adopted {len(made)} checkpoints" + (f", {len(skipped)} left as they are" if skipped else "")
