"""What a log says about a resume that failed, and what is really at the path that it names."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.finding import Repair
from lastgood.doctor.log import Raised
from lastgood.doctor.named import Place, around, holds, instead, judge, locate, offered, resumes, spoken_of
from lastgood.doctor.rule import Sight
from lastgood.doctor.rules.resume_disk import aside, broken_json
from lastgood.layouts.progress import STATE
from lastgood.repo.layout import step_of

CHECKPOINT = re.compile(r"checkpoint[-_]\d+|\.ckpt$|global_step\d+")
_OURS = re.compile(r"\.distcp$|\.metadata$|tmp-checkpoint")
"""Missing files that other rules know more about."""


LONGEST = 1000
"""Characters of a path that a message names."""


def _said(match: re.Match[str]) -> str:
    return next((group for group in match.groups() if group), "").strip()[:LONGEST]


def _line(case: Case, match: re.Match[str]) -> str:
    return case.log.line_of(match) if case.log is not None else ""


def none_there(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR001: an output directory without checkpoints."""
    said = _said(match)
    if "No valid checkpoint" not in match.group() and not raised.passed("get_last_checkpoint"):
        return
    place = locate(case, said)
    near = [place.disk] if place.disk is not None and holds(place.disk.root) else around(place.path)
    if near and _same(near[0].root, place.path):
        saw = f"{said} has checkpoints now: the log is of before, or of another machine or working directory"
    elif step_of(place.path.name) is not None:
        saw = f"{said} is a checkpoint itself: output_dir has to be the directory that it lies in"
    elif not os.path.isdir(place.path):
        saw = f"there is no directory {said}" + _from(said)
    else:
        saw = f"{said} holds no checkpoint-N directory"
    evidence = [_line(case, match)]
    for disk in near:
        evidence += offered(disk)
    fix = [resumes(disk, disk.good.name) for disk in near if disk.good is not None][:3]
    first = "on the first launch of a run leave resume_from_checkpoint out"
    auto = "trainer = lastgood.manage(trainer); trainer.train(resume_from_checkpoint='auto'): for every launch"
    yield Sight(saw=saw, evidence=tuple(evidence), fix=(*fix, *(() if fix else (first,)), auto))


def _same(one: Path, other: Path) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def _from(said: str) -> str:
    return "" if os.path.isabs(said) else " (it was looked up from the directory that the script was started in)"


def not_found(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR002: a path that isn't a checkpoint; which of the many reasons it is."""
    said = _said(match)
    text = match.group()
    if _OURS.search(said) or said.endswith(STATE):
        return
    missing = text.startswith("FileNotFoundError")
    if missing and (raised.passed("get_last_checkpoint", "samefile", "rename", "replace", "rmtree", "_rmtree_safe_fd")):
        return
    place = locate(case, said)
    clear = "Can't find a valid checkpoint" in text or "[deepspeed]" in text or "Checkpoint file not found" in text
    if not clear and not CHECKPOINT.search(said) and judge(place.path)[0] != "run":
        return
    if missing and step_of(Path(said).name) is None and step_of(Path(said).parent.name) is not None:
        yield from _part(case, match, said)
        return
    sharded = "[deepspeed]" in text or raised.passed("deepspeed_load_checkpoint")
    yield _explained(case, match, place, sharded=sharded)


def _part(case: Case, match: re.Match[str], said: str) -> Iterator[Sight]:
    """A file inside a checkpoint."""
    place = locate(case, str(Path(said).parent))
    kind, there = judge(place.path)
    name = Path(said).name
    lies = os.path.exists(place.path / name)
    saw = f"{place.path.name} has no {name}" if kind != "absent" else f"there is no {said}{_from(said)}"
    yield Sight(
        saw=saw if not lies else f"{name} is in {place.path.name} now: another machine, or another working directory",
        evidence=(_line(case, match), there, *offered(place.disk)),
        fix=instead(place.disk),
        repair=_aside(case, place, kind),
    )


def stateless(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR003: no trainer_state.json at a path."""
    said = str(Path(_said(match)).parent)
    place = locate(case, said)
    yield _explained(case, match, place, state=True)


def _explained(case: Case, match: re.Match[str], place: Place, *, state: bool = False, sharded: bool = False) -> Sight:
    said, disk = place.said, place.disk
    kind, there = judge(place.path)
    saw, fix, cause = f"{said}: {there}", instead(disk), ""
    whole = os.path.abspath(place.path)
    if kind == "absent":
        step = f"checkpoint-{said}" if said.isdigit() else ""
        if step:
            saw = f"{said} is a step, and the path of a checkpoint is wanted"
            known = disk is not None and any(r.name == step and r.ours for r in disk.records)
            fix = (resumes(disk, step),) if known and disk is not None else fix
        else:
            saw = f"there is no {said}{_from(said)}"
    elif kind == "run":
        saw = f"{said} is the run directory, and one of the checkpoints in it is wanted"
        cause = f"{STATE} and the weights are looked for in {said} itself"
        if state:
            cause += "; a final model that was saved there gets it past the first check"
        fix = (*fix, "trainer.train(resume_from_checkpoint=True): the highest number in output_dir")
    elif kind == "file":
        inside = step_of(place.path.parent.name) is not None
        fix = (f"trainer.train(resume_from_checkpoint={os.path.dirname(whole)!r})",) if inside else fix
    elif kind == "empty":
        saw = f"{said} is empty: the save was interrupted as it began"
    elif kind == "cut off":
        saw = f"{said} has no {STATE}, which is written last: its save was interrupted"
    elif kind == "model":
        saw = f"{said} holds a model alone: an export (save_model, save_pretrained), or a save that was cut off early"
        cause = f"its weights can be loaded: from_pretrained({whole!r}); optimizer and schedule would start anew"
    elif kind == "no weights":
        saw = f"{said} holds no weights that a Trainer takes"
    elif kind == "adapters":
        version = case.versions.get("transformers")
        saw = f"{said} keeps its adapters in folders of their own, where older transformers don't look"
        cause = f"transformers {version} is installed here" if version else ""
        fix = ("pip install -U transformers", *fix)
    elif kind == "other tool":
        fix = (f"lastgood import {shlex.quote(str(place.path))} NEW_RUN", *fix)
    elif sharded:
        saw = f"{said} holds no global_step* directory that DeepSpeed could load: only the exported weights are there"
        fix = (*fix, f"start from the weights alone: from_pretrained({whole!r})")
    elif kind in ("whole", "damaged"):
        saw = f"{said} is there now, {STATE} and weights: the log is of before, or of another machine or directory"
        fix = (resumes(disk, place.path.name) if disk is not None else f"resume_from_checkpoint={whole!r}", *fix)
    evidence = [_line(case, match), *([there] if kind not in ("absent", "run") else []), cause, *offered(disk)]
    return Sight(
        saw=saw, evidence=tuple(filter(None, evidence)), fix=tuple(dict.fromkeys(fix)), repair=_aside(case, place, kind)
    )


def _aside(case: Case, place: Place, kind: str) -> Repair | None:
    if case.disk is None or place.disk is not case.disk or kind not in ("empty", "cut off", "no weights", "damaged"):
        return None
    record = next((r for r in case.disk.records if case.disk.path(r) == place.path), None)
    return aside(case, record) if record is not None and record.state == "incomplete" else None


_READERS = ("load_from_json", "from_json_file", "load_sharded_checkpoint", "_dict_from_json_file")


def not_json(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR004: a parser's message without the name of the file; the disk says which it is."""
    named = next((group for group in match.groups() if group), "")
    through = raised.passed(*_READERS)
    if named and step_of(Path(named).parent.name) is None and not through:
        return
    if raised.frames and not through and not named:
        return
    disks = [case.disk] if case.disk is not None else [p.disk for p in spoken_of(case) if p.disk is not None][:1]
    broken = [(disk, item) for disk in disks for item in broken_json(disk)]
    if raised.passed("load_from_json"):
        broken = [(disk, item) for disk, item in broken if item[1] == STATE] or broken
    if not broken and not through and not named:
        return
    disk = disks[0] if disks else None
    if broken:
        saw = "; ".join(f"{record.name}/{name} {why}" for _, (record, name, why) in broken[:3])
    else:
        saw = f"{named or (STATE if raised.passed('load_from_json') else 'a JSON file')} of the checkpoint isn't JSON"
    repair = aside(case, broken[-1][1][0]) if case.disk is not None and len(broken) == 1 else None
    yield Sight(saw=saw, evidence=(_line(case, match), *offered(disk)), fix=instead(disk), repair=repair)


def beyond(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR008: resumed at, or after, the last step."""
    found = list(re.finditer(match.re, match.string))[-1]
    end, step = (int((found.group(name) or "0").replace(",", "")) for name in ("end", "step"))
    if step >= end > 0:
        yield Sight(saw=f"the run has {end} steps, and was resumed at step {step}", evidence=(_line(case, found),))


def as_a_model(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR009: weights loaded from a checkpoint, then a start at step 0."""
    text = match.string
    start = text.find("***** Running training *****", match.end())
    words = ("Resuming training from checkpoint", "Continuing training from", "Loading model from")
    if start < 0 or any(word in text for word in words):
        return
    path = match.group(1)
    place = locate(case, path)
    yield Sight(
        saw=f"the model was loaded from {path}, and training started at step 0",
        evidence=offered(place.disk),
        fix=(f"trainer.train(resume_from_checkpoint={path!r})",),
        severity="warning" if place.disk is not None and place.disk is case.disk else "info",
    )


def lost_best(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR010: the path of the best checkpoint, as a message has it."""
    path = _said(match)
    if match.group().startswith("FileNotFoundError") and not raised.passed("samefile"):
        return
    if "is not in list" in match.group() and step_of(Path(path).name) is None:
        return
    place = locate(case, path)
    here = os.path.isdir(place.path)
    evidence = [_line(case, match)]
    if here and str(place.path) != path:
        evidence.append(f"{place.path.name} lies in {place.path.parent}: the run was moved or renamed")
    elif not here:
        evidence.append(f"there is no {Path(path).name} on this machine" + (" either" if case.disk else ""))
    yield Sight(saw=f"the best checkpoint is recorded as {path}", evidence=tuple(evidence))


def moved_callback(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR011: Lightning's dirpath of then and now."""
    old, new = (word.strip("'\"") for word in match.groups())
    evidence = [f"{folder}: {_ckpts(Path(folder))}" for folder in (old, new)]
    yield Sight(
        saw=f"dirpath was {old} and is {new}",
        evidence=tuple(evidence),
        fix=(f"ModelCheckpoint(dirpath={old!r}, ...): where the run began", f"or move the .ckpt files to {new} first"),
    )


def _ckpts(folder: Path) -> str:
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".ckpt")]
    except (OSError, ValueError):
        return "not on this machine"
    return f"{len(names)} .ckpt files" + (f", {', '.join(sorted(names)[:3])}" if names else "")


def no_last(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR012: there may be checkpoints, but none that counts as the last."""
    disk = case.disk
    yield Sight(
        saw=_line(case, match),
        evidence=offered(disk),
        fix=(
            *((resumes(disk, disk.good.name),) if disk is not None and disk.good is not None else ()),
            "ModelCheckpoint(save_last=True, ...)",
        ),
    )


def no_tag(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR013: the file that names DeepSpeed's newest shards."""
    folder = locate(case, str(Path(match.group(1)).parent)).path
    tags = sorted((n for n in _listed(folder) if n.startswith("global_step")), key=lambda n: (len(n), n))
    there = f"{folder}: {', '.join(tags[-3:])}" if tags else f"there is no global_step* in {folder} on this machine"
    fix = (
        (f"printf {shlex.quote(tags[-1])} > {shlex.quote(str(folder / 'latest'))}  # if all its shards are there",)
        if tags
        else ()
    )
    yield Sight(saw=_line(case, match), evidence=(there,), fix=(*fix, *instead(case.disk)))


def _listed(folder: Path) -> Sequence[str]:
    try:
        return os.listdir(folder)
    except (OSError, ValueError):
        return ()


def preempted(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKR015: SIGTERM was answered by a save, and the script went on as if training were over."""
    disk: Disk | None = case.disk
    evidence = []
    if disk is not None and disk.newest is not None:
        end = disk.state(disk.newest).get("max_steps")
        if isinstance(end, int) and end > 0:
            if disk.newest.step >= end:
                return
            evidence.append(f"the newest checkpoint is of step {disk.newest.step} of {end}")
    yield Sight(
        saw=_line(case, match),
        evidence=tuple(evidence),
        fix=() if disk is None or disk.good is None else (resumes(disk, disk.good.name),),
    )
