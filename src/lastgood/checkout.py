"""checkout: a plain, independent copy of a checkpoint, checked as it is made, that appears all at once. No torch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lastgood.errors import CorruptCheckpoint, NotEnoughSpace, NotSupported, SaveFailed, UsageError
from lastgood.format import guard
from lastgood.model import Record
from lastgood.store import local

OWN_FILES = frozenset({"tensors.json", "extra.safetensors", "trainer_state.json", "training_args.bin", *guard.NAMES})
"""Files of the model part that no from_pretrained looks at."""
RESUME_PARTS = ("optimizer", "scheduler", "rng", "scaler", "progress", "arguments", "dataloader", "custom")


def model_files(record: Record) -> list[str]:
    """What a directory needs for from_pretrained. Raises NotSupported where the layout has no such files."""
    manifest = record.manifest
    if manifest is None or record.state == "incomplete":
        raise CorruptCheckpoint(f"{record.name} is not complete: {record.problem}")
    if record.layout in ("lightning", "dcp"):
        raise NotSupported(
            f"{record.name} was written by {record.layout}, which keeps the weights inside files of its own",
            hint="`lastgood import` brings it into a run; check it out from there",
        )
    names = [name for name in manifest.parts.get("model", ()) if name not in OWN_FILES]
    if not any(name.endswith((".safetensors", ".bin")) and "fsdp" not in name for name in names):
        raise NotSupported(
            f"the weights of {record.name} are sharded over processes ({record.layout})",
            hint="`lastgood export` or the tool's own converter (zero_to_fp32.py, accelerate merge-weights) joins them",
        )
    return names


def copy(
    source: Path, record: Record, names: list[str], target: Path, *, progress: Callable[[int], None] | None = None
) -> None:
    """Put these files of a checkpoint into a directory; each is compared with its hash, if it has one.

    Raises CorruptCheckpoint naming the file that isn't what was saved.
    """
    assert record.manifest is not None
    for name in names:
        entry = record.manifest.files[name]
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        copied = local.clone(source / name, place)
        if entry.blake3 and copied != entry:
            raise CorruptCheckpoint(
                f"{name} of {record.name} is not what was saved; nothing was checked out",
                hint="`lastgood verify --full` says what else is damaged; check out another one",
            )
        if progress is not None:
            progress(copied.size)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A new directory to fill, which gets its name when everything is in it and durable; on an error it is removed.

    Raises UsageError if the name is taken, NotEnoughSpace or SaveFailed for the disk.
    """
    if os.path.lexists(target) and (not target.is_dir() or local.names(target)):
        raise UsageError(f"{target} exists already", hint="name a directory that doesn't exist yet")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a directory", hint="make it first")
    staging = parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        staging.mkdir()
        try:
            yield staging
            files = [path for path in staging.rglob("*") if path.is_file()]
            local.sync_files(files)
            for folder in sorted({path.parent for path in files} | {staging}, key=lambda p: -len(p.parts)):
                local.sync_dir(folder)
            if target.is_dir():
                target.rmdir()  # it is empty
            local.rename(staging, target)
        except BaseException:
            with suppress(OSError):
                local.remove_tree(staging)
            raise
    except SaveFailed:
        raise
    except OSError as error:
        kind = NotEnoughSpace if error.errno in (28, 122) else SaveFailed
        raise kind(
            f"{target}: {error.strerror or error}; nothing was left there", hint="free space, or another directory"
        ) from error
