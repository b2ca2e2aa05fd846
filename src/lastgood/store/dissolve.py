"""Gigabytes are given back to the disk piece by piece: others that make something durable meanwhile hardly notice.

A file system that is told to forget a large file does so in one go, and every fsync waits for it (a second and more for
each gigabyte on slow disks). Cut shorter by 64 MiB at a time it is as quick, and in between the others have their turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from lastgood.store import fs, local

STEP = 64 << 20
"""Bytes (64 MiB) that a file is cut shorter by; smaller ones are removed as a whole."""
PAUSE = 0.01
"""Seconds between two cuts."""


def dissolve(
    directory: Path, *, step: int = STEP, hurry: Callable[[], object] = bool, over: Callable[[], object] = bool
) -> bool:
    """Remove a directory that nobody looks for any more; False if `over` ended it before, and there is a rest.

    hurry: asked whether somebody waits for it: then without pauses. Raises OSError.
    """
    large = [path for path in sorted(directory.rglob("*")) if (local.size(path) or 0) > step]
    if large:
        # A power cut must not bring it back to where it was moved from, without its end.
        local.sync_dir(directory.parent)
    for path in large:
        if not _cut(path, step, hurry, over):
            return False
    if over():
        return False
    local.remove(directory)
    return True


def _cut(path: Path, step: int, hurry: Callable[[], object], over: Callable[[], object]) -> bool:
    handle = local.reopened(path)
    try:
        status = os.fstat(handle)
        # A file with another name is another checkpoint's, or somebody's copy. Who has it open reads on in what was
        # removed, as ever; cut, it would end in the middle.
        if status.st_nlink != 1 or not fs.system.alone(handle):
            return True
        for end in range((status.st_size - 1) // step * step, 0, -step):
            if over():
                return False
            fs.system.truncate(handle, end)
            if not hurry():
                time.sleep(PAUSE)
    finally:
        fs.system.close(handle)
    return True
