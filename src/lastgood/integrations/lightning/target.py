"""The checkpoint that a resume goes on from, and how a path or a ranking leads to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lastgood import policy
from lastgood.errors import CorruptCheckpoint, NoCheckpoint
from lastgood.integrations.lightning.moment import Where
from lastgood.integrations.lightning.stream import Place
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo import verify
from lastgood.repo.read import records


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The checkpoint to go on from. own: it is of the run in this directory, which therefore goes on."""

    path: Path
    record: Record
    own: bool
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Landing:
    """A resume that is under way: the loops have to come to the line where the save was made."""

    saved: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def where(self) -> Where:
        where: Where = self.saved["progress"]["where"]
        return where

    def places(self, kind: str) -> list[Place]:
        return [Place.decode(value, self.tensors) for value in self.saved["data"][kind]]


def verified(path: Path, *, full: bool) -> Record:
    """The record of the checkpoint at `path`. Raises NoCheckpoint (none there) or CorruptCheckpoint."""
    record = next((r for r in records(path.absolute().parent) if r.name == path.name), None)
    if record is None or record.manifest is None:
        raise NoCheckpoint(f"{path} is not a checkpoint of lastgood")
    problem = record.problem if record.state == "incomplete" else ""
    faults = [problem] if problem else verify.problems(path.absolute().parent, record, full=full)
    if faults:
        raise CorruptCheckpoint(
            f"{path} is damaged: {'; '.join(faults[:3])}", hint="ckpt_path='last' takes the newest good one"
        )
    return record


def best(found: tuple[Record, ...], keep: Keep) -> Record | None:
    """The best by the monitor; without one the newest."""
    if keep.monitor is not None and keep.mode is not None:
        return policy.best(found, keep.monitor, keep.mode)
    mine = [record for record in found if record.ours and record.current]
    return max(mine, key=lambda record: record.seq, default=None)


def path_of(root: Path, record: Record | None) -> str:
    return "" if record is None else os.fspath(root / record.name)
