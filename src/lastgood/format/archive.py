"""torch.save archives (zip files), read without torch and without executing what is pickled in them.

Layout (torch/serialization.py): `<prefix>/data.pkl` holds the object, each tensor's storage is
an uncompressed member `<prefix>/data/<key>`, little-endian.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastgood.errors import CorruptCheckpoint
from lastgood.format import inert
from lastgood.format.inert import Node
from lastgood.format.tensors import SIZES
from lastgood.store import local

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
"""torch's storage classes -> safetensors' codes."""
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "uint16": "U16", "uint32": "U32",
    "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""torch's dtype names -> safetensors' codes."""

_ERRORS = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, ValueError, LookupError, TypeError, AttributeError,
    ArithmeticError, RuntimeError,  # RuntimeError: an encrypted member, and nesting that is too deep
)  # fmt: skip
"""What a file raises that isn't what it says it is."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor in an archive: where its elements lie. begin: first byte in the file; strides in elements."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int
    limit: int  # first byte behind its storage

    @property
    def bytes(self) -> int:
        return SIZES[self.dtype] * math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    begin: int
    size: int


def load(path: Path, *, begin: int = 0, length: int | None = None) -> Any:
    """The object in an archive: dicts, lists, numbers, `Ref` for tensors and inert `Node` for everything else.

    begin, length: the archive is these bytes of the file. Raises CorruptCheckpoint.
    """
    try:
        with _open(path) as file:
            view = _Part(file, begin, os.fstat(file.fileno()).st_size - begin if length is None else length)
            with zipfile.ZipFile(view) as archive:
                names = {info.filename: info for info in _members(archive, view.length)}
                pickled = next(name for name in names if name.endswith("/data.pkl") or name == "data.pkl")
                prefix = pickled.removesuffix("data.pkl")
                if names[pickled].file_size > inert.LIMIT:
                    raise CorruptCheckpoint(f"{path}: its pickle has {names[pickled].file_size} bytes")
                data = archive.read(pickled)

                def storage(pid: Any) -> Any:
                    return _storage(pid, names, prefix, view, begin)

                tree = inert.loads(data, os.fspath(path), storage)
                return _resolve(inert.bounded(tree, 2 * len(data) + 1000), path)
    except StopIteration:
        raise CorruptCheckpoint(f"{path} isn't an archive of torch.save: no data.pkl in it") from None
    except _ERRORS as error:
        raise CorruptCheckpoint(f"{path.name} is damaged: {_reason(error)}") from error


def check(path: Path, *, full: bool, begin: int = 0, length: int | None = None) -> str:
    """What is wrong with the archive, in words; "" if nothing. full: every member's checksum, not the names alone."""
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size - begin if length is None else length
            with zipfile.ZipFile(_Part(file, begin, size)) as archive:
                members = _members(archive, size)
                broken = archive.testzip() if full else None
                beyond = [i.filename for i in members if i.header_offset + i.compress_size > size]
    except _ERRORS as error:
        return f"{path.name} is damaged: {_reason(error)}"
    if broken or beyond:
        return f"{path.name} is damaged: {broken or beyond[0]} fails its checksum"
    return ""


def _members(archive: zipfile.ZipFile, length: int) -> list[zipfile.ZipInfo]:
    """What is in the archive; ValueError for one that holds more bytes than its file: a bomb, or not torch's."""
    members = archive.infolist()
    packed = next((info.filename for info in members if info.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(f"{packed[:100]!r} is compressed, which torch never does")
    if sum(info.file_size for info in members) > length:
        raise ValueError("it says that it holds more bytes than the file has")
    return members


def is_archive(path: Path) -> bool:
    """Whether the file begins as a zip archive does."""
    try:
        with _open(path) as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, Ref]]:
    """(path of keys joined by dots, tensor) of everything in a tree."""
    if isinstance(tree, Ref):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from tensors(value, f"{prefix}.{index}" if prefix else str(index))


def number(value: Any) -> float | None:
    """A Python number, or the value of a tensor with one element."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) or abs(value) < 1 << 1000 else None
    codes = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}
    if not isinstance(value, Ref) or math.prod(value.shape) != 1 or value.dtype not in codes:
        return None
    with _open(value.file) as file:
        file.seek(value.begin)
        data = file.read(SIZES[value.dtype])
    return float(struct.unpack(codes[value.dtype], data)[0]) if len(data) == SIZES[value.dtype] else None


def _reason(error: BaseException) -> str:
    return str(error)[:200] or type(error).__name__


def _open(path: Path) -> io.BufferedReader:
    return io.BufferedReader(local.opened(path))


class _Part(io.RawIOBase):
    """A stretch of a file as a file of its own: DCP puts one archive behind the other."""

    def __init__(self, file: io.BufferedReader, begin: int, length: int) -> None:
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, (0, self.at, self.length)[whence] + offset)
        return self.at

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self.length - self.at)
        self.file.seek(self.begin + self.at)
        data = self.file.read(left if count is None or count < 0 else min(count, left))
        self.at += len(data)
        return data


def _storage(pid: Any, names: dict[str, zipfile.ZipInfo], prefix: str, view: _Part, base: int) -> Any:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise CorruptCheckpoint("a persistent id that isn't a storage's")
    kind = str(getattr(pid[1], "inert", pid[1])).rpartition(".")[2]
    if not isinstance(pid[2], str):
        raise CorruptCheckpoint("a persistent id that isn't a storage's")
    info = names[f"{prefix}data/{pid[2]}"]
    view.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", view.read(4))
    begin = base + info.header_offset + 30 + name_length + extra_length
    if info.header_offset < 0 or begin + info.file_size > base + view.length:
        raise CorruptCheckpoint("a storage that ends behind the end of its file")
    return _Storage(STORAGES.get(kind, "U8"), begin, info.file_size)


def _resolve(value: Any, path: Path, depth: int = 0) -> Any:
    """Nodes that rebuild tensors become `Ref`s; those of plain containers become these."""
    if depth > 100:
        raise CorruptCheckpoint(f"{path}: nested too deeply")
    go: Callable[[Any], Any] = lambda item: _resolve(item, path, depth + 1)  # noqa: E731
    if isinstance(value, dict):
        return {key: go(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [go(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if not isinstance(value, Node):
        return value
    if value.name == "torch._utils._rebuild_parameter":
        return go(value.args[0])
    if value.name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return _tensor(value.args[0], value.args, path, None)
    if value.name == "torch._utils._rebuild_tensor_v3":
        return _tensor(value.args[0], value.args, path, str(getattr(value.args[6], "inert", "")))
    if value.name == "torch.Size":
        return tuple(extent for extent in value.args[0] if type(extent) is int)
    if value.name == "collections.defaultdict":
        return go(value.pairs)
    return value


def _tensor(storage: Any, args: tuple[Any, ...], path: Path, dtype: str | None) -> Ref:
    if not isinstance(storage, _Storage):
        raise CorruptCheckpoint(f"{path}: a tensor without a storage")
    offset, shape, strides = args[1:4]
    code = DTYPES.get((dtype or "").rpartition(".")[2], storage.dtype)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise CorruptCheckpoint(f"{path}: a tensor with an impossible shape or strides")
    width = SIZES[code]
    begin, limit = storage.begin + offset * width, storage.begin + storage.size
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if all(shape) else 0
    if begin + last * width > limit:
        raise CorruptCheckpoint(f"{path}: a tensor reaches beyond its storage")
    return Ref(path, code, tuple(shape), tuple(strides), begin, limit)
