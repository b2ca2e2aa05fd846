"""Weights and losses that aren't numbers, and optimizers that have nothing to go on with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.log import Raised
from lastgood.doctor.named import resumes
from lastgood.doctor.rule import Sight
from lastgood.doctor.rules.resume_disk import disk_of
from lastgood.format import archive, finite
from lastgood.format.finite import Bad, Stretch
from lastgood.model import TRAINERS, Record
from lastgood.model import finite as number

BUDGET = 64 << 20
"""Bytes of weights that are looked at in a checkpoint, unless everything is to be."""
BACK = 5
"""Older checkpoints that are looked at for one with finite weights."""
ROWS = 3
"""So many gradients in a row that aren't numbers are more than a loss scale that is being found."""
_LOSS = re.compile(r"'(?:train_)?loss': '?([^,'}\s]+)")


def diverged(case: Case) -> Iterator[Sight]:
    """CKC011, on disk: the newest checkpoint's weights, its log, its optimizer."""
    disk = disk_of(case)
    own = [r for r in disk.records if r.ours and r.current]
    chosen = own if disk.full else own[-1:]
    for record in reversed(chosen):
        bad, looked_at = weights(disk, record)
        rows = _log(disk, record)
        if bad or rows:
            yield _bad(disk, record, bad, looked_at, rows)
        yield from _empty(disk, record)


def _bad(disk: Disk, record: Record, bad: list[Bad], looked_at: int, rows: str) -> Sight:
    good, evidence = _before(disk, record)
    names = [f"{item.name}: {item.count} of {item.looked_at} numbers, the first is {item.first}" for item in bad[:3]]
    if len(bad) > 3:
        names.append(f"and {len(bad) - 3} more tensors")
    saw = f"the weights of {record.name} hold NaN or infinity in {len(bad)} tensors" if bad else rows
    if not bad:
        evidence = (f"its weights are finite as far as {looked_at} bytes of them were looked at", *evidence)
    fix = (resumes(disk, good.name),) if good is not None else ()
    return Sight(
        saw=saw,
        where=record.name,
        evidence=(*names, *((rows,) if rows and bad else ()), *evidence),
        fix=(*fix, "a lower learning rate, max_grad_norm=1.0, bf16 in place of fp16, and a look at the data"),
        severity="error" if bad else "warning",
    )


def _before(disk: Disk, record: Record) -> tuple[Record | None, tuple[str, ...]]:
    """(the newest older checkpoint that is finite, what was looked at)."""
    older = [r for r in disk.records if r.ours and r.current and (r.step, r.seq) < (record.step, record.seq)]
    for other in list(reversed(older))[: None if disk.full else BACK]:
        if other.state == "full" and not weights(disk, other)[0] and not _log(disk, other):
            return other, (f"{other.name} is finite",)
    return None, ("no older checkpoint that was looked at is finite",) if older else ("there is no older checkpoint",)


def weights(disk: Disk, record: Record) -> tuple[list[Bad], int]:
    """(tensors of the model that aren't finite, bytes that were looked at)."""
    budget = None if disk.full else BUDGET
    found, read = list[Bad](), 0
    folder = disk.path(record)
    for name in disk.files(record):
        path = folder / name if folder.is_dir() else folder
        stretches = _stretches(disk, record, name)
        if not stretches or (budget is not None and read >= budget):
            continue
        try:
            bad, done = finite.look(path, stretches, None if budget is None else budget - read)
        except OSError:
            continue
        found, read = found + bad, read + done
    return found, read


def _stretches(disk: Disk, record: Record, name: str) -> list[Stretch]:
    if name.endswith(".safetensors") and not name.startswith("optimizer"):
        return [Stretch(key, slot.dtype, slot.begin, slot.end) for key, slot in disk.header(record, name).items()]
    alone = name.endswith(".ckpt")
    if not alone and not (name.startswith(("pytorch_model", "adapter_model")) and name.endswith(".bin")):
        return []
    tree = archive_of(disk, record, name)
    tree = tree.get("state_dict") if alone and isinstance(tree, dict) else tree
    refs = list(archive.tensors(tree))[:100_000]
    return [Stretch(key, ref.dtype, ref.begin, ref.begin + ref.bytes) for key, ref in refs if ref.contiguous]


def archive_of(disk: Disk, record: Record, name: str) -> Any:
    """The tree in a torch archive of a checkpoint, which may be that file itself."""
    folder = disk.path(record)
    if folder.is_dir():
        return disk.pickled(record, name)
    return disk.pickled(record, "") if folder.name == name else None


def _log(disk: Disk, record: Record) -> str:
    """What the run's log says, if it ends in what isn't a number; "" else. A single one is a batch that went wrong."""
    rows = disk.state(record).get("log_history")
    known = [r for r in rows if isinstance(r, dict) and type(r.get("step")) is int] if isinstance(rows, list) else []
    for name, count in (("loss", 1), ("grad_norm", ROWS)):
        values = [(row["step"], row[name]) for row in known if isinstance(row.get(name), (int, float, str))]
        last = values[-count:]
        if len(last) == count and all(_strange(value) for _, value in last):
            first = values[-1][0]
            for step, value in reversed(values):
                if not _strange(value):
                    break
                first = step
            return f"{name} is {last[-1][1]} from step {first} on"
    return ""


def _strange(value: object) -> bool:
    if isinstance(value, str):
        return value.lower().lstrip("+-") in ("nan", "inf", "infinity")
    return isinstance(value, float) and number(value) is None


def _empty(disk: Disk, record: Record) -> Iterator[Sight]:
    """An optimizer that keeps moments, and has none after so many steps."""
    name = next((n for n in ("optimizer.pt", "optimizer.bin") if n in disk.files(record)), None)
    if name is None or record.layout not in TRAINERS or record.step < 1:
        return
    tree = disk.pickled(record, name)
    groups = tree.get("param_groups") if isinstance(tree, dict) else None
    state = tree.get("state") if isinstance(tree, dict) else None
    if state != {} or not isinstance(groups, list):
        return
    keeps = [g for g in groups if isinstance(g, dict) and ("betas" in g or "beta1" in g or bool(g.get("momentum")))]
    count = sum(len(g["params"]) for g in keeps if isinstance(g.get("params"), list))
    if count:
        yield Sight(
            saw=f"{name} of {record.name} names {count} parameters and holds no state of any",
            where=record.name,
            means="no step of the optimizer ever reached these parameters: nothing was trained, or every step was"
            " skipped because its gradients weren't finite",
            fix=("look at requires_grad of the parameters, and at grad_norm in the log",),
            severity="warning",
        )


def in_log(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKC011, in a log: the loss at its end, or sampling from logits that aren't numbers."""
    line = case.log.line_of(match) if case.log is not None else ""
    if "probability tensor" not in match.group():
        losses = _LOSS.findall(match.string)
        if not losses or not _strange(losses[-1]):
            return
    disk = case.disk
    last = next((r for r in reversed(disk.records) if r.ours and r.current), None) if disk is not None else None
    if disk is None or last is None:
        yield Sight(saw=line, severity="warning")
        return
    bad, looked_at = weights(disk, last)
    if bad:
        yield _bad(disk, last, bad, looked_at, line)
        return
    yield Sight(
        saw=line,
        evidence=(f"the weights of {last.name}, the newest, are finite ({looked_at} bytes looked at)",),
        fix=(resumes(disk, last.name), "a lower learning rate, max_grad_norm=1.0, and a look at the data"),
        severity="warning",
    )
