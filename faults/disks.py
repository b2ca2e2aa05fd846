"""Small real file systems in image files, whose power can be cut: loop mounts, and FS_IOC_SHUTDOWN of ext4 and xfs.

The mounts are in a mount namespace of this process: they go when it ends, however it ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MAKE = {
    "ext4": (64 << 20, ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]),
    "xfs": (304 << 20, ["mkfs.xfs", "-q", "-f"]),
}
"""File system -> (bytes of the image, which is sparse; how it is made)."""

_SHUTDOWN = 0x8004587D
"""FS_IOC_SHUTDOWN of linux/fs.h, as of 6.x; XFS_IOC_GOINGDOWN is the same number."""
_NOLOGFLUSH = 2
_CLONE_NEWNS = 0x20000


@cache
def missing(kind: str) -> str:
    """Why this file system can't be had here; "" if it can."""
    if kind not in MAKE:
        return f"{kind} is none of {', '.join(MAKE)}"
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "only root can mount an image"
    if shutil.which(MAKE[kind][1][0]) is None:
        return f"{MAKE[kind][1][0]} isn't installed"
    try:
        with tempfile.TemporaryDirectory() as place:
            image = make(kind, Path(place) / "image")
            with mounted(image, Path(place) / "at") as disk:
                disk.cut()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        return f"{kind} can't be mounted from an image here: {said}"
    return ""


def make(kind: str, image: Path) -> Path:
    """A new file system of this kind. Raises CalledProcessError."""
    size, words = MAKE[kind]
    with image.open("wb") as file:
        file.truncate(size)
    command(*words, os.fspath(image))
    return image


def prepared(kind: str, image: Path, fill: Callable[[Path], object]) -> Path:
    """One that holds what `fill` puts under the path it is given, all of it on the disk."""
    make(kind, image)
    with mounted(image, image.with_suffix(".at")) as disk:
        fill(disk.at)
    return image


def copied(image: Path, target: Path) -> Path:
    """A copy that leaves the holes where they are."""
    command("cp", "--sparse=always", "--reflink=auto", os.fspath(image), os.fspath(target))
    return target


@dataclass(frozen=True, slots=True)
class Disk:
    """A mounted file system. at: where its root is."""

    at: Path

    def cut(self) -> None:
        """The power fails: what hasn't got to the disk by now never does, and every further call fails."""
        handle = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _NOLOGFLUSH))
        finally:
            os.close(handle)

    def commit(self) -> None:
        """Somebody else makes a file of their own durable: the journal, with all names in it, gets to the disk."""
        handle = os.open(self.at / ".other", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.write(handle, b"other")
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Disk]:
    """Mount an image, or a block device; what the journal holds is replayed. Raises CalledProcessError."""
    private()
    at.mkdir(exist_ok=True)
    loop = ["-o", "loop"] if not image.is_block_device() else []
    command("mount", *loop, os.fspath(image), os.fspath(at))
    try:
        yield Disk(at)
    finally:
        command("umount", os.fspath(at))


@cache
def private() -> None:
    """What is mounted from now on is seen by this process and its children alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")
    command("mount", "--make-rprivate", "/")


def command(*words: str) -> str:
    """What it prints. Raises CalledProcessError."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
