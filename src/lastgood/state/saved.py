"""A verified checkpoint of ours, as its readers need it: resume.json, the tensors beside it, the saved weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lastgood.errors import CorruptCheckpoint
from lastgood.format import tensors as safetensors
from lastgood.model import Record
from lastgood.state.tensors import from_bytes

RESUME, STATE, DIGESTS = "resume.json", "optimizer.safetensors", "tensors.json"


@dataclass(slots=True)
class Saved:
    """Each file is read once, when it is asked for first."""

    path: Path
    record: Record
    _resume: dict[str, Any] | None = None
    _digests: dict[str, Any] | None = None
    _tensors: dict[str, torch.Tensor] | None = None

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
        """The tensors of one file."""
        return {key: from_bytes(entry) for key, entry in safetensors.load(self.path / name).items()}

    def done(self) -> None:
        """Everything was handed out: let go of the buffers."""
        self._tensors = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of format 1. Raises CorruptCheckpoint."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict) or value.get("format") != 1:
        raise CorruptCheckpoint(f"{path} is not in a format that this version of lastgood reads")
    return value
