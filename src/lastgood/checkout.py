"""checkout: a plain, independent copy of a checkpoint, checked as it is made. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lastgood.errors import CorruptCheckpoint, NotSupported
from lastgood.format import guard
from lastgood.model import Record
from lastgood.store import local

OWN_FILES = frozenset({"tensors.json", "extra.safetensors", "trainer_state.json", "training_args.bin", *guard.NAMES})
"""Files of the model part that no from_pretrained looks at."""


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
    names = [
        name
        for name in manifest.parts.get("model", ())
        if name not in OWN_FILES and not name.endswith(("/extra.safetensors", ".extra.safetensors"))
    ]
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
        local.make_parents(place, target)
        copied = local.clone(source / name, place, entry.kind)
        if entry.hash and copied != entry:
            raise CorruptCheckpoint(
                f"{name} of {record.name} is not what was saved; nothing was checked out",
                hint="`lastgood verify --full` says what else is damaged; check out another one",
            )
        if progress is not None:
            progress(copied.size)
