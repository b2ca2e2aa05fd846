"""Whether a copy is what a tensor was at an earlier moment, by what was noted of it then.

Noting takes a part of the time that copying takes; otherwise nothing would be gained by copying later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from xxhash import xxh3_128_digest

from lastgood.format.tensors import Tensor

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

STRIDE = 2039
"""Words (of 8 bytes, so 16 KB) from one sample to the next: a prime, so that no column of a matrix is all there is."""


class Proof(Protocol):
    """What was noted of a tensor's bytes."""

    def holds(self, copy: Bytes) -> bool:
        """Whether these are the bytes that it was noted of, as far as it tells."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A hash of all bytes (XXH3-128): any change is seen, whoever made it. Two fifths of the time of a copy."""

    digest: bytes

    @classmethod
    def of(cls, data: Bytes) -> Whole:
        return cls(xxh3_128_digest(data.data))

    def holds(self, copy: Bytes) -> bool:
        return xxh3_128_digest(copy.data) == self.digest


@dataclass(frozen=True, slots=True)
class Sampled:
    """One word of each 16 KB, and the first and last bytes: a write to the whole tensor is seen. Next to no time."""

    words: bytes

    @classmethod
    def of(cls, data: Bytes) -> Sampled:
        return cls(_words(data))

    def holds(self, copy: Bytes) -> bool:
        return _words(copy) == self.words


def _words(data: Bytes) -> bytes:
    whole = data[: len(data) // 8 * 8].view(np.uint64)
    return whole[::STRIDE].tobytes() + data[-64:].tobytes()


def raw(entry: Tensor) -> Bytes:
    """The memory of an entry."""
    return np.frombuffer(entry.data, np.uint8)
