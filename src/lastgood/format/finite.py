"""NaN and infinity in stored tensors, found without torch or numpy: an exponent of all ones in the bytes themselves.

IEEE 754 and its short forms: a number whose exponent has all bits set is no number, or infinite. Elements are little-
endian, so the exponent lies in the last one or two bytes of each: they are taken out by strided slices.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from lastgood.store import local

CHUNK = 4 << 20
"""Bytes that are looked at in one go; a multiple of every width."""
SHARE = 64 << 10
"""At least so many bytes of each tensor are looked at, however small the budget is."""


class Stretch(NamedTuple):
    """A tensor's elements: bytes [begin, end) of a file."""

    name: str
    dtype: str
    begin: int
    end: int


class Bad(msgspec.Struct, frozen=True):
    """A tensor with elements that aren't numbers. count: of those that were looked at. first: what the first is."""

    name: str
    count: int
    looked_at: int
    first: float


def _table(holds: Callable[[int], bool]) -> bytes:
    return bytes(int(holds(byte)) for byte in range(256))


_ONES = _table(lambda byte: byte & 0x7F == 0x7F)  # sign, then seven bits of the exponent
_TOP_BIT = _table(lambda byte: byte & 0x80 == 0x80)
_TOP_NIBBLE = _table(lambda byte: byte & 0xF0 == 0xF0)
_FIVE = _table(lambda byte: byte & 0x7C == 0x7C)
_NEGATIVE_ZERO = _table(lambda byte: byte == 0x80)
_ALL = _table(lambda byte: byte == 0xFF)

_FORMS: dict[str, tuple[int, bytes, bytes | None, str]] = {
    "F64": (8, _ONES, _TOP_NIBBLE, "<d"),
    "F32": (4, _ONES, _TOP_BIT, "<f"),
    "C64": (4, _ONES, _TOP_BIT, "<f"),
    "BF16": (2, _ONES, _TOP_BIT, ""),
    "F16": (2, _FIVE, None, "<e"),
    "F8_E4M3": (1, _ONES, None, ""),  # it has no infinity
    "F8_E5M2": (1, _FIVE, None, ""),
    "F8_E4M3FNUZ": (1, _NEGATIVE_ZERO, None, ""),
    "F8_E5M2FNUZ": (1, _NEGATIVE_ZERO, None, ""),
    "F8_E8M0": (1, _ALL, None, ""),
}
"""Code -> (bytes of a part, what its last byte shows, what the one before shows, how struct reads it)."""


def places(data: bytes | memoryview, dtype: str) -> bytes:
    """One byte per element, 1 where it is NaN or infinite; b"" if there is none, or the type has none."""
    if dtype not in _FORMS:
        return b""
    width, last, before, _ = _FORMS[dtype]
    data = bytes(data)
    high = data[width - 1 :: width].translate(last)
    if b"\1" not in high or before is None:
        return high if b"\1" in high else b""
    low = data[width - 2 :: width].translate(before)
    # Both at once, by one operation on large numbers: a loop over what looks suspicious would be slow on purpose.
    both = int.from_bytes(high, "little") & int.from_bytes(low, "little")
    return both.to_bytes(len(high), "little") if both else b""


def value(data: bytes | memoryview, dtype: str, index: int) -> float:
    """The element that stands at `index`, for types of which struct knows the form; NaN for the others."""
    width, _, _, form = _FORMS[dtype]
    piece = bytes(data[index * width : (index + 1) * width])
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + piece)[0])
    return float(struct.unpack(form, piece)[0]) if form else float("nan")


def look(path: Path, stretches: Iterable[Stretch], budget: int | None) -> tuple[list[Bad], int]:
    """(tensors that hold NaN or infinity, bytes that were read). budget: about so many bytes, None for all of them.

    With a budget the beginning of every tensor is looked at: a step that went wrong spoils nearly all of them.
    Tensors that hold nothing worse than minus infinity are masks, and left out. Raises OSError.
    """
    known = [stretch for stretch in stretches if stretch.dtype in _FORMS and stretch.end > stretch.begin]
    share = None if budget is None else max(SHARE, budget // max(1, len(known)))
    found, read = [], 0
    with local.opened(path) as file:
        for stretch in known:
            if budget is not None and read >= budget + SHARE:
                break
            length = stretch.end - stretch.begin if share is None else min(share, stretch.end - stretch.begin)
            bad, done = _tensor(file.fileno(), stretch, length)
            read += done
            found += [bad] if bad is not None else []
    return found, read


def _tensor(handle: int, stretch: Stretch, length: int) -> tuple[Bad | None, int]:
    width = _FORMS[stretch.dtype][0]
    at, count, first, masked = stretch.begin, 0, 0.0, True
    end = stretch.begin + length - length % width
    while at < end:
        data = _read(handle, at, min(CHUNK, end - at))
        data = data[: len(data) - len(data) % width]
        if not data:
            break
        marks = places(data, stretch.dtype)
        if marks:
            seen = [value(data, stretch.dtype, index) for index in _indices(marks)]
            if masked and any(number != float("-inf") for number in seen):
                masked, first = False, next(number for number in seen if number != float("-inf"))
            count += marks.count(1)
        at += len(data)
    looked_at = (at - stretch.begin) // width
    return (Bad(stretch.name, count, looked_at, first) if count and not masked else None), at - stretch.begin


def _indices(marks: bytes, limit: int = 1000) -> list[int]:
    """Where the first ones are."""
    found, at = list[int](), -1
    while len(found) < limit and (at := marks.find(b"\1", at + 1)) >= 0:
        found.append(at)
    return found


def _read(handle: int, at: int, count: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(handle, count, at)
    os.lseek(handle, at, os.SEEK_SET)
    return os.read(handle, count)
