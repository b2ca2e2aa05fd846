"""Checkpoints that a stock Trainer wrote: resumed from, but held to the same standard.

The stock loader leaves tensors untouched whose names were converted for the file, without
failing. So it loads first (it knows adapters and shards), and then every trainable tensor
of the live model has to hold something that is in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lastgood.convert import pickles
from lastgood.errors import IncompleteRestore
from lastgood.format import tensors as safetensors
from lastgood.state.conversions import converted
from lastgood.state.fingerprint import live_tensors
from lastgood.state.match import some
from lastgood.state.tensors import digest, from_bytes


def load_weights(path: str, model: torch.nn.Module, stock_load: Callable[[], Any]) -> None:
    """Raises IncompleteRestore naming the tensors for which nothing in the checkpoint was found."""
    stock_load()
    saved = _saved(Path(path))
    live = live_tensors(model)
    held = {digest(tensor) for tensor in saved.values()}
    lost = [name for name, tensor in live.items() if _wanted(tensor) and digest(tensor) not in held]
    if lost:
        candidates = converted(model, saved)
        with torch.no_grad():
            for name in [name for name in lost if name in candidates and not candidates[name].is_meta]:
                if candidates[name].shape == live[name].shape:
                    live[name].copy_(candidates[name])
                    lost.remove(name)
    if lost:
        raise IncompleteRestore(
            f"{len(lost)} trained tensors can't be found in {path}: {some(lost)}",
            hint="build the same model and adapter as when it was saved",
        )


def _wanted(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad


def _saved(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.rglob("*.safetensors")):
        for name, entry in safetensors.load(file).items():
            found[f"{file.parent.name}/{name}" if file.parent != path else name] = from_bytes(entry)
    for file in _pickled(path):
        found.update(pickles.load(file))
    return found


def _pickled(path: Path) -> list[Path]:
    index = path / "pytorch_model.bin.index.json"
    if index.exists():
        return sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    return [file for file in (path / "pytorch_model.bin", path / "adapter_model.bin") if file.exists()]
