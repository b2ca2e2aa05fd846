"""torch.distributed.checkpoint directories -> whole tensors and the nested state they came from, without its pickle."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from lastgood.convert import pickles
from lastgood.errors import CorruptCheckpoint
from lastgood.layouts import dcp
from lastgood.layouts.dcp import Item
from lastgood.state.tensors import DTYPE_OF
from lastgood.store import local


def read(path: Path) -> dict[str, Any]:
    """The state as it was handed to torch.distributed.checkpoint.save; empty dicts in it are not stored by torch.

    Raises CorruptCheckpoint where a tensor has holes or chunks that don't fit.
    """
    index = dcp.read(path)
    parts: dict[str, list[Item]] = {}
    for item in index.items:
        parts.setdefault(item.name, []).append(item)
    state: dict[Any, Any] = {}
    for name in dict.fromkeys([*index.paths, *parts]):
        if name not in parts and name not in index.tensors:
            raise CorruptCheckpoint(f"{path}: {name} is named and stored nowhere")
        items = parts.get(name, [])
        value = _whole(path, name, *index.tensors[name], items) if name in index.tensors else _plain(path, name, items)
        _put(state, index.paths.get(name) or (name,), value, f"{path}: {name}")
    return {str(key): _lists(value) for key, value in state.items()}


def _plain(path: Path, name: str, items: list[Item]) -> Any:
    if len(items) != 1:
        raise CorruptCheckpoint(f"{path}: {name} is stored {len(items)} times")
    return _load(path, items[0])


def _whole(path: Path, name: str, code: str, shape: tuple[int, ...], items: list[Item]) -> torch.Tensor:
    if code not in DTYPE_OF or not all(type(extent) is int and extent >= 0 for extent in shape):
        raise CorruptCheckpoint(f"{path}: {name} is said to be {code}{list(shape)}")
    chunks: list[tuple[tuple[int, ...], torch.Tensor]] = []
    for item in items:
        chunk, offsets = _load(path, item), item.offsets
        if not isinstance(chunk, torch.Tensor) or offsets is None or len(offsets) != len(shape):
            raise CorruptCheckpoint(f"{path}: a part of {name} isn't a tensor of {len(shape)} dimensions")
        fits = chunk.ndim == len(shape) and all(
            type(begin) is int and 0 <= begin <= begin + extent <= total
            for begin, extent, total in zip(offsets, chunk.shape, shape, strict=True)
        )
        if not fits or chunk.dtype != DTYPE_OF[code]:
            raise CorruptCheckpoint(f"{path}: a part of {name} doesn't fit into {code}{list(shape)}")
        chunks.append((offsets, chunk))
    # The sum is right before anything of that size is made, and each element is written once.
    if sum(chunk.numel() for _, chunk in chunks) != math.prod(shape):
        raise CorruptCheckpoint(f"{path}: parts of {name} are missing")
    if len(chunks) == 1:
        return chunks[0][1]
    whole, covered = torch.empty(shape, dtype=DTYPE_OF[code]), torch.zeros(shape, dtype=torch.bool)
    for offsets, chunk in chunks:
        place = tuple(slice(begin, begin + n) for begin, n in zip(offsets, chunk.shape, strict=True))
        whole[place] = chunk
        covered[place] = True
    if not bool(covered.all()):
        raise CorruptCheckpoint(f"{path}: parts of {name} overlap")
    return whole


def _load(path: Path, item: Item) -> Any:
    where = f"{path / item.file} ({item.name})"
    try:
        with local.opened(path / item.file) as file:
            size = os.fstat(file.fileno()).st_size
            if item.begin + item.length > size:
                raise CorruptCheckpoint(f"{where}: bytes {item.begin} to {item.begin + item.length} of {size}")
            file.seek(item.begin)
            data = file.read(item.length)
    except OSError as error:
        raise CorruptCheckpoint(f"{where} can't be read: {error.strerror or error}") from error
    return pickles.load_bytes(data, where)


class _Leaf:
    """A stored value, told from the dicts around it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _put(state: dict[Any, Any], keys: tuple[Any, ...], value: Any, where: str) -> None:
    *folders, last = keys
    if not all(isinstance(key, (str, int)) for key in (*folders, last)):
        raise CorruptCheckpoint(f"{where} has no place in a nested state")
    for key in folders:
        state = state.setdefault(key, {})
        if not isinstance(state, dict):
            raise CorruptCheckpoint(f"{where} lies inside a value")
    if last in state:
        raise CorruptCheckpoint(f"{where} is there twice")
    state[last] = _Leaf(value)


def _lists(value: Any) -> Any:
    """Places in lists are integers in a path, keys of dicts are text."""
    if isinstance(value, _Leaf):
        return value.value
    items = {key: _lists(item) for key, item in value.items()}
    if items and all(type(key) is int for key in items) and sorted(items) == list(range(len(items))):
        return [items[index] for index in range(len(items))]
    return items
