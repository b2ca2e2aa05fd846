"""What the parts of a run share while one checkpoint is written or read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from lastgood.errors import IncompleteRestore
from lastgood.integrations.torch.stamp import Stamp
from lastgood.repo.staging import Staging
from lastgood.report import Change
from lastgood.state import rng
from lastgood.state.fingerprint import Digests
from lastgood.state.match import Match
from lastgood.state.rng import Rng
from lastgood.state.saved import Saved
from lastgood.state.stream import Once
from lastgood.state.weights import TensorFile

STANDARD = {"optimizer": "optimizer", "scheduler": "scheduler", "scaler": "scaler", "dataloader": "data"}
"""Parts that every reader of resume.json knows -> their keys there; any other part is under `parts`."""


@dataclass(slots=True)
class Writing:
    """One save. live: every tensor of every model by name; values: goes to resume.json, tensors: beside it.

    files: of the models, written when every part has said what it holds: a part's own state_dict() may borrow tensors.
    later: where digests belong under "tensors" that are made meanwhile.

    digests: goes to tensors.json. full: False for a checkpoint of the weights alone.
    """

    staging: Staging
    live: Mapping[str, torch.Tensor]
    full: bool = True
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    files: list[TensorFile] = field(default_factory=list)
    later: list[tuple[dict[str, Any], Digests]] = field(default_factory=list)
    digests: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, value: Any) -> None:
        """The JSON of a part."""
        if name in STANDARD:
            self.values[STANDARD[name]] = value
        else:
            self.values.setdefault("parts", {})[name] = value


@dataclass(slots=True)
class Reading:
    """One restore. allow: parts that may be missing; once: the generators as they were, for the first loader."""

    saved: Saved
    live: Mapping[str, torch.Tensor]
    allow: Collection[str] = ()
    match: Match = field(default_factory=Match)
    once: Once | Rng = field(default_factory=rng.capture)
    missing: list[str] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)

    def get(self, name: str) -> Any:
        """The JSON of a part; None if it isn't there and may be missing. Raises IncompleteRestore."""
        resume = self.saved.resume
        value = resume.get(STANDARD[name]) if name in STANDARD else resume.get("parts", {}).get(name)
        if value is None:
            self.lacks(name)
        return value

    def lacks(self, name: str) -> None:
        """Note that a part is missing. Raises IncompleteRestore where that isn't allowed."""
        if name not in self.allow:
            record = self.saved.record
            raise IncompleteRestore(
                f"{record.name} holds no {name}" + ("" if record.state == "full" else " (only its weights were kept)"),
                hint=f"resume from another checkpoint, or allow_missing=[{name!r}] to start that part afresh;"
                " nothing was changed",
            )
        self.missing.append(name)


class Ready(Protocol):
    """The rest of a part's restore, after every part has been looked at and none has been changed."""

    def __call__(self) -> str:
        """Put the part back; returns what is said of it in the report."""
        ...


class Part(Protocol):
    """Something that a checkpoint holds, under the name it was given."""

    name: str

    def write(self, out: Writing) -> None:
        """Add it to a checkpoint. Raises NotSupported, with the place, for what can't be stored bit for bit."""
        ...

    def prepare(self, source: Reading) -> Ready | None:
        """Find out whether it can be restored, changing nothing; None if it is missing and may be."""
        ...

    def estimate(self) -> int:
        """Bytes that it will need."""
        ...

    def stamp(self) -> Stamp | None:
        """Changes whenever the part does; None where nobody can tell."""
        ...


@runtime_checkable
class Marked(Protocol):
    """A part that has to be told at the end of each step, because it is somewhere else when that is saved."""

    def mark(self) -> None:
        """A step is complete."""
        ...
