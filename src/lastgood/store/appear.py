"""New files and directories that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lastgood.errors import NotEnoughSpace, SaveFailed, UsageError
from lastgood.store import fs, local


@contextmanager
def appearing(target: Path, *, directory: bool = True) -> Iterator[Path]:
    """The place to write to: a fresh sibling that gets the name `target` when everything in it is durable.

    On any error it is removed and `target` isn't there. Raises UsageError if the name is taken (an empty directory
    may have it), NotEnoughSpace or SaveFailed for the disk.
    """
    if os.path.lexists(target) and (not directory or not target.is_dir() or local.names(target)):
        raise UsageError(f"{target} exists already: nothing is ever overwritten", hint="choose a name that is free")
    parent = target.absolute().parent
    staging = parent / f".{target.name}.{fs.system.token(4)}"
    try:
        local.make_dirs(parent)
        try:
            if directory:
                local.make_dir(staging, fresh=True)
            yield staging
            _sync(staging)
            if target.is_dir():
                fs.system.rmdir(target)  # it is empty
            local.rename(staging, target)
        except BaseException:
            with suppress(OSError):
                local.remove(staging)
            raise
    except SaveFailed:
        raise
    except FileExistsError as error:
        raise UsageError(f"{target} was made by somebody else meanwhile: nothing is ever overwritten") from error
    except OSError as error:
        kind = NotEnoughSpace if error.errno in (28, 122) else SaveFailed
        reason = error.strerror or error
        raise kind(f"{target}: {reason}; nothing was left there", hint="free space, or another place") from error


def _sync(staging: Path) -> None:
    if not staging.is_dir():
        local.sync_all([staging], ())
        return
    files = [path for path in staging.rglob("*") if path.is_file()]
    local.sync_all(files, ())
    for folder in sorted({path.parent for path in files} | {staging}, key=lambda path: -len(path.parts)):
        local.sync_dir(folder)
