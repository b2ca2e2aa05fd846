"""A run directory to look at: `lastgood.open(path)`. Looking changes nothing and needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lastgood import policy, ranking
from lastgood.checkpoint import Checkpoint
from lastgood.errors import NoCheckpoint, UsageError
from lastgood.formula import parse
from lastgood.model import Record, Span, lineage_in_force
from lastgood.policy import Keep
from lastgood.ranking import Mode, known_mode
from lastgood.repo import journal, trail, verify
from lastgood.repo.read import identify, records
from lastgood.repo.run import read_head
from lastgood.rev import resolve
from lastgood.view import own_policy


@dataclass(frozen=True, slots=True)
class Run:
    """What is in a run directory. Every property reads the disk again, so it shows a live run as it goes.

    run[500], run["best"], run["latest~1"], run["release-1"]: the checkpoint that these words name, as on the command
    line.
    """

    root: Path

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All of them, by step: ours, incomplete, foreign and stock ones."""
        return tuple(map(self._handle, records(self.root)))

    @property
    def branches(self) -> tuple[tuple[Checkpoint, ...], ...]:
        """Ours by branch, each oldest first: the one that the run is on, then what others left behind, newest first.

        A branch begins where a resume went back. What was left behind counts neither for `latest` nor for `best`.
        """
        own = sorted((r for r in records(self.root) if r.ours), key=lambda r: r.seq)
        found: dict[int, list[Record]] = {}
        for record in own:
            start = record.manifest.lineage[-1][0] if record.manifest is not None and record.manifest.lineage else 0
            found.setdefault(-1 if record.current else start, []).append(record)
        order = sorted(found, key=lambda start: (start >= 0, -start))
        return tuple(tuple(map(self._handle, found[start])) for start in order)

    @property
    def lineage(self) -> tuple[Span, ...]:
        """First and last number of each stretch of saves on the way to where the run is now."""
        return lineage_in_force(records(self.root), read_head(self.root, identify(self.root)))

    @property
    def policy(self) -> Keep | None:
        """What the run was last started with; None if that isn't known."""
        return own_policy(self.root)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The journal: saved, stripped, deleted and why, resumed, recorded."""
        return journal.read(self.root)

    @property
    def trail(self) -> tuple[trail.Life, ...]:
        """Loss, gradient norm, learning rate and a hash of the data of each step, by process."""
        return trail.read(self.root)

    def latest(self) -> Checkpoint:
        """The newest full checkpoint on the current branch: what a recovery uses once it is verified."""
        record = policy.latest(records(self.root))
        if record is None:
            raise NoCheckpoint(f"{self.root} has no full checkpoint", hint="look at its checkpoints for what there is")
        return self._handle(record)

    def best(self, monitor: str | None = None, mode: Literal["min", "max"] | None = None) -> Checkpoint:
        """The best checkpoint on the current branch by a metric or a formula, or by the run's own metric.

        mode may be left out for a well-known metric and for one of the run's own policy.
        """
        name, direction = self._metric(monitor, mode)
        found = records(self.root)
        record = ranking.best(found, name, direction)
        if record is None:
            known = ", ".join(sorted({metric for r in found for metric in r.metrics})) or "none"
            raise NoCheckpoint(f"{self.root} has no checkpoint with a {name}", hint=f"recorded metrics: {known}")
        return self._handle(record)

    def pareto(self, aims: Mapping[str, Literal["min", "max"] | None]) -> tuple[Checkpoint, ...]:
        """Those on the current branch that no other one beats: {"eval_loss": "min", "mmlu": "max"}.

        None is as good in every metric and better in one. The best by the first metric comes first.
        """
        chosen: dict[str, Mode] = dict(self._metric(name, mode) for name, mode in aims.items())
        return tuple(map(self._handle, ranking.pareto(records(self.root), chosen)))

    def at(self, step: int) -> Checkpoint:
        """The newest checkpoint of a step on the current branch, else of one that was left."""
        found = policy.at_step(records(self.root), step)
        if not found:
            raise NoCheckpoint(f"{self.root} has no checkpoint of step {step}", hint="look at its checkpoints")
        return self._handle(found[0])

    def __getitem__(self, rev: str | int) -> Checkpoint:
        keep = self.policy or Keep()
        monitor, mode = keep.primary
        found = resolve(str(rev), records(self.root), monitor=monitor, mode=mode, others=keep.monitors)
        return self._handle(found)

    def problems(self, checkpoint: Checkpoint | Record, *, full: bool = True) -> tuple[str, ...]:
        """What is wrong with a checkpoint's files; () if nothing. full: hash every byte."""
        record = checkpoint.found if isinstance(checkpoint, Checkpoint) else checkpoint
        return verify.problems(self.root, record, full=full)

    def path(self, checkpoint: Checkpoint | Record) -> Path:
        """The checkpoint's directory: load it with from_pretrained."""
        return self.root / checkpoint.name

    def _handle(self, record: Record) -> Checkpoint:
        return Checkpoint(self.root, record)

    def _metric(self, name: str | None, mode: Mode | None) -> tuple[str, Mode]:
        keep = self.policy
        own: dict[str, Mode] = dict(keep.monitors) if keep is not None else {}
        chosen = name if name is not None else next(iter(own), None)
        if chosen is None:
            raise UsageError("best by which metric?", hint="best('eval_loss')")
        parse(chosen)  # a slip in a formula is named as such
        if mode not in (None, "min", "max"):
            raise UsageError(f"mode={mode!r} is neither 'min' nor 'max'")
        direction = mode or own.get(chosen) or known_mode(chosen)
        if direction is None:
            raise UsageError(f"is a lower or a higher {chosen} better?", hint="give mode='min' or mode='max'")
        return chosen, direction


def open(path: str | os.PathLike[str]) -> Run:
    """The run in this directory (a Trainer's output_dir). Raises NoCheckpoint where there is no such directory."""
    root = Path(path)
    if not root.is_dir():
        raise NoCheckpoint(f"{root} is not a directory")
    return Run(root)
