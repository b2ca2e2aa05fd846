"""`--fix`: what can be mended without losing anything is planned, shown and done. Nothing is ever deleted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from lastgood.adoption import candidates
from lastgood.doctor.disk import Disk
from lastgood.doctor.finding import Finding, Repair
from lastgood.errors import Refused
from lastgood.model import Record
from lastgood.pruning import in_flux, last_write
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


def steps(disk: Disk, findings: Sequence[Finding], *, since: float | None = None) -> tuple[Step, ...]:
    """What `--fix` would do, each thing once.

    since: seconds since 1970. Whoever wrote here from then on is known to have ended: its output came to an end.
    """
    repairs = dict.fromkeys(finding.repair for finding in findings if finding.repair is not None)
    codes = {finding.repair: finding.code for finding in reversed(findings)}
    return tuple(Step(repair=one, code=codes[one], why_not=_why_not(disk, one, since)) for one in repairs)


def execute(disk: Disk, todo: Sequence[Step], *, since: float | None = None) -> Iterator[str]:
    """Do it, and say of each what was done. disk: as it was when the steps were planned.

    Raises RunLocked while a training run writes here, Refused where something was changed since then, OSError for the
    disk. What was done until an error stays done; the rest is as it was.
    """
    todo = [step for step in todo if not step.why_not]
    if not todo:
        return
    lock = RunLock(disk.root)
    lock.acquire(anonymous=True)  # to move something aside takes no room, and a full disk is when it is wanted
    try:
        _unchanged(disk, Disk(disk.root), todo, since)
        for step in todo:
            repair = step.repair
            if repair.kind == "quarantine":
                yield f"{step.code}  {repair.name} is now {quarantine(lock.door, repair.name)}"
            elif repair.kind == "relink":
                yield f"{step.code}  {repair.name} is corrected{_relink(disk.root, repair)}"
        if any(step.repair.kind == "adopt" for step in todo):
            yield _adopt(disk.root)
    finally:
        lock.release()


def _unchanged(planned: Disk, now: Disk, todo: Sequence[Step], since: float | None) -> None:
    """A stock Trainer holds no lock: what was a husk a moment ago may be complete, or may be being written."""
    for step in todo:
        before, after = _record(planned, step.repair), _record(now, step.repair)
        why = _why_not(now, step.repair, since)
        if before is not None and (after is None or after.state != before.state):
            why = "it is another state now than when the plan was made"
        if why:
            raise Refused(f"{step.repair.name}: {why}; nothing was changed", hint="run it again")


def _record(disk: Disk, repair: Repair) -> Record | None:
    """The checkpoint that a repair is about, or lies in."""
    held = (repair.name, *map(str, PurePosixPath(repair.name).parents))
    return next((record for record in disk.records if record.name in held), None)


def _why_not(disk: Disk, repair: Repair, since: float | None) -> str:
    if repair.kind == "adopt":
        return ""
    path, record = disk.root / repair.name, _record(disk, repair)
    if path.is_symlink() or HIDDEN in Path(repair.name).parts or not os.path.lexists(path.parent):
        return "it isn't there, or is a link"
    if any(parent.is_symlink() for parent in path.parents if disk.root in parent.parents):
        return "it lies behind a link"
    if any(place.is_symlink() for place in (disk.root / HIDDEN, hidden(disk.root, "quarantine"))):
        return f"{HIDDEN}/quarantine is, or lies behind, a link: what is moved there would leave the run"
    if in_flux(path) and not (since is not None and last_write(path) >= since):
        return "it was written to lately: a Trainer may be in the middle of it; run this again in a while"
    if repair.kind == "relink":
        managed = record is not None and bool(record.id)
        return "its manifest has its hash; resume with lastgood, which goes by the step" if managed else ""
    if not os.path.lexists(path):
        return "it isn't there"
    if record is not None and record.pinned:
        return f"it is held: {', '.join(record.pinned)}"
    if record is not None and disk.good is not None and record.name == disk.good.name:
        return "it is what a resume would take"
    if record is not None and record.state == "foreign":
        return "it belongs to another run"
    return ""


def _relink(root: Path, repair: Repair) -> str:
    path, said = root / repair.name, ""
    if path.exists():  # DeepSpeed's `latest` may be missing altogether
        kept = hidden(root, "quarantine", f"{repair.name.replace('/', '.')}.{new_id()[:8]}")
        local.make_dirs(kept.parent)
        local.write(kept, [local.read(path, 1 << 30)])
        said = f"; as it was: {kept.relative_to(root).as_posix()}"
    local.replace(path, repair.text.encode())
    return said


def _adopt(root: Path) -> str:
    chains, skipped = candidates(look(root))
    made = adopt(root, chains)
    return f"adopted {len(made)} checkpoints" + (f", {len(skipped)} left as they are" if skipped else "")
