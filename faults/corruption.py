"""Damage to a checkpoint, file by file, block of 4 KiB by block, kind by kind: what there is to try, and doing it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

BLOCK = 4096
IN_BLOCK = ("flip", "zero", "truncate")
OF_FILE = ("append", "swap", "delete", "symlink", "fifo", "directory")
KINDS = (*IN_BLOCK, *OF_FILE)


class Point(NamedTuple):
    """file: relative to where the files are. block: number of the 4 KiB block, 0 for what befalls a whole file."""

    number: int
    file: str
    block: int
    kind: str

    def __str__(self) -> str:
        return f"{self.number}-{self.kind}-{self.file.replace('/', '.')}-{self.block}"


def points(files: Mapping[str, int]) -> list[Point]:
    """Every damage to files of these sizes, in an order that never changes; an empty file has no block."""
    found = []
    for file in sorted(files):
        blocks = -(-files[file] // BLOCK)
        found += [(file, block, kind) for block in range(blocks) for kind in IN_BLOCK]
        found += [(file, 0, kind) for kind in OF_FILE]
    return [Point(number, *one) for number, one in enumerate(found)]


def sizes(directory: Path) -> dict[str, int]:
    """Relative name -> bytes of every file in a directory, links left out."""
    paths = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}


def damage(directory: Path, point: Point, other: str = "") -> bool:
    """Do it; False if the file is the same as before (a block of zeros was zeroed).

    other: the file that it is swapped with; where it lies outside, that one stays.
    """
    path = directory / point.file
    before = path.read_bytes()
    at = point.block * BLOCK
    if point.kind == "flip":
        # The place differs from block to block, so that all of one are hit somewhere.
        place = min(at + (point.number * 977) % BLOCK, len(before) - 1)
        _rewrite(path, before[:place] + bytes([before[place] ^ 1 << point.number % 8]) + before[place + 1 :])
    elif point.kind == "zero":
        end = min(at + BLOCK, len(before))
        _rewrite(path, before[:at] + bytes(end - at) + before[end:])
    elif point.kind == "truncate":
        _rewrite(path, before[:at])
    elif point.kind == "append":
        _rewrite(path, before + b"\0")
    elif point.kind == "swap":
        theirs = (directory / other).read_bytes()
        _rewrite(path, theirs)
        if not other.startswith(".."):
            _rewrite(directory / other, before)
        return theirs != before
    else:
        _replace(path, point.kind)
        return True
    return path.read_bytes() != before


def _replace(path: Path, kind: str) -> None:
    if kind == "symlink":  # what it leads to has the right bytes
        path.rename(path.with_name(f"{path.name}.aside"))
        path.symlink_to(f"{path.name}.aside")
        return
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()


def _rewrite(path: Path, data: bytes) -> None:
    """In place, with the times that it had: nothing but its content tells."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
