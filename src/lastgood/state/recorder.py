"""Keeps the trail of one `train()`. Values stay where they were computed until the Trainer waits for them anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from lastgood.health import Sample
from lastgood.model import Record
from lastgood.repo import trail
from lastgood.repo.trail import Entry
from lastgood.state.batch import Batches
from lastgood.talk import warn

AT_LATEST = 100
"""Steps after which the values are asked for, where the Trainer itself logs and saves less often."""


class Behind(Protocol):
    """Does things behind the save that is under way, or at once: see `lastgood.behind.Behind`."""

    def later(self, job: Callable[[], object]) -> None: ...

    def then(self, step: int, act: Callable[[Record], None]) -> None: ...


@dataclass(slots=True)
class Recorder:
    """on: whether anything is written down. What can't be written is lost, said once, and training goes on.

    hear: whoever else wants to know how the steps were (the guard), whether they are written down or not.
    """

    on: bool = False
    hear: Callable[[Sequence[Sample]], None] | None = None
    batches: Batches = field(default_factory=Batches)
    warned: bool = False
    _root: Path | None = None
    _life: int = 0
    _last: int = 0  # step that was recorded last
    _loss: torch.Tensor | None = None  # of the step under way, so far
    _waiting: list[tuple[int, Any, Any, float | None, str, bool]] = field(default_factory=list)
    _asked: list[Entry] = field(default_factory=list)  # whose values are known, and not written down yet

    @property
    def heard(self) -> bool:
        """Whether anybody wants to know."""
        return self.on or self.hear is not None

    def begin(self, root: Path, *, run: str, start: int, checkpoint: str) -> None:
        """Training begins after step `start`, from this checkpoint ("" for none)."""
        self.flush()  # of an attempt before, with a batch that was too large
        self._root, self._last, self._loss = root, start, None
        if self.on:
            try:
                self._life = trail.begin(root, run=run, start=start, checkpoint=checkpoint)
            except OSError as error:
                self.on = self.batches.wanted = False  # nobody could tell these steps from those of another life
                self._lost(error)

    def loss(self, value: Any) -> None:
        """The loss of one micro-batch, scaled as the Trainer adds it up."""
        if self.heard and isinstance(value, torch.Tensor):
            value = value.detach() if value.requires_grad else value
            # A copy: a captured graph writes its next result into the same memory.
            self._loss = value.clone() if self._loss is None else self._loss + value

    def step(self, step: int, batches: int, *, grad_norm: Any, lr: Any, skipped: bool = False) -> None:
        """A step was made of so many micro-batches. Nothing happens if it is known already.

        skipped: a loss scaler threw its gradients away.
        """
        if not self.heard or step <= self._last:
            return
        rate = float(lr) if isinstance(lr, (int, float)) else None
        self._waiting.append((step, self._loss, grad_norm, rate, self.batches.take(batches), skipped))
        self._last, self._loss = step, None
        if len(self._waiting) + len(self._asked) >= AT_LATEST:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, and tell whoever listens."""
        self.ask()
        self._write(self._taken())

    def ask(self) -> None:
        """Ask for the values of what is waiting, and tell whoever listens; `saved` or `flush` write them down."""
        waiting, self._waiting = self._waiting, []
        if not waiting or self._root is None or not self.heard:
            return
        try:
            losses = numbers([entry[1] for entry in waiting])
            norms = numbers([entry[2] for entry in waiting])
        except RuntimeError as error:  # the device has failed, which is told by others
            self._lost(error)
            return
        entries = [
            Entry(step, self._life, loss, norm, batch, lr, skipped)
            for (step, _, _, lr, batch, skipped), loss, norm in zip(waiting, losses, norms, strict=True)
        ]
        if self.hear is not None:
            self.hear([Sample(entry.step, entry.loss, entry.grad_norm, entry.skipped) for entry in entries])
        self._asked += entries

    def saved(self, step: int, id: str, behind: Behind | None = None) -> None:
        """A checkpoint was committed, or is on its way `behind` training: then what is to be written comes behind it.

        So do the steps that are waiting: a save doesn't wait for a file of notes.
        """
        self.ask()
        entries = self._taken()
        if not self.on or self._root is None:
            return
        root, life = self._root, self._life

        def note(_: object = None) -> None:
            try:
                trail.saved(root, life, step, id)
            except OSError as error:
                self._lost(error)

        if behind is None:
            self._write(entries)
            note()
        else:
            behind.later(lambda: self._write(entries))  # whatever becomes of the checkpoint
            behind.then(step, note)

    def _taken(self) -> list[Entry]:
        entries, self._asked = self._asked, []
        return entries

    def _write(self, entries: Sequence[Entry]) -> None:
        if not entries or not self.on or self._root is None:
            return
        try:
            trail.append(self._root, entries)
        except OSError as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        if not self.warned:
            warn(f"the trail of this run can't be written ({error}); training and its checkpoints go on")
        self.warned = True


def numbers(values: Sequence[Any]) -> list[float | None]:
    """Tensors and numbers as numbers; the device is waited for once."""
    tensors = [value.reshape(()).float() for value in values if isinstance(value, torch.Tensor)]
    taken = iter(torch.stack(tensors).tolist() if tensors else [])
    return [
        next(taken) if isinstance(value, torch.Tensor) else float(value) if isinstance(value, (int, float)) else None
        for value in values
    ]
