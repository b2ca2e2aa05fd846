"""What differs between the settings of two stretches of a run, and what comes of it. Reads no tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.divergence import relived
from lastgood.doctor.log import Raised
from lastgood.doctor.rule import Sight
from lastgood.doctor.rules.distributed_disk import RANDOM, ranks
from lastgood.doctor.rules.space_disk import LONGEST, steps_per_epoch
from lastgood.model import TRAINERS, Record, finite
from lastgood.repo import trail
from lastgood.schedule import total_steps

CLOSE = 1e-3
"""Share by which a loss may differ: kernels that aren't deterministic stay far below it at the first step."""
Arguments = Mapping[str, object]
Difference = tuple[str, object, object]
"""(name, saved, now)."""


def given(case: Case) -> tuple[Record, Arguments, Arguments] | None:
    """(the checkpoint that a resume would take, its arguments, those of the run to come), if those were given."""
    disk = case.disk
    if disk is None or case.recorded or not case.arguments:
        return None
    record = disk.good or disk.newest
    saved = disk.arguments(record) if record is not None else {}
    return (record, saved, case.arguments) if record is not None and saved else None


def neighbours(case: Case) -> Iterator[tuple[Record, Record]]:
    """Checkpoints of a stock Trainer that followed one another; what changed in a managed run its resume reported."""
    disk = case.disk
    if disk is None:
        return
    own = [r for r in disk.close if r.ours and r.current and r.layout in TRAINERS]
    yield from pairwise(sorted(own, key=lambda record: (record.step, record.seq)))


def differing(saved: Arguments, now: Arguments, names: Sequence[str]) -> list[Difference]:
    """Those that both have and that aren't the same; 1 and 1.0 are, and SchedulerType.LINEAR and linear."""
    return [
        (name, saved[name], now[name])
        for name in names
        if name in saved and name in now and _same(saved[name]) != _same(now[name])
    ]


def _same(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value.rpartition(".")[2].lower()
    number = finite(value)
    return str(value)[:1000] if number is None else number


def said(differences: Sequence[Difference]) -> str:
    """seed 42 -> 7, ..."""
    return ", ".join(f"{name} {_short(saved)} -> {_short(now)}" for name, saved, now in differences)


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def batches(case: Case, record: Record, saved: Arguments, now: Arguments) -> list[str]:
    """What another batch size or accumulation does to the epochs and to the place in the data."""
    assert case.disk is not None
    before, after = _batch(saved), _batch(now)
    if before is None or after is None or before == after:
        return []
    (size0, times0), (size1, times1) = before, after
    lines = [f"samples per step and process: {size0 * times0} -> {size1 * times1}"]
    per_epoch = steps_per_epoch(case, record)
    if per_epoch is not None:
        new = max(1, math.ceil(per_epoch * size0 * times0 / (size1 * times1)))
        lines.append(f"steps per epoch: about {per_epoch} -> {new}")
        place, skipped = record.step % per_epoch * size0 * times0, record.step % new * size1 * times1
        if new != per_epoch:
            lines.append(
                f"step {record.step} was in epoch {record.step / per_epoch:.2f} and counts as {record.step / new:.2f}:"
                f" {place} samples of the epoch were seen by each process, {skipped} are skipped"
            )
    return lines


def _batch(arguments: Arguments) -> tuple[int, int] | None:
    size, times = arguments.get("per_device_train_batch_size"), arguments.get("gradient_accumulation_steps", 1)
    numbers = [number for value in (size, times) if (number := _number(value)) is not None and 1 <= number < LONGEST]
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else None


def _number(value: object) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return finite(value)


def length(case: Case, record: Record, arguments: Arguments) -> int | None:
    """Steps of the whole run by these arguments; None if nothing tells."""
    steps, epochs = _number(arguments.get("max_steps")), _number(arguments.get("num_train_epochs"))
    if steps is not None and 0 < steps < LONGEST:
        return int(steps)
    if epochs is None or not 0 < epochs < 1 << 30:
        return None
    return total_steps(-1, epochs, steps_per_epoch(case, record))


def rates(case: Case, record: Record, saved: Arguments, now: Arguments) -> tuple[float, float] | None:
    """(learning rate at the next step, by the schedule as it was and as it is now); None for schedules not known here.

    As the Trainer does it: the optimizer's base rates are loaded, the schedule itself is that of the arguments now.
    """
    assert case.disk is not None
    state = case.disk.state(record)
    told = state.get("max_steps")
    total = told if type(told) is int and 0 < told < LONGEST else length(case, record, saved)
    base = _base(case.disk, record, saved)
    # The schedule is asked for the number of the steps that were taken: that rate is the next step's.
    before = _factor({**saved}, record.step, total)
    after = _factor({**saved, **now}, record.step, length(case, record, {**saved, **now}))
    return None if base is None or before is None or after is None else (base * before, base * after)


def _base(disk: Disk, record: Record, saved: Arguments) -> float | None:
    tree = disk.pickled(record, "scheduler.pt") if "scheduler.pt" in disk.files(record) else None
    bases = tree.get("base_lrs") if isinstance(tree, dict) else None
    first = bases[0] if isinstance(bases, list) and bases else None
    return finite(first) if finite(first) is not None else _number(saved.get("learning_rate"))


def _factor(arguments: Arguments, step: int, total: int | None) -> float | None:
    """Share of the base rate at a step: transformers.optimization, linear, cosine and constant schedules."""
    kind = _same(arguments.get("lr_scheduler_type", "linear"))
    ratio, told = _number(arguments.get("warmup_ratio")) or 0.0, _number(arguments.get("warmup_steps")) or 0.0
    if total is None or not 0 <= told < LONGEST or not 0 <= ratio <= 1:
        return None
    warmup = int(told) if told >= 1 else math.ceil(total * (told or ratio))
    if kind == "constant":
        return 1.0
    if kind not in ("linear", "cosine", "constant_with_warmup"):
        return None
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant_with_warmup":
        return 1.0
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    if arguments.get("lr_scheduler_kwargs"):
        return None
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def other_kind(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """torch's LambdaLR, handed the state of another class of schedule."""
    yield Sight(
        saw=f"{match.group()}: scheduler.pt holds the state of another kind of schedule",
        means="the resume stops: reduce_lr_on_plateau and the schedules that are a function of the step don't read each"
        " other's state",
        fix=("lr_scheduler_type= as it was saved (training_args.bin has it: lastgood show REV)",),
        severity="error",
    )


def facts(case: Case) -> Iterator[tuple[Record, list[Difference]]]:
    """(checkpoint, what of data and world was otherwise in the one before it), by manifests and random states."""
    disk = case.disk
    if disk is None:
        return
    own = sorted((r for r in disk.close if r.ours and r.current), key=lambda r: (r.step, r.seq))
    for before, after in pairwise(own):
        found = []
        if before.manifest is not None and after.manifest is not None:
            known = (_flat(before.manifest.facts), _flat(after.manifest.facts))
            found = differing(*known, [name for name in known[0] if name.startswith(("data.", "world_size"))])
        worlds = [len(ranks(disk, r, RANDOM)) or _single(disk, r) for r in (before, after)]
        if all(worlds) and worlds[0] != worlds[1]:
            found.append(("processes", worlds[0], worlds[1]))
        if found:
            yield after, found


def _single(disk: Disk, record: Record) -> int:
    return int("rng_state.pth" in disk.files(record))


def _flat(values: Mapping[str, object]) -> dict[str, object]:
    """Facts with the names of nested ones put together by dots, two levels deep."""
    found: dict[str, object] = {}
    for name, value in values.items():
        inner = value if isinstance(value, Mapping) else None
        found |= {f"{name}.{key}": item for key, item in inner.items()} if inner is not None else {name: value}
    return found


def another_way(case: Case) -> Iterator[Sight]:
    """Steps that were trained twice. What settings may change on purpose (the learning rate) isn't looked at."""
    for resumed in relived(trail.read(case.disk.root), rtol=CLOSE) if case.disk is not None else ():
        found = resumed.divergence
        if found is not None and (found.what == "batch" or (found.what == "loss" and not found.agreed)):
            yield Sight(
                saw=f"steps after {resumed.start} were trained twice: {found}",
                evidence=(f"{resumed.compared} steps in common, {found.agreed} equal before it",),
                means=f"the resume from step {resumed.start} didn't go the way it went before: {found.means}",
            )
