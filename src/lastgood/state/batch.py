"""What a batch is known by: a hash of its content as the data loader gave it, on the CPU."""

from __future__ import annotations

import marshal
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from blake3 import blake3

WHOLE = 1 << 20
"""Bytes up to which a tensor or a text is hashed whole (1 MiB); of larger ones evenly spaced pieces are."""
PIECES, PIECE = 256, 4096
MOST = 100_000
"""Values in one batch that are looked at one by one; a batch of more isn't known."""

NUMBERS = {bool, int, float, type(None)}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

UNKNOWN = ""


class Batches:
    """The hashes of batches that were fetched and not trained on yet: loaders fetch ahead, in order.

    wanted: False once nobody will take them any more.
    """

    def __init__(self) -> None:
        self.wanted = True
        self._waiting: deque[str] = deque()
        self._skip = 0

    def begin(self, skip: int) -> None:
        """An epoch's iteration begins; the first `skip` batches will be fetched but not handed on."""
        self._waiting.clear()
        self._skip = skip

    def add(self, batch: Any) -> None:
        """The next batch was fetched."""
        if self._skip:
            self._skip -= 1
        elif self.wanted:
            self._waiting.append(digest(batch))

    def take(self, count: int) -> str:
        """The hash of the next `count` batches, which make up one step; "" if one of them isn't known."""
        taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        if len(taken) != count or not all(taken):
            return UNKNOWN
        return taken[0] if count == 1 else blake3("".join(taken).encode()).hexdigest(length=8)


def digest(batch: Any) -> str:
    """16 hex digits over names, dtypes, shapes and bytes; "" where reading it would cost or can't be done."""
    hasher = blake3()
    try:
        known = _feed(hasher, batch, 0, _Budget())
    except Exception:  # whatever a user's batch is made of: it isn't known, and training goes on
        return UNKNOWN
    return hasher.hexdigest(length=8) if known else UNKNOWN


class _Budget:
    """What one batch may cost: a list that holds itself, or a million strings, must not stop the training."""

    def __init__(self) -> None:
        self.left = MOST

    def spent(self) -> bool:
        self.left -= 1
        return self.left < 0


def _feed(hasher: Any, value: Any, depth: int, budget: _Budget) -> bool:
    """Whether all of it could be hashed."""
    if depth > 16 or budget.spent():
        return False
    if isinstance(value, torch.Tensor):
        # Never one on a device: to read it would make the device wait.
        if value.device.type != "cpu" or value.layout is not torch.strided or value.is_quantized:
            return False
        _bytes(hasher, f"{value.dtype}{tuple(value.shape)}", _array(value))
        return True
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        _bytes(hasher, f"{value.dtype}{value.shape}", value)
        return True
    if isinstance(value, Mapping):
        hasher.update(b"{%d" % len(value))
        pairs = sorted(value.items(), key=lambda pair: str(pair[0]))
        return all(
            _feed(hasher, name, depth + 1, budget) and _feed(hasher, item, depth + 1, budget) for name, item in pairs
        )
    if isinstance(value, (list, tuple)):
        hasher.update(b"[%d" % len(value))
        if len(value) > 8 and len(value) <= WHOLE and set(map(type, value)) <= NUMBERS:  # token ids: all in one go
            hasher.update(marshal.dumps(list(value), 0))  # version 0: by value alone, not by which objects are shared
            return True
        return all(_feed(hasher, item, depth + 1, budget) for item in value)
    if isinstance(value, (str, bytes)) and len(value) > WHOLE:
        _long(hasher, value)
        return True
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)):
        hasher.update(f"{type(value).__name__}:{value!r};".encode(errors="surrogatepass"))
        return True
    return False


def _array(value: torch.Tensor) -> Any:
    """Its elements without a copy, as integers of their width where NumPy doesn't have the type (bfloat16)."""
    value = value.detach().resolve_conj().resolve_neg()
    try:
        return value.numpy()
    except TypeError:
        return value.view(INTEGERS[value.element_size()]).numpy()


def _bytes(hasher: Any, what: str, values: Any) -> None:
    hasher.update(what.encode())
    if values.nbytes <= WHOLE:
        hasher.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return
    each = max(1, PIECE // values.itemsize)
    flat = values.reshape(-1) if values.flags.c_contiguous else values.flat  # flat: others would be copied as a whole
    for start in np.linspace(0, values.size - each, PIECES, dtype=np.int64).tolist():
        hasher.update(np.ascontiguousarray(flat[start : start + each]).view(np.uint8).data)


def _long(hasher: Any, value: str | bytes) -> None:
    hasher.update(f"{type(value).__name__}{len(value)}".encode())
    for start in np.linspace(0, len(value) - PIECE, PIECES, dtype=np.int64).tolist():
        piece = value[start : start + PIECE]
        hasher.update(piece if isinstance(piece, bytes) else piece.encode(errors="surrogatepass"))
