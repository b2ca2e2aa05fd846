"""What has to hold of a run directory after anything went wrong in it. Each breach is named by its invariant."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastgood.errors import LastgoodError, NoCheckpoint
from lastgood.format import tensors
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.repo import pins, poison, verify
from lastgood.repo.layout import HIDDEN, hidden
from lastgood.repo.read import records
from lastgood.view import look

from faults.operations import Operation
from faults.small import content, manager, save

_ID = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Known:
    """A run as it was: id -> step of its checkpoints, what isn't ours, and what was said about checkpoints.

    newest: the step that a resume goes on from, 0 if there is none.
    """

    ours: Mapping[str, int]
    newest: int
    strangers: Mapping[str, bytes]
    said: Mapping[str, Any]

    @classmethod
    def of(cls, root: Path) -> Known:
        """Read from a run that nothing happened to."""
        found = records(root)
        theirs = {r.name for r in found if not r.ours or r.manifest is None}
        return cls(
            ours={r.id: r.step for r in found if r.ours and r.state != "incomplete"},
            newest=max(((r.seq, r.step) for r in found if r.good and r.state == "full"), default=(0, 0))[1],
            strangers={
                name: data
                for name, data in tree(root).items()
                if (name.split("/")[0] in theirs or not name.startswith(("checkpoint-", HIDDEN)) or "-best" in name)
                and not name.endswith("lastgood.json")
            },
            said=said(root, found),
        )


def said(root: Path, found: tuple[Record, ...]) -> dict[str, Any]:
    """Names, notes, late metrics and marks, by kind and checkpoint."""
    return {
        "pins": pins.read(root),
        "notes": pins.read_notes(root),
        "marks": poison.read(root),
        **{f"metrics of {record.id}": dict(record.metrics) for record in found if record.ours},
    }


def tree(root: Path) -> dict[str, bytes]:
    """Every file below, by its relative name."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def verdict(
    root: Path,
    done: Operation,
    before: Known,
    after: Known,
    *,
    returned: bool,
    power: bool = False,
    floor: int | None = None,
) -> str:
    """What is wrong, in words; "" if nothing. The run is opened, cleaned up and saved to on the way.

    before, after: the run without this operation, and with all of it. returned: the operation said that it was done.
    floor: the step that a resume finds at least, where more is known than of the operation.
    power: the disk may have lost what was being deleted, so that damage is allowed there if it is detected.
    """
    try:
        return (
            _reading(root, done, before, after, returned=returned, power=power)
            or _recovering(root, done.floor if floor is None else floor)
            or _reading(root, done, before, after, returned=False, power=power)
            or _going_on(root)
        )
    except Exception as error:
        return f"I1: {type(error).__name__}: {error}"
    finally:
        gc.collect()  # a manager that an exception left behind still has the lock


def _reading(root: Path, done: Operation, before: Known, after: Known, *, returned: bool, power: bool) -> str:
    was = tree(root)
    found = records(root)
    view = look(root)
    list(view.records)
    if tree(root) != was:
        return "I6: looking changed something"
    good = set()
    for record in found:
        if not record.ours and record.state != "incomplete":
            continue
        faults = verify.problems(root, record, full=True) if record.state != "incomplete" else (record.problem,)
        if faults and not (power and record.step in done.may_go):
            return f"I1: {record.name} is there and damaged: {faults[0]}"
        if not faults:
            good.add(record.id)
            if wrong := _mixed(root, record):
                return wrong
    lost = sorted(step for id, step in before.ours.items() if id not in good and step not in done.may_go)
    if lost:
        return f"I3: the checkpoints of steps {lost} are gone"
    for name, data in before.strangers.items():
        if was.get(name) != data and not _moved(name, done):
            return f"I11: {name} isn't ours and isn't what it was"
    lasting = done.done if not power or done.lasting is None else done.lasting
    if returned and not lasting(root):
        return "I2: it returned, and what it did isn't there"
    return _told(said(root, found), before, after)


def _mixed(root: Path, record: Record) -> str:
    """Weights that are whole but belong to another step."""
    path = root / record.name / "model.safetensors"
    if record.manifest is None or record.manifest.layout or not path.exists():
        return ""
    held = bytes(tensors.load(path)["w"].data)
    return "" if held == content(record.step) else f"I1: {record.name} holds the weights of another step"


def _moved(name: str, done: Operation) -> bool:
    """Adopted checkpoints are the run's from then on: pruning may move them, as any other."""
    head = name.split("/", maxsplit=1)[0]
    return head.startswith("checkpoint-") and head.split("-")[1].isdigit() and int(head.split("-")[1]) in done.may_go


def _told(now: Mapping[str, Any], before: Known, after: Known) -> str:
    """Each of these is as it was before or as it is afterwards, never anything else. New checkpoints have new ids."""
    for kind in before.said:
        if kind in now and not any(
            _of(before, now[kind]) == _of(before, one.said.get(kind)) for one in (before, after)
        ):
            return f"I3: the {kind} are neither what they were nor what they were to be: {now[kind]}"
    return ""


def _of(before: Known, value: Any) -> Any:
    """Without what is said of checkpoints that weren't there before."""
    if isinstance(value, dict):
        return {name: entry for name, entry in value.items() if name in before.ours or not _ID.fullmatch(name)}
    return value


def _recovering(root: Path, floor: int) -> str:
    made = Manager(root=root, on_error="raise")
    made.open()
    try:
        step = made.find("last").record.step
    except NoCheckpoint:
        step = 0
    finally:
        made.close()
    if step < floor:
        return f"I1: a resume goes on from step {step}, there was {floor}"
    # Opening once more changes nothing of note: the journal alone grows, the lock's card comes and goes.
    was = _settled(root)
    made.open()
    made.close()
    return "" if _settled(root) == was else "I4: recovering twice isn't recovering once"


def _settled(root: Path) -> dict[str, bytes]:
    moving = (f"{HIDDEN}/journal.jsonl", f"{HIDDEN}/lock")
    return {name: data for name, data in tree(root).items() if not name.startswith(moving)}


def _going_on(root: Path) -> str:
    made = manager(root)
    try:
        if save(made, 90) is None or made.find("last").record.step != 90:
            return "I3: the next save needs cleaning by hand"
    except LastgoodError as error:
        return f"I3: the next save fails: {error}"
    finally:
        made.close()
    left = [path for place in ("tmp", "trash") for path in hidden(root, place).glob("*")]
    left += [path for path in root.glob(".*") if path.name != HIDDEN]
    return f"I13: {left[0].name} is left for good" if left else ""
