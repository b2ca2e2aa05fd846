"""lastgood.json, the commit record of a checkpoint: text <-> Manifest.

The last field, `digest`, is the BLAKE3 of every byte that comes before it, so a flipped bit
in the manifest itself is found like one in any other file.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any, ClassVar, TypeVar

import msgspec
from blake3 import blake3

from lastgood.errors import CorruptCheckpoint
from lastgood.format import strict
from lastgood.model import FORMAT, Manifest, Span

NAME = "lastgood.json"
LIMIT = 64 << 20
"""Largest manifest that is read (64 MiB)."""

_ID = re.compile(r"[0-9a-f]{16}")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\:]|^[A-Za-z]:")


class NewerFormat(CorruptCheckpoint):
    """Written by a later version of lastgood: readable there, left alone here."""

    code = "newer-format"


def encode(manifest: Manifest) -> bytes:
    """Indented JSON that ends with the digest of what comes before it."""
    fields = msgspec.to_builtins(manifest)
    if not manifest.layout:
        del fields["layout"]
    text = json.dumps(fields, indent=1, allow_nan=False, ensure_ascii=False).removesuffix("\n}") + ",\n "
    body = text.encode()
    return body + f'"digest": "{blake3(body).hexdigest()}"\n}}\n'.encode()


@functools.lru_cache(maxsize=256)
def decode(data: bytes, where: str) -> Manifest:
    """Raises CorruptCheckpoint, naming `where` and the reason, for anything that `encode` did not write.

    Remembered by content: a run that prunes after each save reads the same manifests again and again.
    """
    found = _decode(data, _WHOLE)
    if found is None:
        return _decode_slowly(data, where)
    _check(found, where)
    _check_hashes(found, where)
    return found


def outline(data: bytes, where: str) -> Manifest:
    """As `decode`, without arguments, environment and hashes: a fifth of the time, for listings of thousands."""
    found = _decode(data, _OUTLINE)
    if found is None:
        return _decode_slowly(data, where)
    manifest = Manifest(**{name: getattr(found, name) for name in _Outline.__struct_fields__})
    _check(manifest, where)
    return manifest


class _Size(msgspec.Struct, frozen=True):
    """A FileEntry whose hash isn't read."""

    size: int
    xxh3: ClassVar[str] = ""
    blake3: ClassVar[str] = ""
    hash: ClassVar[str] = ""
    kind: ClassVar[str] = "xxh3"


class _Outline(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    id: str
    run: str
    step: int
    seq: int
    lineage: tuple[Span, ...]
    parent: str | None = None
    created: float = 0.0
    parts: dict[str, tuple[str, ...]] = {}
    files: dict[str, _Size] = {}
    facts: dict[str, object] = {}
    layout: str = ""


_WHOLE = msgspec.json.Decoder(Manifest)
_OUTLINE = msgspec.json.Decoder(_Outline)
T = TypeVar("T", Manifest, _Outline)


def _decode(data: bytes, decoder: msgspec.json.Decoder[T]) -> T | None:
    if not _sealed(data):
        return None
    try:
        found = decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return found if found.format <= FORMAT else None


_SEAL = re.compile(rb'"digest": ?"([0-9a-f]{64})"\s*}\s*\Z')


def _sealed(data: bytes) -> bool:
    start = data.rfind(b'"digest"', -256)
    match = _SEAL.match(data, start) if start >= 0 else None
    return match is not None and blake3(memoryview(data)[:start]).hexdigest() == match[1].decode()


def _decode_slowly(data: bytes, where: str) -> Manifest:
    """What isn't sealed as above: a newer format, an early manifest (digest of the canonical JSON), or damage."""
    try:
        fields = strict.loads(data)
    except ValueError as error:
        raise CorruptCheckpoint(f"{where} isn't valid: {error}") from error
    if not isinstance(fields, dict):
        raise CorruptCheckpoint(f"{where} isn't valid: not a JSON object")
    version = fields.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormat(
            f"{where} has format {version}, this version of lastgood reads up to {FORMAT}",
            hint="use a newer lastgood; the checkpoint was left as it is",
        )
    digest = fields.pop("digest", None)
    try:
        known = digest == _digest(fields)
    except (ValueError, RecursionError):  # numbers and nesting that JSON can be read with, but not written
        known = False
    if not known and not _sealed(data):
        raise CorruptCheckpoint(f"{where} isn't valid: its digest doesn't match its content")
    try:
        manifest = msgspec.convert(fields, Manifest)
    except (msgspec.ValidationError, TypeError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{where} isn't valid: {error}") from error
    _check(manifest, where)
    _check_hashes(manifest, where)
    return manifest


def _check_hashes(manifest: Manifest, where: str) -> None:
    for name, entry in manifest.files.items():
        if bool(entry.xxh3) == bool(entry.blake3):
            raise CorruptCheckpoint(f"{where} isn't valid: {name} has {'two hashes' if entry.xxh3 else 'no hash'}")


def _check(manifest: Manifest, where: str) -> None:
    files = manifest.files
    unsafe = _unsafe(tuple(files))
    if unsafe is not None:
        raise CorruptCheckpoint(f"{where} names a file outside the checkpoint: {unsafe!r}")
    for name, entry in files.items():
        if entry.size < 0:
            raise CorruptCheckpoint(f"{where}: {name} has size {entry.size}")
    if _ID.fullmatch(manifest.id) is None:  # files beside the checkpoints are called by it
        raise CorruptCheckpoint(f"{where} isn't valid: its id is not 16 hex digits")
    known = all(name in files for names in manifest.parts.values() for name in names)
    if not known or manifest.step < 0 or manifest.seq < 1:
        raise CorruptCheckpoint(f"{where} isn't valid: step, number or part is out of range")


@functools.lru_cache(maxsize=256)
def _unsafe(names: tuple[str, ...]) -> str | None:
    """The first of them that may not be: the checkpoints of a run mostly have the same files."""
    return next((name for name in names if not safe_name(name) or name == NAME), None)


@functools.lru_cache(maxsize=4096)
def safe_name(name: str) -> bool:
    """Whether this is a relative path that stays inside, on every system: a/b.json, and nothing cleverer."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and part == part.rstrip(". ") and len(part) < 256 for part in parts)
    return plain and len(name) < 1024 and not _UNSAFE.search(name)


def _digest(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return blake3(canonical.encode()).hexdigest()
