"""What the bytes of damaged files say: cut off, empty, never written, or something else under this name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.named import instead
from lastgood.doctor.rule import Look, Sight
from lastgood.doctor.rules.resume_disk import aside, disk_of, severity_of
from lastgood.errors import CorruptCheckpoint
from lastgood.format import archive
from lastgood.format.tensors import HEADER_LIMIT, read_header
from lastgood.model import Record
from lastgood.store import local

MANY = 50
"""Incomplete checkpoints whose files are looked at."""
ARCHIVES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
LEGACY = (b"\x80\x02\x8a\x0a", b"\x80\x02}", b"\x80\x02c")
"""How torch.save began its files before it wrote zip archives."""
SMALLEST = 10
"""Bytes of the smallest safetensors file: a length and {}."""


class Fault(msgspec.Struct, frozen=True):
    """One damaged file. what: in words, the name of the file left out."""

    code: str
    record: Record
    name: str
    what: str


def suspects(disk: Disk) -> list[Record]:
    """The close ones, and those that are known to be incomplete."""
    broken = [r for r in disk.records if r.state == "incomplete"][-MANY:]
    return list({r.name: r for r in (*disk.close, *broken)}.values())


_FAULTS: WeakKeyDictionary[Disk, tuple[Fault, ...]] = WeakKeyDictionary()


def faults(disk: Disk) -> tuple[Fault, ...]:
    """Every damaged file of them that can be told by its bytes. Six rules ask, so it is remembered with the disk."""
    if disk not in _FAULTS:
        _FAULTS[disk] = tuple(fault for record in suspects(disk) for fault in faults_of(disk, record))
    return _FAULTS[disk]


def faults_of(disk: Disk, record: Record) -> Iterator[Fault]:
    """Those of one checkpoint."""
    folder = disk.path(record)
    for name, size in disk.files(record).items():
        path = folder / name if folder.is_dir() else folder
        found = None
        if name.endswith(".safetensors"):
            found = tensors_fault(path, size)
        elif name.endswith(ARCHIVES):
            found = archive_fault(path, size)
        if found is not None:
            yield Fault(found[0], record, name, found[1])


def tensors_fault(path: Path, size: int) -> tuple[str, str] | None:
    """(code, what is wrong) with a safetensors file; None if nothing, or nothing that is known to be wrong."""
    if size < SMALLEST:
        return "CKC001", f"has {size} bytes: nothing, or next to nothing of it reached the disk"
    try:
        read_header(path)
        return None
    except CorruptCheckpoint:
        pass
    head = _head(path)
    if not head:
        return "CKC010", "can't be read"
    other = begins_as(head)
    if other:
        return "CKC003", other
    (length,) = struct.unpack("<Q", head[:8])
    if length == 0:
        zero = not head.strip(b"\0")
        return "CKC004", f"begins with zero bytes ({size} in all): its content never reached the disk" if zero else (
            "says that its header has 0 bytes"
        )
    if length > HEADER_LIMIT:
        return "CKC003", f"isn't safetensors: it begins with {head[:16]!r}"
    if length > size - 8:
        return "CKC002", f"was cut off in its header: {size} bytes, the header alone has {length}"
    return _by_header(path, size, length)


def _by_header(path: Path, size: int, length: int) -> tuple[str, str] | None:
    try:
        with open(path, "rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        end = max((_end(entry) for name, entry in header.items() if name != "__metadata__"), default=0)
    except OSError:
        return None
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        return "CKC004", f"has a header that isn't one: {str(error)[:100] or type(error).__name__}"
    want = 8 + length + end
    if want == size:
        return None  # a type of tensor that isn't known here, perhaps
    if want > size:
        return "CKC002", f"was cut off: {size} bytes of {want}, {100 * size // want} % of it"
    return "CKC002", f"has {size - want} bytes more than its header describes"


def _end(entry: Any) -> int:
    end = entry["data_offsets"][1]
    if type(end) is not int or end < 0:
        raise ValueError("an offset that isn't a number")
    return end


def begins_as(head: bytes) -> str:
    """What a file is that isn't what its name says, by its first bytes; "" if they tell nothing."""
    start = head.lstrip()[:64].lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a git-LFS pointer: the file itself was never downloaded"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"is a web page, an error page most likely: {head[:40]!r}"
    if start.startswith((b"entry not found", b"invalid username", b"access to", b"repository not found", b'{"error')):
        return f"is the message of a server: {head[:60]!r}"
    if head.startswith(b"PK\x03\x04"):
        return "is a zip archive, as torch.save writes it: rename it to .bin or .pt"
    if head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05":
        return "is a pickle, as torch.save wrote it until 1.6: rename it to .bin or .pt"
    if head.startswith(b"GGUF"):
        return "is a GGUF model, for llama.cpp"
    if head.startswith(b"\x1f\x8b"):
        return "is compressed by gzip"
    return ""


def archive_fault(path: Path, size: int) -> tuple[str, str] | None:
    """(code, what is wrong) with a file of torch.save; None for whole ones, and for old ones that nothing can tell."""
    if size == 0:
        return "CKC006", "is empty (0 bytes)"
    head = _head(path)
    if not head or head.startswith(LEGACY):
        return None
    if head.startswith(b"PK"):
        why = archive.check(path, full=False)
        return ("CKC005", f"was cut off: {size} bytes, and a zip archive has its table at the end") if why else None
    if not head.strip(b"\0"):
        return "CKC005", f"begins with zero bytes ({size} in all): its content never reached the disk"
    other = begins_as(head)
    return ("CKC003", other) if other and "pickle" not in other else None


def _head(path: Path) -> bytes:
    try:
        return local_head(path)
    except OSError:
        return b""


def local_head(path: Path, count: int = 64) -> bytes:
    """The first bytes; never those of a device or behind a link."""
    if local.size(path) is None:
        return b""
    with open(path, "rb") as file:
        return file.read(count)


def seen(code: str) -> Look:
    """The look of the rule with this code: its faults on disk."""

    def look(case: Case) -> Iterator[Sight]:
        disk = disk_of(case)
        for fault in faults(disk):
            if fault.code == code:
                yield sight(case, fault)

    return look


def sight(case: Case, fault: Fault) -> Sight:
    """What there is to say about one damaged file."""
    disk = disk_of(case)
    return Sight(
        saw=f"{fault.name} {fault.what}",
        where=fault.record.name,
        evidence=_size_of_others(disk, fault),
        severity=severity_of(disk, fault.record),
        fix=instead(disk),
        repair=aside(case, fault.record),
    )


def _size_of_others(disk: Disk, fault: Fault) -> tuple[str, ...]:
    """How large the same file is in the nearest other checkpoint: that is how large it should be."""
    for other in sorted(disk.close, key=lambda r: abs(r.step - fault.record.step)):
        size = disk.files(other).get(fault.name) if other.name != fault.record.name else None
        if size:
            return (f"in {other.name} it has {size} bytes",)
    return ()


def changed(case: Case) -> Iterator[Sight]:
    """CKC008: what has a hash or a checksum, and isn't what was saved."""
    disk = disk_of(case)
    for record in suspects(disk):
        known = {fault.name for fault in faults(disk) if fault.record.name == record.name}
        if record.id or not record.layout:
            found = [record.problem] if record.problem else []
            found = list(disk.problems(record)) if disk.full and not found else found
        else:
            found = [why for why in disk.problems(record) if "fails its checksum" in why] if disk.full else []
        found = [part for why in found for part in why.split("; ") if not any(name in part for name in known)]
        if found:
            yield Sight(
                saw="; ".join(found[:3]),
                where=record.name,
                evidence=(f"{len(found)} files differ",) if len(found) > 3 else (),
                severity=severity_of(disk, record),
                fix=("copy it again from where it came, if there is another copy", *instead(disk)),
                repair=aside(case, record),
            )


def mount(path: Path) -> str:
    """Type and place of the file system that a directory lies on, by Linux's own table; "" elsewhere."""
    try:
        lines = Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()
        real = os.path.realpath(path)
    except OSError:
        return ""
    best = ("", "")
    for line in lines:
        _, place, kind, *_ = [*line.split(" "), "", "", ""]
        place = place.replace("\\040", " ")
        if (real == place or real.startswith(place.rstrip("/") + "/")) and len(place) >= len(best[0]):
            best = (place, kind)
    return f"{path} is on {best[1]}, mounted at {best[0]}" if best[0] else ""
