"""What a run directory says about room: what is free, what is half written, what could go, what is still to come."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lastgood import policy
from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.rule import Sight
from lastgood.doctor.rules.distributed_disk import unfinished
from lastgood.errors import LastgoodError
from lastgood.manager import RESERVE
from lastgood.model import TRAINERS, Record, finite, stripped
from lastgood.planner.ahead import Coming, ahead
from lastgood.policy import Keep
from lastgood.repo import bin, gc
from lastgood.schedule import absolute_steps, total_steps
from lastgood.store import local
from lastgood.store.quota import quota
from lastgood.units import size

FEW = 64
"""So few free inodes are none: one save makes a dozen files."""
LONGEST = 1 << 50
"""Steps; no run is longer."""


def room(case: Case) -> tuple[str, ...]:
    """The facts that tell a full disk from a quota, and what there is to do about either."""
    disk = case.disk
    if disk is None:
        return ()
    inodes = "" if disk.inodes < 0 else f", {disk.inodes} inodes"
    lines = [f"free there now: {size(disk.free)}{inodes}"]
    if limits := quota(disk.root):
        lines.append(f"quota: {size(limits[0])} of {size(limits[1])} used")
    if 0 <= disk.inodes <= FEW and disk.free > RESERVE:
        lines.append("it is inodes that have run out, not bytes: many small files fill it")
    lines += half_written(disk)
    whole = policy.latest(disk.records)
    if whole is not None:
        lines.append(f"the last whole checkpoint, {whole.name}, takes {size(whole.size)}")
    gain, _ = reclaimable(disk)
    if gain:
        lines.append(f"prune could free {size(gain)}, and leave the last good checkpoint and the best")
    if trash := bin.size(disk.root):
        lines.append(f"the trash of earlier prunes holds {size(trash)}")
    return tuple(lines)


def half_written(disk: Disk) -> list[str]:
    """What the save that failed left behind."""
    lines = []
    newest = disk.newest
    if newest is not None and newest.state == "incomplete":
        files = disk.files(newest)
        lines.append(
            f"{newest.name} is half written: {size(sum(files.values()))} in {len(files)} files; {newest.problem}"
        )
    elif left := next(iter(unfinished(disk)), None):
        lines.append(f"{left[0]} is half written: {size(sum(left[1].values()))} in {len(left[1])} files")
    return lines


def reclaimable(disk: Disk) -> tuple[int, bool]:
    """(bytes that `prune` could free and leave the newest and the best, whether that takes --stock)."""
    view = disk.view
    keep = Keep(last=1) if view.mode is None else Keep(last=1, monitor=view.monitor, mode=view.mode)
    known = [record for record in disk.records if record.id or record.layout in TRAINERS or not record.ours]
    gains = {
        decision.record.name: gc.gain(decision)
        for decision in policy.decide(known, keep, protect=view.protect)
        if decision.action == "delete"
    }
    stock = any(record.name in gains and not record.id for record in known)
    return sum(gains.values()), stock


def fix(case: Case) -> tuple[str, ...]:
    """Commands that make room, with the numbers of this run."""
    disk = case.disk
    if disk is None:
        return ("lastgood -C RUN prune --to-free 20GB", "lastgood -C RUN df")
    whole = policy.latest(disk.records)
    needed = max((whole.size if whole is not None else 0) + RESERVE - disk.free, 1 << 20)
    gain, stock = reclaimable(disk)
    extra = " --stock" if stock else ""
    lines = ["lastgood -C {root} prune --empty-trash"] if bin.size(disk.root) else []
    if gain >= needed:
        lines.append(f"lastgood -C {{root}} prune --to-free {-(-needed >> 20)}MiB{extra}")
    elif gain:
        lines.append(f"lastgood -C {{root}} prune --keep-last 1 --now{extra}")
    if half_written(disk):
        # --keep-every 1 wants every checkpoint: nothing but what the save left goes.
        lines.append(f"lastgood -C {{root}} prune --incomplete --keep-every 1 --now{extra or ' --stock'}")
    limit = "keep=lastgood.Keep(last=2, best=1, full=1, ...)" if disk.view.keep is not None else "save_total_limit=2"
    return (*lines, f"{limit}, so that it doesn't happen again", "lastgood -C {root} df  # what takes the space")


def elsewhere(case: Case, text: str) -> tuple[str, ...]:
    """Of a place that the message names and that isn't in the run directory: how much is free there."""
    if case.disk is None:
        return ()
    root = os.path.realpath(case.disk.root)
    for name in re.findall(r"""(?:: |at path )['"](/[^'"\n]{1,4000})['"]""", text):
        at = Path(os.path.realpath(name))
        if at.is_relative_to(root):
            return ()
        while not at.is_dir() and at != at.parent:
            at = at.parent
        free = size(local.free(at)[0]) if at.parts[1:] else "nobody knows what"
        return (f"the file isn't in the run directory: {name}; free in {at}: {free}",)
    return ()


def full_now(case: Case) -> Iterator[Sight]:
    """A disk without room under a save that failed; a log says the same with more words."""
    disk = case.disk
    assert disk is not None
    if case.log is not None:
        return
    none = disk.free < 1 << 16 or disk.inodes == 0
    left = half_written(disk)
    if none and left:
        what = "no inode is free" if disk.inodes == 0 else f"{size(disk.free)} are free"
        yield Sight(saw=f"{what}, and {left[0]}", evidence=room(case), fix=fix(case))


def upcoming(case: Case) -> Iterator[Sight]:
    """The save that won't fit any more: played through with the run's own policy from what is there."""
    disk, s = case.disk, case.settings
    assert disk is not None
    own = sorted((r for r in disk.records if r.ours and r.current and r.size > 0), key=lambda r: (r.seq, r.step))
    if s is None or not own or s.save_strategy in ("no", "best"):
        return
    newest = own[-1]
    end = _end(case, newest)
    points = _points(case, newest, end)
    if not points:
        return
    free = disk.free
    held = RESERVE if disk.view.adopted_or_ours(newest) and not newest.layout else 0
    needed = next((r.size for r in reversed(own) if r.state == newest.state), newest.size)
    weights = stripped(newest.manifest).size if newest.manifest is not None else needed
    made = [record.manifest.created if record.manifest is not None else 0.0 for record in own]
    coming = Coming(
        steps=points, end=points[0] if end is None else end,
        full=needed if newest.state == "full" else None, weights=min(weights, needed),
        now=made[-1], pace=max(0.0, (made[-1] - made[0]) / (len(made) - 1)) if len(made) > 1 else 60.0,
    )  # fmt: skip
    keep, space = _keep(case), free - held + sum(record.size for record in own)
    spent = 0 <= disk.inodes < len(disk.files(newest))
    step = coming.step(0) if spent else ahead(coming, keep, space, there=own).full_at
    if step is None:
        return
    index = -(-(step - points.start) // points.step)
    many = f"{len(points)} saves are still to come, up to step {end}" if end is not None else "one save more"
    yield Sight(
        where=newest.name,
        saw=f"the save at step {step} won't fit: each takes {size(needed)}, {size(free)} are free, {many}",
        evidence=(f"policy: {keep.describe()}", *room(case)),
        severity="error" if index == 0 else "warning",
        means="the next save fails" if index == 0 else f"after {index} more save{'s' * (index > 1)} the disk is full",
        fix=fix(case),
    )


def _keep(case: Case) -> Keep:
    """The run's own policy, or save_total_limit as one."""
    assert case.disk is not None
    assert case.settings is not None
    view = case.disk.view
    if view.keep is not None:
        return view.keep
    monitor = view.monitor if view.mode is not None else None
    try:
        return Keep.from_limit(case.settings.save_total_limit, monitor, view.mode if monitor else None)
    except LastgoodError:
        return Keep()


def _end(case: Case, record: Record) -> int | None:
    """The run's last step: of the arguments, else as the checkpoint has it; None if nothing says."""
    s = case.settings
    assert s is not None
    per_epoch = steps_per_epoch(case, record)
    told = total_steps(s.max_steps, s.num_train_epochs, per_epoch) if s.num_train_epochs < LONGEST else None
    saved = case.disk.state(record).get("max_steps") if case.disk is not None else None
    if type(saved) is int and 0 < saved < LONGEST and (case.recorded or told is None):
        return saved
    return told if told is not None and told < LONGEST else None


def steps_per_epoch(case: Case, record: Record) -> int | None:
    """By the checkpoint's own count of epochs; None where it has none."""
    assert case.disk is not None
    state = case.disk.state(record)
    epoch, step = finite(state.get("epoch")), state.get("global_step")
    if epoch is None or not 0 < epoch < LONGEST or type(step) is not int or not 0 < step < LONGEST:
        return None
    return max(1, round(step / epoch))


def _points(case: Case, record: Record, end: int | None) -> range:
    """The steps of the saves to come; only the next one where nobody knows how long the run is."""
    s = case.settings
    assert s is not None
    if s.save_strategy == "epoch":
        every = steps_per_epoch(case, record) or 0
    elif s.save_steps < 1 and end is None:
        every = 0
    else:
        every = absolute_steps(s.save_steps, end or 1) if s.save_steps < LONGEST else 0
    if every <= 0:
        return range(0)
    first = (record.step // every + 1) * every
    if end is None:
        return range(first, first + 1)
    # The last save is at the end, on the beat or not.
    return range(first, end + every, every) if end > record.step else range(0)
