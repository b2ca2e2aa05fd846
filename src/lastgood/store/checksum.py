"""The hash of files and tensors, named here and nowhere else.

XXH3-128 (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md) is as fast as memory. It finds damage, and proves no
origin: nor did BLAKE3, for whoever changes a file can change the manifest beside it. What older releases wrote is
hashed by BLAKE3, as it was then: each hash says which one it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from blake3 import blake3
from xxhash import xxh3_128, xxh3_128_hexdigest

from lastgood.model import FileEntry
from lastgood.store import fs

Kind = Literal["xxh3", "blake3"]

NOW: Kind = "xxh3"
"""What new checkpoints are hashed by."""

TAG = "xxh3:"
"""How the hash of a tensor begins, in tensors.json; one of BLAKE3 has no such beginning."""

SHORT = 16
"""Bytes of the BLAKE3 of a tensor; that of a file has 32."""

LARGE = 1 << 20
"""Bytes (1 MiB) from which on several threads compute a BLAKE3 faster than one."""


class Sum:
    """The hash of bytes that pass one after the other. size: how many there were."""

    __slots__ = ("_hasher", "kind", "size")

    def __init__(self, kind: Kind = NOW) -> None:
        self.kind: Kind = kind
        self.size = 0
        self._hasher: Any = xxh3_128() if kind == "xxh3" else blake3()

    def update(self, data: memoryview) -> None:
        """These come next. Without the interpreter's lock, if there are enough of them."""
        self.size += len(data)
        self._hasher.update(data)

    def entry(self) -> FileEntry:
        """If it was a file that passed."""
        if self.kind == "xxh3":
            return FileEntry(self.size, xxh3=self._hasher.hexdigest())
        return FileEntry(self.size, blake3=self._hasher.hexdigest())

    def tensor(self) -> str:
        """If it was a tensor: the hash as tensors.json has it."""
        return f"{TAG}{self._hasher.hexdigest()}" if self.kind == "xxh3" else str(self._hasher.hexdigest(SHORT))


class Each:
    """The hashes of tensors that pass one behind the other, cut anywhere. told: of those that are complete.

    sizes: of each, in bytes.
    """

    __slots__ = ("_kind", "_left", "_open", "_sizes", "told")

    def __init__(self, sizes: Iterable[int], kind: Kind = NOW) -> None:
        self.told: list[str] = []
        self._kind: Kind = kind
        self._sizes = iter(sizes)
        self._left = -1  # bytes to come of the tensor that passes; -1: none is expected
        self._open: Sum | None = None  # the hash of those of its bytes that have passed
        self._next()

    def update(self, data: memoryview) -> None:
        """These come next; what comes behind the last tensor is nobody's."""
        at = 0
        while at < len(data) and self._left >= 0:
            end = min(at + self._left, len(data))
            self._left -= end - at
            piece, at = data[at:end], end
            if self._open is None and not self._left:
                self.told.append(of(piece, self._kind))
            else:
                self._open = self._open or Sum(self._kind)
                self._open.update(piece)
            if not self._left:
                if self._open is not None:
                    self.told.append(self._open.tensor())
                    self._open = None
                self._next()

    def _next(self) -> None:
        self._left = next(self._sizes, -1)
        while self._left == 0:
            self.told.append(of(memoryview(b""), self._kind))
            self._left = next(self._sizes, -1)


def of(data: memoryview, kind: Kind = NOW) -> str:
    """The hash of a tensor's bytes, as tensors.json has it."""
    if kind == "xxh3":
        # The object lets go of the interpreter's lock. Where that isn't worth while the function is faster.
        return TAG + (xxh3_128_hexdigest(data) if len(data) < LARGE else xxh3_128(data).hexdigest())
    many = len(data) > LARGE and not fs.forked()
    return str(blake3(data, max_threads=blake3.AUTO if many else 1).hexdigest(length=SHORT))


def kind_of(digest: str) -> Kind:
    """What this hash of a tensor, or digest that ends in one, was computed by."""
    return "xxh3" if TAG in digest else "blake3"
