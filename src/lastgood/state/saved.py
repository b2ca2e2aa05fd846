"""A verified checkpoint of ours, as its readers need it: resume.json, the tensors beside it, the saved weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lastgood.errors import CorruptCheckpoint
from lastgood.format import tensors as safetensors
from lastgood.format.digests import FORMATS
from lastgood.model import FileEntry, Record
from lastgood.repo.held import Held
from lastgood.state import quick
from lastgood.state.stored import Stored
from lastgood.state.tensors import in_place
from lastgood.store.checksum import NOW, Kind

T = TypeVar("T")

RESUME, STATE, DIGESTS = "resume.json", "optimizer.safetensors", "tensors.json"


@dataclass(slots=True)
class Saved:
    """Each file is read once, when it is asked for first. held: what its verification has read already."""

    path: Path
    record: Record
    held: Held = field(default_factory=Held)
    _resume: dict[str, Any] | None = None
    _digests: dict[str, Any] | None = None
    _tensors: dict[str, torch.Tensor] | None = None
    _given: set[str] = field(default_factory=set)

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Part -> its files; {} for what a stock Trainer wrote."""
        return {} if self.record.manifest is None else self.record.manifest.parts

    @property
    def resume(self) -> dict[str, Any]:
        """resume.json; {} for a checkpoint that holds the weights alone."""
        if self._resume is None:
            self._resume = read_json(self.path / RESUME) if "progress" in self.parts else {}
        return self._resume

    @property
    def digests(self) -> dict[str, Any]:
        """tensors.json: what the models held."""
        if self._digests is None:
            self._digests = read_json(self.path / DIGESTS)
        return self._digests

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that resume.json speaks of: optimizers, schedulers, whatever else had some."""
        if self._tensors is None:
            there = any(STATE in files for files in self.parts.values())
            self._tensors = self.load(STATE) if there else {}
        return self._tensors

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one file, hashed as they were read. Raises CorruptCheckpoint."""
        buffer = self._as_saved(name, self.held.content)
        return in_place(safetensors.decode(self.path / name, buffer), buffer)

    def stored(self, name: str) -> list[Stored]:
        """Where the tensors of one file are and what they hold; none is in memory yet. Raises CorruptCheckpoint."""
        found, path = self._as_saved(name, self.held.digests), self.path / name
        return [Stored(path, key, place.slot, place.digest) for key, place in found.items()]

    def _as_saved(self, name: str, read: Callable[[Path, Kind], tuple[T, FileEntry]]) -> T:
        """What `read` makes of a file, whose size and hash come with it. Raises CorruptCheckpoint for other ones."""
        path, manifest = self.path / name, self.record.manifest
        expected = manifest.files.get(name) if manifest is not None else None
        try:
            found, entry = read(path, expected.kind if expected is not None else NOW)
        except OSError as error:
            raise CorruptCheckpoint(f"{path} can't be read: {error.strerror or error}") from error
        if expected is not None and expected != entry:
            raise CorruptCheckpoint(
                f"the content of {path} is not what was saved (hash differs)",
                hint="`lastgood verify --full` says which checkpoints are good",
            )
        return found

    def given(self, beginnings: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """The tensors whose names begin like this, for whoever keeps them: what is asked for again is read again."""
        if self._given.intersection(beginnings):
            self.done()
        self._given.update(beginnings)
        own = [name for name in self.tensors if name.startswith(beginnings)]
        return {name: self.tensors.pop(name) for name in own}

    def done(self) -> None:
        """Everything was handed out: let go of the buffers."""
        self._tensors = None
        self._given.clear()
        self.held.clear()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a format that is known. Raises CorruptCheckpoint."""
    try:
        value = quick.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict) or value.get("format") not in FORMATS:
        raise CorruptCheckpoint(f"{path} is not in a format that this version of lastgood reads")
    return value
