"""safetensors files, written and read by ourselves: own file descriptors, own hashes, stricter headers.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header
length, JSON header, tensor data without holes in the order of their offsets.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from lastgood.errors import CorruptCheckpoint, UsageError
from lastgood.format import strict
from lastgood.garbage import uncollected
from lastgood.store import local

HEADER_LIMIT = 100 << 20
"""Largest header that is read (100 MB, as the library)."""

ALIGNED = 64
"""Bytes: on the CPU torch begins each tensor at a multiple of it (gAlignment in its c10/core/alignment.h)."""

SMALL = 1 << 14
"""Bytes (16 KiB) below which tensors are gathered before they are written."""
GATHERED = 1 << 19
"""Bytes (512 KiB) of what is gathered: it stays in the cache of the processor."""

SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
"""Bytes per element of each dtype code."""

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's name of a dtype -> its code; the float8 variants exist only in newer versions of torch."""


class Tensor(NamedTuple):
    """One entry; `data` holds its elements in C order, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Slot(NamedTuple):
    """Where a tensor is in a file: bytes [begin, end) counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """slots in the order of the data."""

    slots: dict[str, Slot]
    metadata: dict[str, str]


def ordered(tensors: Iterable[Tensor]) -> list[Tensor]:
    """In the order of a file, see `place`. Raises UsageError for a dtype that no file can hold."""
    every = list(tensors)
    for tensor in every:
        if tensor.dtype not in SIZES:
            raise UsageError(f"tensor {tensor.name!r} has dtype {tensor.dtype}, which safetensors has no word for")
    # `place`, spelt out: for hundreds of thousands a call for each is half of the time.
    return sorted(every, key=lambda one: (len(one.data) % ALIGNED != 0, -SIZES[one.dtype], one.name))


def place(size: int, width: int, name: str) -> tuple[bool, int, str]:
    """What tensors are sorted by: those of whole `ALIGNED` bytes come first, then the others, wide dtypes first.

    So each begins at a multiple of its width, and each large one at a multiple of ALIGNED: it can be used where the
    file was read to, while it would have to be moved from where a scalar before it has pushed it.
    """
    return size % ALIGNED != 0, -width, name


def header_bytes(header: Mapping[str, object]) -> bytes:
    """The beginning of a file; what follows begins at a multiple of ALIGNED."""
    text = msgspec.json.encode(header)
    text += b" " * (-(8 + len(text)) % ALIGNED)
    return struct.pack("<Q", len(text)) + text


def encode(
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
    ready: Callable[[str], object] | None = None,
) -> tuple[int, Iterator[bytes | memoryview]]:
    """(bytes in total, the chunks of the file: its header, then each tensor, in the order of `ordered`).

    ready: called with the name of a tensor before its bytes are read. Raises UsageError for what no file can hold.
    """
    return laid_out(ordered(tensors), metadata, ready)


@uncollected()
def laid_out(
    every: Sequence[Tensor],
    metadata: Mapping[str, str] | None = None,
    ready: Callable[[str], object] | None = None,
) -> tuple[int, Iterator[bytes | memoryview]]:
    """`encode` of what is `ordered` already."""
    check(every)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape, data in every:
        end = offset + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    start = header_bytes(header)

    def pieces() -> Iterator[bytes | memoryview]:
        yield start
        for tensor in every:
            if ready is not None:
                ready(tensor.name)
            yield tensor.data

    return len(start) + offset, _gathered(pieces())


def check(tensors: Collection[Tensor]) -> None:
    """Raise UsageError for what no file can hold."""
    names = {"__metadata__"}
    for name, dtype, shape, data in tensors:
        if dtype not in SIZES:
            raise UsageError(f"tensor {name!r} has dtype {dtype}, which safetensors has no word for")
        if len(data) != SIZES[dtype] * math.prod(shape):
            raise UsageError(f"tensor {name!r} has {len(data)} bytes, not those of its shape")
        if name in names:
            raise UsageError(f"two tensors are called {name!r}")
        names.add(name)


def _gathered(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes, small ones in blocks: a call to the system for each of thousands of tensors is too much."""
    small: list[bytes | memoryview] = []
    count = 0
    for chunk in chunks:
        if len(chunk) < SMALL:
            small.append(chunk)
            count += len(chunk)
        if small and (count >= GATHERED or len(chunk) >= SMALL):
            yield b"".join(small)
            small, count = [], 0
        if len(chunk) >= SMALL:
            yield chunk
    if small:
        yield b"".join(small)


def read_header(path: Path) -> Header:
    """The header, checked: every byte of the file belongs to exactly one tensor. Raises CorruptCheckpoint."""
    try:
        with io.BufferedReader(local.opened(path)) as file:
            length = os.fstat(file.fileno()).st_size
            start = file.read(8)
            count = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= count <= min(HEADER_LIMIT, max(0, length - 8)):
                raise CorruptCheckpoint(f"{path}: no safetensors header ({length} bytes, header length {count})")
            text = file.read(count)
    except OSError as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error.strerror or error}") from error
    return _parse(path, text, 8 + count, length)


def _parse(path: Path, text: bytes, start: int, length: int) -> Header:
    try:
        raw = strict.loads(text)
        metadata = raw.pop("__metadata__", {})
        slots = {name: _slot(name, value, start) for name, value in raw.items()}
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items()):
            raise ValueError("metadata that isn't text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: bad safetensors header: {str(error)[:300]}") from error
    at = start
    ordered = dict(sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)))
    for name, slot in ordered.items():
        if slot.begin != at:
            raise CorruptCheckpoint(f"{path}: tensor {name[:200]!r} begins at byte {slot.begin}, expected {at}")
        at = slot.end
    if at != length:
        raise CorruptCheckpoint(f"{path}: its tensors end at byte {at}, the file has {length}")
    return Header(ordered, metadata)


def _slot(name: str, value: dict[str, object], start: int) -> Slot:
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"tensor {name[:100]!r} has dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 64:
        raise ValueError(f"tensor {name[:100]!r} has shape {shape!r}")
    for n in shape:  # no generator: there may be hundreds of thousands of tensors
        if type(n) is not int or not 0 <= n < 1 << 48:
            raise ValueError(f"tensor {name[:100]!r} has shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name[:100]!r} has offsets {offsets!r}")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or begin < 0 or end < 0:
        raise ValueError(f"tensor {name[:100]!r} has offsets {offsets!r}")
    if end - begin != SIZES[dtype] * math.prod(shape):
        raise ValueError(f"tensor {name[:100]!r} has not the bytes of {dtype}{str(shape)[:100]}")
    return Slot(dtype, tuple(shape), start + begin, start + end)


def load(path: Path) -> dict[str, Tensor]:
    """All tensors; their data are writable views into one buffer of the file's size. Raises CorruptCheckpoint."""
    header = read_header(path)
    length = max((slot.end for slot in header.slots.values()), default=0)
    buffer = bytearray(length)
    try:
        with local.opened(path) as file:
            view, at = memoryview(buffer), 0
            while at < length and (count := file.readinto(view[at:])):
                at += count
    except OSError as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error.strerror or error}") from error
    if at != length:
        raise CorruptCheckpoint(f"{path}: {at} bytes could be read, {length} expected")
    return {
        name: Tensor(name, slot.dtype, slot.shape, view[slot.begin : slot.end]) for name, slot in header.slots.items()
    }


def decode(path: Path, buffer: memoryview) -> dict[str, Tensor]:
    """All tensors of a file that was read, as writable views into it. Raises CorruptCheckpoint."""
    count = struct.unpack_from("<Q", buffer)[0] if len(buffer) >= 8 else 0
    if not 2 <= count <= min(HEADER_LIMIT, max(0, len(buffer) - 8)):
        raise CorruptCheckpoint(f"{path}: no safetensors header ({len(buffer)} bytes, header length {count})")
    header = _parse(path, bytes(buffer[8 : 8 + count]), 8 + count, len(buffer))
    return {
        name: Tensor(name, slot.dtype, slot.shape, buffer[slot.begin : slot.end]) for name, slot in header.slots.items()
    }
