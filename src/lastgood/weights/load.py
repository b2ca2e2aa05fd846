"""A part of a checkpoint as a state dict: every byte is hashed as it is read, and nothing is handed out before."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lastgood.errors import CorruptCheckpoint, UsageError
from lastgood.format.digests import digests
from lastgood.format.tensors import decode, read_header
from lastgood.model import FileEntry
from lastgood.state import tree
from lastgood.state.stored import Stored
from lastgood.state.tensors import from_bytes, holds
from lastgood.store import contents

SCALED = ("float8", "float4")
"""Beginnings of the names of dtypes whose values mean something only together with their scales: never converted."""


def load(
    files: Sequence[tuple[Path, FileEntry]], told: Mapping[str, Any], *, device: Any = None, dtype: Any = None
) -> dict[str, Any]:
    """name -> tensor over all files; a later file's tensor wins. Needs memory for the files once.

    told: of tensors.json `aliases` (further name -> name that is stored; they share one tensor, as tied ones do),
    `transient` (names that are in no state dict) and `extra_state` (what modules handed over beside tensors).
    device: as torch has it (None: the CPU). dtype: a torch.dtype or its name, for floating tensors (None: as they
    were saved). Raises CorruptCheckpoint for a file that isn't what was saved.
    """
    wanted = _dtype(dtype)
    found: dict[str, Any] = {}
    for path, entry in files:
        for name, stored in decode(path, _verified(path, entry)).items():
            tensor = from_bytes(stored)
            kind = wanted if wanted is not None and _plain(tensor) else tensor.dtype
            found[name] = tensor.to(device=device, dtype=kind)
    for name, target in told["aliases"].items():
        if target in found and name not in found:
            found[name] = found[target]
    extra = {name: tree.decode(value, found) for name, value in told.get("extra_state", {}).items()}
    rest = (*told.get("transient", ()), *(name for name in found if name.startswith(tuple(f"{key}." for key in extra))))
    return {name: tensor for name, tensor in found.items() if name not in rest} | extra


def chosen(path: Path, entry: FileEntry | None, known: Mapping[str, Collection[str]]) -> dict[str, torch.Tensor]:
    """Some tensors of a file, whose other bytes are read only if one of these isn't proven by itself.

    entry: None: unproven. known: name -> digests, any of which proves it. Raises CorruptCheckpoint for one that isn't
    what was saved.
    """
    try:
        slots = read_header(path).slots
        found = {name: Stored(path, name, slots[name], "").tensor() for name in known}
        if entry is None:
            return found
        open_ones = [name for name, tensor in found.items() if not any(holds(tensor, told) for told in known[name])]
        whole, inside = digests(path, entry.kind) if open_ones else (entry, {})
    except OSError as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error.strerror or error}") from error
    if whole != entry or not all(name in inside and holds(found[name], inside[name].digest) for name in open_ones):
        raise _damaged(path)
    return found


def _verified(path: Path, entry: FileEntry) -> memoryview:
    try:
        buffer, is_now = contents.content(path, entry.kind)
    except OSError as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error.strerror or error}") from error
    if is_now != entry:
        raise _damaged(path)
    return buffer


def _damaged(path: Path) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the content of {path} is not what was saved (hash differs); nothing was loaded",
        hint="`lastgood verify --full` says which checkpoints are good",
    )


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not str(tensor.dtype).removeprefix("torch.").startswith(SCALED)


def _dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UsageError(f"dtype={value!r} is not a floating type of torch", hint="dtype='bfloat16'")
    return found
