"""Full disks: which operation meets which rest of bytes or inodes, and real small file systems to try it on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

PAGE = 4096
OPERATIONS = ("save", "save and prune", "prune", "strip", "undo", "tag", "adopt", "record")
PAGES = 50
"""From none to so many pages less one are left: more than any of the operations takes on the small run."""
INODES = 20


class Point(NamedTuple):
    """left: pages or inodes that the disk still has when the operation begins. reserve: whether the run has one."""

    number: int
    operation: str
    kind: Literal["pages", "inodes"]
    left: int
    reserve: bool

    def __str__(self) -> str:
        return f"{self.number}-{self.operation}-{self.left}-{self.kind}{'' if self.reserve else '-no-reserve'}"


def points() -> list[Point]:
    """All of them, in an order that never changes."""
    rests = [("pages", left) for left in range(PAGES)] + [("inodes", left) for left in range(INODES)]
    every = [(operation, *rest, reserve) for operation in OPERATIONS for rest in rests for reserve in (True, False)]
    return [Point(number, *one) for number, one in enumerate(every)]  # type: ignore[arg-type]


@contextmanager
def disk(place: Path, *, size: int, inodes: int = 1000) -> Iterator[bool]:
    """A file system of its own in this directory; False where nobody may mount one."""
    place.mkdir(parents=True, exist_ok=True)
    options = f"size={size},nr_inodes={inodes}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def leave(place: Path, *, pages: int | None = None, inodes: int | None = None) -> None:
    """Use the disk up until just so much is left, of either or of both."""
    filler = place / "filler"
    filler.mkdir(exist_ok=True)
    room = os.statvfs(place)
    for number in range(0 if inodes is None else room.f_favail - inodes - (pages is not None)):
        (filler / f"{number}").touch()
    if pages is not None:
        rest = os.statvfs(place).f_bavail * room.f_frsize - pages * PAGE
        if rest > 0:
            with open(filler / "bytes", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, rest)


def relieve(place: Path) -> None:
    """Give back what `leave` took."""
    for path in (place / "filler").iterdir():
        path.unlink()
    (place / "filler").rmdir()
