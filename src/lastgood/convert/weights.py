"""The weights in a directory: safetensors, sharded or not, adapters, torch's .bin, and which files go along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from lastgood.convert import pickles
from lastgood.convert.content import Content
from lastgood.errors import CorruptCheckpoint
from lastgood.format import tensors as safetensors
from lastgood.state.tensors import from_bytes

ADAPTER = "adapter_config.json"
_FILE = re.compile(
    r"(?P<folder>(?:[^/]+/)*)(?P<kind>model|adapter_model|pytorch_model)(?P<number>_\d+)?(?:-\d+-of-\d+)?"
    r"\.(?P<format>safetensors|bin)"
)
_FSDP = "pytorch_model_fsdp.bin"


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or is the index of files that do."""
    return name == _FSDP or _FILE.fullmatch(name.removesuffix(".index.json")) is not None


def read(path: Path, names: Iterable[str]) -> list[dict[str, torch.Tensor]]:
    """The models in these files of a directory, mostly one; a second adapter's names begin with its folder.

    Raises CorruptCheckpoint where a tensor is there twice.
    """
    names = sorted(names)
    found = [(name, match) for name in names if (match := _FILE.fullmatch(name))]
    safe = {_kind(match) for _, match in found if match["format"] == "safetensors"}
    # A .bin beside them holds the same.
    found = [(name, match) for name, match in found if match["format"] == "safetensors" or _kind(match) not in safe]
    if not found and _FSDP in names:
        return [load(path / _FSDP)]
    models: dict[int, dict[str, torch.Tensor]] = {}
    for name, match in found:
        model = models.setdefault(int((match["number"] or "_0")[1:]), {})
        for key, tensor in load(path / name).items():
            if match["folder"] + key in model:
                raise CorruptCheckpoint(f"{path}: tensor {key!r} is in {name} and in another file")
            model[match["folder"] + key] = tensor
    return [models[number] for number in sorted(models)]


def _kind(match: re.Match[str]) -> tuple[str, bool, str | None]:
    return match["folder"], match["kind"] == "adapter_model", match["number"]


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file."""
    if path.name.endswith(".safetensors"):
        return {name: from_bytes(entry) for name, entry in safetensors.load(path).items()}
    loaded = pickles.load(path)
    if not isinstance(loaded, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise CorruptCheckpoint(f"{path} holds something else than tensors by name")
    return {str(name): tensor.detach() for name, tensor in loaded.items()}


def files(content: Content) -> dict[str, dict[str, torch.Tensor]]:
    """File name -> the tensors that belong there: adapter_model.safetensors beside an adapter's configuration."""
    folders = {name.rpartition("/")[0] for name in content.files}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in content.model.items():
        folder, slash, short = name.rpartition("/")
        inside = bool(slash) and folder in folders
        prefix, key = (f"{folder}/", short) if inside else ("", name)
        stem = "adapter_model" if f"{prefix}{ADAPTER}" in content.files else "model"
        found.setdefault(f"{prefix}{stem}.safetensors", {})[key] = tensor
    return found
