"""The trail: what every step of training was like, one short line each. Not authoritative, like the journal.

Two processes that trained the same step leave two lines; where they differ, a resume wasn't
exact. A *life* is one process that trains: its number goes up with every start and resume.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lastgood.repo.journal import lines, parsed
from lastgood.repo.layout import hidden
from lastgood.store import local

NAME = "trail.jsonl"
LIMIT = 32 << 20
"""Bytes (32 MiB, about 250 000 steps) at which the older half of the steps goes."""


class Entry(msgspec.Struct, frozen=True):
    """One optimizer step. loss: the mean that the Trainer would log for it; grad_norm: before clipping.

    batch: 16 hex digits over all its micro-batches as the data loader gave them; lr: the learning rate it was made
    with. None, or "" for the batch: not known. skipped: a loss scaler threw its gradients away.
    """

    step: int
    life: int
    loss: float | None = None
    grad_norm: float | None = None
    batch: str = ""
    lr: float | None = None
    skipped: bool = False


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """One process. start: the step it resumed from, 0 for a fresh run. checkpoint: the id (of one without a manifest
    the name) of what it resumed from, "" for a fresh run. saves: id -> step of the checkpoints that it wrote."""

    number: int
    run: str = ""
    start: int = 0
    checkpoint: str = ""
    entries: tuple[Entry, ...] = ()
    saves: Mapping[str, int] = {}


def read(root: Path) -> tuple[Life, ...]:
    """All lives in their order; lines that are torn or make no sense are left out."""
    about: dict[int, dict[str, Any]] = {}
    steps: dict[int, dict[int, Entry]] = {}
    saves: dict[int, dict[str, int]] = {}
    for line in lines(hidden(root, NAME), 2 * LIMIT):
        life, step = _whole(line.get("life")), _whole(line.get("step"))
        if life is None:
            continue
        if isinstance(line.get("run"), str):
            about[life] = line
        elif step is not None and isinstance(line.get("saved"), str):
            saves.setdefault(life, {})[line["saved"]] = step
        elif step is not None:
            steps.setdefault(life, {})[step] = _entry(line, life, step)
    return tuple(
        Life(
            number=life,
            run=about.get(life, {}).get("run", ""),
            start=_whole(about.get(life, {}).get("from")) or 0,
            checkpoint=str(about.get(life, {}).get("checkpoint", "")),
            entries=tuple(entry for _, entry in sorted(steps.get(life, {}).items())),
            saves=saves.get(life, {}),
        )
        for life in sorted({*about, *steps, *saves})
    )


def begin(root: Path, *, run: str, start: int, checkpoint: str) -> int:
    """A process begins to train; returns the number of its life. Raises OSError."""
    life = _last(hidden(root, NAME)) + 1
    _append(root, [{"life": life, "run": run, "from": start, "checkpoint": checkpoint, "time": round(time.time(), 3)}])
    return life


def append(root: Path, entries: Iterable[Entry]) -> None:
    """Add steps, in one write. Raises OSError."""
    _append(root, [_line(entry) for entry in entries])


def saved(root: Path, life: int, step: int, id: str) -> None:
    """This life wrote a checkpoint: what comes after it is what a resume from it has to repeat. Raises OSError."""
    _append(root, [{"life": life, "step": step, "saved": id}])


_alone = threading.Lock()
"""A checkpoint is noted by the thread that wrote it, while another one notes steps: not into a file being shortened."""


def _append(root: Path, values: Sequence[Mapping[str, Any]]) -> None:
    path = hidden(root, NAME)
    data = "".join(f"{json.dumps(value, separators=(',', ':'))}\n" for value in values)
    with _alone:
        local.append(path, data.encode(), sync=False)
        if (local.size(path) or 0) > LIMIT:
            shorten(path)


def shorten(path: Path) -> None:
    """Let go of the older half of the steps; who lived and what was saved stays. Raises OSError.

    What is left is below the limit whatever the file held: else every step would write it anew.
    """
    every = local.read(path, 4 * LIMIT).splitlines(keepends=True)
    half = len(every) // 2
    stay = [line for line in every[:half] if b'"run"' in line or b'"saved"' in line]
    local.replace(path, b"".join([*_newest(stay, LIMIT // 4), *_newest(every[half:], LIMIT // 2)]))


def _newest(some: Sequence[bytes], limit: int) -> Sequence[bytes]:
    """As many of the last lines as have at most `limit` bytes."""
    total, first = 0, len(some)
    while first and total + len(some[first - 1]) <= limit:
        first -= 1
        total += len(some[first])
    return some[first:]


def _last(path: Path) -> int:
    """The highest number of a life: from the lines that begin one, and the newest ones if such a line was torn."""
    try:
        every = local.read(path, 4 * LIMIT).split(b"\n")
    except FileNotFoundError:
        return 0
    some = [line for line in every if b'"run"' in line] + every[-100:]
    return max((life for line in parsed(some) if (life := _whole(line.get("life"))) is not None), default=0)


def _line(entry: Entry) -> dict[str, Any]:
    numbers = {"loss": entry.loss, "grad_norm": entry.grad_norm, "lr": entry.lr}
    return {
        "life": entry.life,
        "step": entry.step,
        **{name: _plain(value) for name, value in numbers.items() if value is not None},
        **({"batch": entry.batch} if entry.batch else {}),
        **({"skipped": True} if entry.skipped else {}),
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(float(value))


def _entry(line: Mapping[str, Any], life: int, step: int) -> Entry:
    batch = line.get("batch")
    return Entry(
        step=step,
        life=life,
        loss=number(line.get("loss")),
        grad_norm=number(line.get("grad_norm")),
        batch=batch if isinstance(batch, str) else "",
        lr=number(line.get("lr")),
        skipped=line.get("skipped") is True,
    )


def number(value: object) -> float | None:
    """A value from JSON as a float, NaN and infinity as well (they are strings there); None for anything else."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
