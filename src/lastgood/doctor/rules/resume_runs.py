"""Whose checkpoints lie in a run directory, and what the settings of a launch make of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.named import resumes
from lastgood.doctor.rule import Sight
from lastgood.doctor.rules.resume_disk import disk_of
from lastgood.layouts.progress import STATE
from lastgood.model import TRAINERS, Record, finite
from lastgood.repo.layout import step_of

LOOKED_AT = 3
"""So many of the highest steps are compared, with the one that was written last."""
ROWS = 100_000


def foreign(case: Case) -> Iterator[Sight]:
    """CKR007, before the first step: directories that carry another run's manifest."""
    names = case.settings.foreign if case.settings is not None else ()
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield Sight(
            saw=f"output_dir holds checkpoints of another run: {', '.join(names[:3])}{more}",
            means="they are never resumed from, counted or deleted here",
            fix=("a fresh output_dir for each run",),
            severity="warning",
        )


def strangers(case: Case) -> Iterator[Sight]:
    """CKR007, on disk."""
    disk = disk_of(case)
    others = [r for r in disk.records if r.state == "foreign" and r.manifest is not None]
    if others and case.settings is None:
        names = ", ".join(r.name for r in others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        yield Sight(
            saw=f"the directory holds checkpoints of another run: {names}",
            where=others[0].name,
            means="they are never resumed from, counted or deleted here",
            fix=("a fresh output_dir for each run",),
            severity="warning",
        )
    yield from _renamed(disk)
    if not any(r.id and r.ours for r in disk.records):  # what lies beyond a managed run is CKR017
        yield from _mixed(disk)


def _renamed(disk: Disk) -> Iterator[Sight]:
    for record in disk.records:
        if record.state == "incomplete" and not record.id and f"{STATE} is of step" in record.problem:
            step = disk.state(record).get("global_step")
            yield Sight(
                saw=f"{record.name} holds the state of step {step}: it was renamed, or copied from elsewhere",
                where=record.name,
                means=f"a Trainer that looks for the newest takes it for step {record.step}, and goes on from {step}",
                fix=(f"mv -n {_quoted(disk.path(record))} {_quoted(disk.root / f'checkpoint-{step}')}",),
            )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _mixed(disk: Disk) -> Iterator[Sight]:
    """Logs that don't continue each other: in a run, each checkpoint's log begins with that of the one before."""
    own = [r for r in disk.records if _stock(r)]
    if len(own) < 2:
        return
    last = max(own, key=lambda r: r.manifest.created if r.manifest is not None else 0.0)
    chosen = {r.name: r for r in (*sorted(own, key=lambda r: r.step)[-LOOKED_AT:], last)}
    groups: list[list[Record]] = []
    logs = {name: _rows(disk, record) for name, record in chosen.items()}
    for record in sorted(chosen.values(), key=lambda r: r.step):
        for group in groups:
            before = logs[group[-1].name]
            if logs[record.name][: len(before)] == before:
                group.append(record)
                break
        else:
            groups.append([record])
    highest = max(own, key=lambda r: r.step)
    if len(groups) > 1:
        yield from _apart(disk, groups, highest, last)
    elif highest.step > last.step and not any(logs.values()):
        yield from _beyond(disk, highest, last)


def _apart(disk: Disk, groups: Sequence[Sequence[Record]], highest: Record, last: Record) -> Iterator[Sight]:
    listing = "; ".join(", ".join(record.name for record in group) for group in groups)
    stale = highest.name != last.name and _later(last, highest)
    ends = disk.state(highest).get("max_steps"), disk.state(last).get("max_steps")
    evidence = [f"by their logs they belong apart: {listing}"]
    if stale:
        evidence.append(f"{last.name} was written after {highest.name}")
    if ends[0] != ends[1] and all(isinstance(end, int) for end in ends):
        evidence.append(f"{highest.name} is of a run of {ends[0]} steps, {last.name} of one of {ends[1]}")
    yield Sight(
        saw=f"{highest.name} doesn't continue what the other checkpoints here began",
        where=highest.name,
        evidence=tuple(evidence),
        means=f"resume_from_checkpoint=True takes {highest.name}, because it has the highest number: "
        + ("the model of another run, or of an attempt that was given up" if stale else "of two runs that lie here"),
        fix=(
            resumes(disk, last.name),
            f"move {highest.name} out of {disk.root}, and give each run an output_dir of its own"
            if stale
            else "give each run an output_dir of its own",
        ),
        severity="error" if stale else "warning",
    )


def _beyond(disk: Disk, highest: Record, last: Record) -> Iterator[Sight]:
    """Without rows in their logs only the length of the run tells."""
    end = disk.state(last).get("max_steps")
    if isinstance(end, int) and 0 < end < highest.step and _later(last, highest):
        yield Sight(
            saw=f"{highest.name} lies beyond the end of the run that wrote {last.name} ({end} steps), and is older",
            where=highest.name,
            means=f"resume_from_checkpoint=True takes {highest.name}, and training ends at once",
            fix=(resumes(disk, last.name), f"move {highest.name} out of {disk.root}"),
        )


def _stock(record: Record) -> bool:
    return record.layout in TRAINERS and record.ours and step_of(record.name) is not None


def _later(one: Record, other: Record) -> bool:
    """Whether it was written later, by more than what a copy of both would take."""
    return bool(one.manifest and other.manifest and one.manifest.created > other.manifest.created)


def _rows(disk: Disk, record: Record) -> list[str]:
    rows = disk.state(record).get("log_history")
    try:
        return [json.dumps(row, sort_keys=True) for row in rows[:ROWS]] if isinstance(rows, list) else []
    except (RecursionError, ValueError, TypeError):
        return []


def finished(case: Case) -> Iterator[Sight]:
    """CKR008: the given length of the run is not beyond the checkpoint that would be resumed from."""
    disk, given = case.disk, case.arguments
    if disk is None or case.recorded or disk.good is None or disk.good.layout not in ("", *TRAINERS):
        return
    end = finite(given.get("max_steps"))
    step, asked = disk.good.step, given.get("resume_from_checkpoint")
    if end is None or end <= 0 or step < end or (step == end and not asked):
        return
    yield Sight(saw=f"max_steps={end:g}, and {disk.good.name} is at step {step}", where=disk.good.name)


def ignored(case: Case) -> Iterator[Sight]:
    """CKR005: the argument is set; whether anything reads it is up to the script."""
    value = case.arguments.get("resume_from_checkpoint")
    if not value or str(value).lower() in ("false", "none", "null"):
        return
    saw = f"resume_from_checkpoint={str(value)[:200]!r} among the training arguments"
    disk = case.disk
    if not case.recorded:
        started = case.log is not None and "***** Running training *****" in case.log.text
        if started and case.log is not None and not _goes_on(case.log.text):
            yield Sight(saw=f"{saw}, and the log shows a start at step 0", severity="error")
        elif case.log is None:
            yield Sight(saw=saw)
        return
    step = step_of(Path(str(value)).name)
    if disk is None or disk.newest is None or step is None or disk.newest.layout not in TRAINERS:
        return
    if 0 <= disk.newest.step <= step:
        yield Sight(
            saw=f"{disk.newest.name} was saved by a run with resume_from_checkpoint={str(value)[:200]!r}",
            where=disk.newest.name,
            evidence=(f"a run that really went on from step {step} saves later steps only",),
            severity="error",
            means="the run started at step 0",
        )


def _goes_on(text: str) -> bool:
    return any(word in text for word in ("Resuming training from checkpoint", "Continuing training from"))


def weights_alone(case: Case) -> Iterator[Sight]:
    """CKR016: the setting itself."""
    s = case.settings
    if s is not None and s.save_only_model and s.save_strategy != "no":
        yield Sight(
            saw="save_only_model=True",
            means="checkpoints hold the weights alone: none of them can be resumed from",
            fix=("save_only_model=False, and keep=lastgood.Keep(last=..., full=1) to save space",),
        )


def as_a_model(case: Case) -> Iterator[Sight]:
    """CKR009: a checkpoint is given as the model to start from."""
    if case.recorded or case.arguments.get("resume_from_checkpoint"):
        return
    for name in ("model_name_or_path", "model_name", "model", "pretrained_model_name_or_path", "base_model"):
        value: Any = case.arguments.get(name)
        if isinstance(value, str) and step_of(Path(value).name) is not None:
            output = case.arguments.get("output_dir")
            same = isinstance(output, str) and Path(output) == Path(value).parent
            yield Sight(
                saw=f"{name}={value[:200]!r} is a checkpoint" + (" of this run" if same else ""),
                fix=(
                    f"{name}= the model that the run began with",
                    f"trainer.train(resume_from_checkpoint={value[:300]!r})",
                ),
                severity="warning" if same else "info",  # the next stage of a training begins like that, too
            )


def returns_normally(case: Case) -> Iterator[Sight]:
    """CKR015: the setting."""
    if case.arguments.get("enable_jit_checkpoint") is True and not case.recorded:
        managed = case.settings is not None and case.settings.managed
        if not managed:
            yield Sight(saw="enable_jit_checkpoint=True", severity="info")


def from_weights(case: Case) -> Iterator[Sight]:
    """CKR009: older transformers write into config.json which directory the weights came from."""
    disk = disk_of(case)
    record = disk.newest
    if record is None or record.layout not in TRAINERS:
        return
    config = disk.json(record, "config.json")
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    if not isinstance(name, str) or step_of(Path(name).name) is None:
        return
    start = step_of(Path(name).name) or 0
    if Path(name).parent.name in (disk.root.name, disk.root.absolute().name) and record.step < start:
        yield Sight(
            saw=f"{record.name} was trained from the weights of {Path(name).name} of this run, from step 0 again",
            where=record.name,
            evidence=(f"config.json: _name_or_path={name[:200]!r}",),
        )
