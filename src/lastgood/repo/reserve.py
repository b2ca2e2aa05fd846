"""The reserve: a file that holds blocks and an inode, and is given up where a full disk would stop what must go on.

Deleting writes as well: a strip replaces a manifest, a commit has one, an undo makes directories. On a disk without a
free byte they would fail, and the run could neither save nor make room. `.lastgood/reserve` is made while there is
room, and removed by the first of them that finds none; the next save with room makes it again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lastgood.repo.layout import hidden
from lastgood.store import local

NAME = "reserve"
SIZE = 1 << 20
"""Bytes (1 MiB): a manifest, the cards of lock and head and some lines of the journal take a tenth of it."""
FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


def make(root: Path) -> bool:
    """Whether it is there now. The caller holds the run's lock, and has looked whether there is room."""
    path = hidden(root, NAME)
    if local.size(path) == SIZE:
        return True
    try:
        if hidden(root).is_symlink():  # what is behind a link isn't ours
            return False
        local.remove(path)
        # Random bytes: zeros, or a length alone, take no blocks on file systems that compress or leave holes.
        local.write(path, [os.urandom(SIZE)])
    except OSError:
        return False
    return True


def held(root: Path) -> int:
    """Bytes that giving it up would free."""
    return local.size(hidden(root, NAME)) or 0


def give_up(root: Path) -> bool:
    """Remove it; whether it was there."""
    path = hidden(root, NAME)
    if local.size(path) is None or hidden(root).is_symlink():
        return False
    try:
        local.unlink(path)
    except OSError:
        return False
    return True


def spend(root: Path, action: Callable[[], T]) -> T:
    """`action`, and once more without the reserve if the disk, the inodes or the quota are used up.

    Only for what leaves nothing behind where it fails. Raises what `action` raises.
    """
    try:
        return action()
    except OSError as error:
        if error.errno not in FULL or not give_up(root):
            raise
    return action()
