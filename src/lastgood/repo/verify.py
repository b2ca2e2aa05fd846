"""Whether a checkpoint still holds what was committed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lastgood.errors import CorruptCheckpoint
from lastgood.format.tensors import read_header
from lastgood.model import FileEntry, Record
from lastgood.repo.held import Held
from lastgood.repo.read import missing, newer, unreadable
from lastgood.store import local


def problems(
    root: Path,
    record: Record,
    *,
    full: bool,
    sure: bool = False,
    progress: Callable[[int], None] | None = None,
    held: Held | None = None,
) -> tuple[str, ...]:
    """What is wrong with each file; () for a good checkpoint. sure: raise Unreadable, see `records`.

    full: read and hash every byte; otherwise sizes and safetensors headers, unless a stock Trainer may have written
    into it after its manifest. `progress` gets the bytes of each file
    that is done. held: keeps what a restore of this checkpoint needs of what is read here.
    """
    if held is not None:
        held.clear()
    manifest, directory = record.manifest, root / record.name
    if manifest is None:
        return (record.problem or "it has no manifest",)
    try:
        gone = missing(directory, manifest, sure=sure)
    except OSError as error:
        raise unreadable(error.filename or directory, error) from error
    if gone:
        return (gone,)
    if not full and not (manifest.layout and newer(directory, manifest.files)):
        return tuple(filter(None, (_header(directory / name) for name in manifest.files)))

    def check(item: tuple[str, FileEntry]) -> str:
        name, expected = item
        try:
            path = directory / name
            found = local.digest(path, expected.kind) if held is None else held.read(directory, name, manifest)
        except OSError as error:
            if sure and local.passing(error):
                raise unreadable(directory / name, error) from error
            return f"{name} can't be read: {error.strerror or error}"
        if progress is not None:
            progress(found.size)
        return "" if found == expected else f"the content of {name} is not what was saved (hash differs)"

    # Hashing and reading leave the interpreter lock; two threads keep a disk busy.
    return tuple(filter(None, local.at_once(check, manifest.files.items(), limit=os.cpu_count() or 1)))


def _header(path: Path) -> str:
    if path.suffix != ".safetensors":
        return ""
    try:
        read_header(path)
    except CorruptCheckpoint as error:
        return error.message
    return ""
