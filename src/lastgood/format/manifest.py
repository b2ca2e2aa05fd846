"""lastgood.json, the commit record of a checkpoint: text <-> Manifest.

The last field, `digest`, is the BLAKE3 of everything else in canonical form (keys sorted,
no spaces), so a flipped bit in the manifest itself is found like one in any other file.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import msgspec
from blake3 import blake3

from lastgood.errors import CorruptCheckpoint
from lastgood.format import strict
from lastgood.model import FORMAT, Manifest

NAME = "lastgood.json"
LIMIT = 64 << 20
"""Largest manifest that is read (64 MiB)."""

_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\:]|^[A-Za-z]:")


class NewerFormat(CorruptCheckpoint):
    """Written by a later version of lastgood: readable there, left alone here."""

    code = "newer-format"


def encode(manifest: Manifest) -> bytes:
    """Indented JSON that ends with the digest of what comes before it."""
    fields = msgspec.to_builtins(manifest)
    text = json.dumps({**fields, "digest": _digest(fields)}, indent=1, allow_nan=False, ensure_ascii=False)
    return f"{text}\n".encode()


@functools.lru_cache(maxsize=256)
def decode(data: bytes, where: str) -> Manifest:
    """Raises CorruptCheckpoint, naming `where` and the reason, for anything that `encode` did not write.

    Remembered by content: a run that prunes after each save reads the same manifests again and again.
    """
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
    if digest != _digest(fields):
        raise CorruptCheckpoint(f"{where} isn't valid: its digest doesn't match its content")
    try:
        manifest = msgspec.convert(fields, Manifest)
    except (msgspec.ValidationError, TypeError) as error:
        raise CorruptCheckpoint(f"{where} isn't valid: {error}") from error
    _check(manifest, where)
    return manifest


def _check(manifest: Manifest, where: str) -> None:
    for name, entry in manifest.files.items():
        if not safe_name(name) or name == NAME:
            raise CorruptCheckpoint(f"{where} names a file outside the checkpoint: {name!r}")
        if entry.size < 0:
            raise CorruptCheckpoint(f"{where}: {name} has size {entry.size}")
    unknown = {name for names in manifest.parts.values() for name in names} - manifest.files.keys()
    if unknown or manifest.step < 0 or manifest.seq < 1:
        raise CorruptCheckpoint(f"{where} isn't valid: step, number or part is out of range")


def safe_name(name: str) -> bool:
    """Whether this is a relative path that stays inside, on every system: a/b.json, and nothing cleverer."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and part == part.rstrip(". ") and len(part) < 256 for part in parts)
    return plain and len(name) < 1024 and not _UNSAFE.search(name)


def _digest(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return blake3(canonical.encode()).hexdigest()
