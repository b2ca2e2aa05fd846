"""What a part's state is like, told cheaply: another stamp after any change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

MOST = 10_000
"""Values in one part's state that are compared; of a part with more it can't be shown that nothing changed."""

FEW = 256
"""Elements up to which a tensor's content is compared."""

Stamp = tuple[Any, ...]


def _content(tensor: torch.Tensor) -> bytes:
    """Of a small one: a state dict may be made of new tensors each time."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return b""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Of any other; one on a device is never waited for."""
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor), version(tensor)[1]


def version(tensor: torch.Tensor) -> tuple[int, int]:
    """Which tensor, and how often it was written to: torch counts what changes one in place."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version


def leaves(value: Any) -> Stamp | None:
    """Every number and text in it; None if there are too many, or something that isn't one."""
    found: list[Any] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if len(found) > MOST:
            return None
        if isinstance(item, torch.Tensor):
            found.append(_content(item) if item.device.type == "cpu" and item.numel() <= FEW else _memory(item))
        elif isinstance(item, Mapping):
            found += item.keys()
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            found.append(len(item))
            waiting += item
        elif item is None or isinstance(item, (bool, int, float, str, bytes)):
            found.append(item)
        elif hasattr(item, "tobytes"):
            found.append(item.tobytes())
        else:
            return None
    return tuple(found)
