"""What PEFT writes of an adapter: the same files again, as long as what they are made of is the same.

To find the tensors that share memory, to write two small files and to read them back takes as long as to copy a small
adapter.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lastgood.repo.staging import written_by_libraries
from lastgood.state.known import Known, base_names
from lastgood.state.weights import TensorFile

MOST = 1 << 20
"""Bytes (1 MiB) that are remembered at most."""
PEFTS = "peft.peft_model"
"""The module that its own save_pretrained is from."""


class Files(NamedTuple):
    """Of a save. beside: what isn't tensors, by name."""

    tensors: list[TensorFile]
    beside: dict[str, bytes]


def recall(known: Known, model: torch.nn.Module) -> Files | None:
    """Those of the last save, whose tensors are the model's still; None if this one's may be others."""
    rests_on = _rests_on(model)
    return None if rests_on is None else known.recall(rests_on)


def remember(known: Known, model: torch.nn.Module, tensors: list[TensorFile], directory: Path) -> None:
    """What was just written to `directory`, in which nothing was before, and taken over from it."""
    rests_on = _rests_on(model)
    if rests_on is None or not all(known.owns(file.tensors) for file in tensors):
        return
    found = written_by_libraries(directory)
    if sum(path.lstat().st_size for _, path in found) <= MOST:
        lasting = [replace(file, since=known.build) for file in tensors]
        known.once(rests_on, lambda: Files(lasting, {name: path.read_bytes() for name, path in found}))


def _rests_on(model: Any) -> Hashable | None:
    """Beside how the model is built, with the configurations of its adapters; None where it isn't PEFT that writes."""
    written_by = getattr(type(model).save_pretrained, "__module__", "")
    if written_by != PEFTS or "save_pretrained" in vars(model):
        return None
    return ("adapter", *base_names(model))
