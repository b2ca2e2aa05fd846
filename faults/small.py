"""A small run whose checkpoints can be told apart: what is in them follows from their step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lastgood.errors import NoCheckpoint
from lastgood.format.tensors import Tensor
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo.read import records
from lastgood.repo.staging import Staging

SIZE = 2048
"""Bytes of the weights, and of the optimizer's state."""


def content(step: int) -> bytes:
    """The weights that belong to a step: what a judge compares with."""
    return bytes([step % 251, 7, step % 13]) * (SIZE // 3)


def in_memory(step: int, part: str) -> Iterable[Tensor]:
    """What a part of its name holds."""
    data = content(step)
    return [Tensor("w", "U8", (len(data),), memoryview(data))]


def stage(step: int, tensors: Callable[[int, str], Iterable[Tensor]] = in_memory) -> Callable[[Staging], None]:
    """Two files of tensors, one of ours, and two that a library writes by itself."""

    def write(staging: Staging) -> None:
        for name, part in (("model.safetensors", "model"), ("optimizer.safetensors", "optimizer")):
            staging.tensors(name, part, tensors(step, part))
        staging.data("resume.json", "progress", json.dumps({"step": step}).encode())
        (staging.directory / "config.json").write_text(f'{{"step": {step}}}')
        (staging.directory / "adapter").mkdir()
        (staging.directory / "adapter" / "adapter.json").write_text("{}")
        staging.adopt("model")

    return write


def manager(root: Path, **keep: Any) -> Manager:
    """As a training does at its start: open, go on from the last good one, and move what is damaged aside."""
    made = Manager(root=root, keep=Keep(**keep), on_error="raise")
    made.open()
    there = made.records()
    if any(record.ours for record in there):
        found = made.find("last")
        made.quarantine(found.damaged)
        made.begin_from(found.record)
    elif any(record.state == "incomplete" for record in there):
        raise NoCheckpoint(f"nothing in {root} is good")
    else:
        made.begin_fresh()
    return made


def save(made: Manager, step: int, tensors: Callable[[int, str], Iterable[Tensor]] = in_memory) -> Record | None:
    """A save and what comes after it."""
    record = made.save(step, stage(step, tensors), estimate=1, environment={}, arguments={}, facts={"loss": 1 / step})
    made.retain()
    return record


def steps(root: Path) -> list[int]:
    """Of what is listed as ours and whole."""
    return [record.step for record in records(root) if record.ours and record.state in ("full", "weights")]
