"""A run directory to look at: `lastgood.open(path)`. Read-only, without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lastgood import policy
from lastgood.errors import NoCheckpoint, UsageError
from lastgood.model import Record
from lastgood.policy import known_mode
from lastgood.repo import journal, verify
from lastgood.repo.read import records


@dataclass(frozen=True, slots=True)
class Run:
    """What is in a run directory. Every property reads the disk again, so it shows a live run as it goes."""

    root: Path

    @property
    def checkpoints(self) -> tuple[Record, ...]:
        """All of them, by step: ours, incomplete, foreign and stock ones."""
        return records(self.root)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The journal: saved, stripped, deleted and why, resumed."""
        return journal.read(self.root)

    def latest(self) -> Record:
        """The newest full checkpoint on the current branch: what a recovery uses once it is verified."""
        record = policy.latest(self.checkpoints)
        if record is None:
            raise NoCheckpoint(f"{self.root} has no full checkpoint", hint="look at its checkpoints for what there is")
        return record

    def best(self, monitor: str, mode: Literal["min", "max"] | None = None) -> Record:
        """The best checkpoint on the current branch by a metric; mode may be left out for a well-known metric."""
        direction = mode or known_mode(monitor)
        if direction is None:
            raise UsageError(f"is a lower or a higher {monitor} better?", hint="give mode='min' or mode='max'")
        record = policy.best(self.checkpoints, monitor, direction)
        if record is None:
            raise NoCheckpoint(f"{self.root} has no checkpoint with a {monitor}")
        return record

    def problems(self, record: Record, *, full: bool = True) -> tuple[str, ...]:
        """What is wrong with a checkpoint's files; () if nothing. full: hash every byte."""
        return verify.problems(self.root, record, full=full)

    def path(self, record: Record) -> Path:
        """The checkpoint's directory: load it with from_pretrained."""
        return self.root / record.name


def open(path: str | os.PathLike[str]) -> Run:
    """The run in this directory (a Trainer's output_dir). Raises NoCheckpoint where there is no such directory."""
    root = Path(path)
    if not root.is_dir():
        raise NoCheckpoint(f"{root} is not a directory")
    return Run(root)
