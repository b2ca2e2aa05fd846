"""Bytes of the files that tensors are put into, with headers, paddings and tables: small models are right as well."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import NamedTuple

from lastgood.format.tensors import SIZES, header_bytes, place

METADATA = {"format": "pt"}
SHARD = 50_000_000_000
"""Bytes of weights from which on save_pretrained starts another file (its max_shard_size of 50 GB)."""


class Entry(NamedTuple):
    """One tensor of a file, by its name there and its safetensors dtype code."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its elements."""
        return SIZES[self.dtype] * math.prod(self.shape)


def safetensors_size(entries: Iterable[Entry], *, ours: bool) -> int:
    """Bytes of one safetensors file: the JSON header with its length, padded, and the elements.

    ours: as lastgood writes it, in its own order and with the header padded to 64 bytes; else as the library, to 8.
    """
    header: dict[str, object] = {"__metadata__": METADATA}
    offset = 0
    for entry in sorted(entries, key=lambda entry: place(entry.size if ours else 0, SIZES[entry.dtype], entry.name)):
        end = offset + entry.size
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    if ours:
        return len(header_bytes(header)) + offset
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + text + -text % 8 + offset


def weights_size(entries: Iterable[Entry], *, ours: bool) -> int:
    """As save_pretrained writes them: one file, or shards of at most 50 GB and an index."""
    entries = tuple(entries)
    total = safetensors_size(entries, ours=ours)
    if total <= SHARD:
        return total
    return total + 100 + sum(len(entry.name) + 45 for entry in entries)


def archive_size(name: str, tensors: Iterable[int], pickle: int) -> int:
    """Bytes of a torch.save archive with tensors of these many bytes each and a pickle of `pickle` bytes.

    A zip file without compression: each record has a header, its data aligned to 64 bytes, a descriptor of 16 bytes
    (24 from 4 GB on) and an entry in the directory at the end (torch: caffe2/serialize/inline_container.cc).
    """
    records = [("data.pkl", pickle), (".format_version", 1), (".storage_alignment", 2), ("byteorder", 6)]
    records += [(f"data/{number}", size) for number, size in enumerate(tensors)]
    records += [("version", 2), (".data/serialization_id", 40)]
    at = directory = 0
    for record, size in records:
        large = size >= 1 << 32 or at >= 1 << 32
        length = len(name) + 1 + len(record)
        start = at + 34 + length + (20 if large else 0)
        at = start + 64 - start % 64 + size + (24 if large else 16)
        directory += 46 + length + (28 if large else 0)
    return at + directory + 22 + (76 if at >= 1 << 32 else 0)
