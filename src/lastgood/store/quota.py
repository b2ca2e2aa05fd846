"""The user's quota on a Linux file system, by quotactl(2); None everywhere else."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

from lastgood.store import local

_GETQUOTA = 0x800007
_BLOCK = 1024
"""Limits are in blocks of 1024 bytes (linux/quota.h, QIF_DQBLKSIZE)."""


class _Dqblk(ctypes.Structure):
    _fields_ = [
        ("hard", ctypes.c_uint64),
        ("soft", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        *[(f"inode_{name}", ctypes.c_uint64) for name in ("hard", "soft", "used")],
        *[(f"time_{name}", ctypes.c_uint64) for name in ("block", "inode")],
        ("valid", ctypes.c_uint32),
    ]


def quota(path: Path) -> tuple[int, int] | None:
    """(bytes used, bytes allowed) of this user where `path` lies; None if there is no quota or nobody says."""
    block = _asked(path)
    limit = 0 if block is None else (block.hard or block.soft) * _BLOCK
    return (block.used, limit) if block is not None and limit else None


def _asked(path: Path) -> _Dqblk | None:
    device = _device(path) if sys.platform == "linux" else None
    if device is None:
        return None
    block = _Dqblk()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.quotactl(ctypes.c_int(_GETQUOTA << 8), device.encode(), os.getuid(), ctypes.byref(block)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return block


def room(path: Path) -> int:
    """Bytes that this user can still write there, by the disk and by the quota."""
    return left(path)[0]


def left(path: Path) -> tuple[int, int]:
    """(bytes, files) that this user can still write and make there; files: -1 where nobody counts them."""
    (free, inodes), block = local.free(path), _asked(path)
    if block is None:
        return free, inodes
    if limit := (block.hard or block.soft) * _BLOCK:
        free = min(free, max(0, int(limit - block.used)))
    if limit := block.inode_hard or block.inode_soft:
        spare = max(0, int(limit - block.inode_used))
        inodes = spare if inodes < 0 else min(inodes, spare)
    return free, inodes


def _device(path: Path) -> str | None:
    """The block device that a path lies on; None where nobody says."""
    try:
        return _mounted(os.stat(path).st_dev)
    except (OSError, IndexError):
        return None


@cache
def _mounted(number: int) -> str | None:
    """Of the device with this number, from /proc/self/mountinfo (proc(5)): hundreds of lines on some, so read once."""
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            source = rest.split()[1]
            return source if source.startswith("/dev/") else None
    return None
