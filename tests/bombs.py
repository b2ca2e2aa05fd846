"""Small files that ask for much memory or time when they are read."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Iterable

from parsers import TARGETS


def _header(fields: str) -> bytes:
    text = fields.encode()
    return len(text).to_bytes(8, "little") + text


@functools.lru_cache
def _packed(mebibytes: int) -> bytes:
    """An archive with so many zeros under a name that torch reads; the pieces are packed alike, so one is enough."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    data, size, name = piece * mebibytes + b"\x03\0", mebibytes << 20, b"archive/data.pkl"
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, 0, len(data), size, len(name), 0)
    entry = b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    local = b"PK\x03\x04" + common + name + data
    return local + entry + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)


def bombs() -> Iterable[tuple[str, bytes]]:
    """(target, bytes) of what grows when it is read."""
    deep = 10**6
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    yield "tensors", _header("{" + ",".join(f'"t{n}":{empty}' for n in range(30_000)) + "}")
    yield "tensors", _header('{"w":{"dtype":"F32","shape":[4611686018427387904,0],"data_offsets":[0,0]}}')
    yield "tensors", _header('{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}')
    yield "tensors", _header('{"w":{"dtype":"F32","shape":[' + "65536," * 3000 + '1],"data_offsets":[0,4]}}')
    yield "tensors", _header("[" * deep + "]" * deep)
    yield "tensors", _header("{" + '"a":{},' * 300_000 + '"b":{}}')
    yield "zipped", _packed(2048)
    yield "unpickled", _packed(2048)
    yield "foreign", _packed(2048)
    for name in TARGETS:
        if TARGETS[name].text or name in ("tensors",):
            continue
        yield name, b"[" * deep + b"]" * deep
        yield name, b'{"a":' * deep + b"1" + b"}" * deep
        yield name, b'{"format": 1, "next": 1' + b"0" * 100_000 + b"}"
    deep = 10**5
    for text in (b"(" * deep, b"1" * deep, b"-" * deep, b"a" * deep, b"~1" * deep, b"best:" * deep, b"_" * deep):
        for name in TARGETS:
            if TARGETS[name].text:
                yield name, text
    yield "settings", b"a: &a [x]\n" + b"".join(b"b%d: &b%d [*%s, *%s]\n" % (n, n, p, p) for n, p in _chain(28))
    yield "console", b"\x1b[" * 300_000
    yield "console", b"ValueError: x\n\nDuring handling of the above exception, another exception occurred:\n\n" * 5_000


def _chain(length: int) -> Iterable[tuple[int, bytes]]:
    return ((n, b"a" if n == 0 else b"b%d" % (n - 1)) for n in range(length))
