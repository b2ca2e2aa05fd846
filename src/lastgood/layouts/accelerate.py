"""Directories of Accelerate's `save_state`: model, optimizer, scheduler, sampler, random states, custom objects."""

from __future__ import annotations

import re
from pathlib import Path

from lastgood.errors import CorruptCheckpoint
from lastgood.format import archive
from lastgood.format.tensors import read_header
from lastgood.layouts.found import Found, files_of, is_directory, modified
from lastgood.store import local

_NAME = re.compile(r"checkpoint_(\d{1,18})")
PARTS = (
    ("optimizer", re.compile(r"optimizer(_\d+)?\.(bin|pt)|optimizer_\d+/.*")),
    ("scheduler", re.compile(r"scheduler(_\d+)?\.bin")),
    ("rng", re.compile(r"random_states_\d+\.pkl")),
    ("scaler", re.compile(r"scaler\.pt")),
    ("sampler", re.compile(r"sampler(_\d+)?\.bin")),
    ("dataloader", re.compile(r"dl_state_dict(_\d+)?\.bin")),
    ("custom", re.compile(r"custom_checkpoint_\d+\.pkl")),
)
"""Part -> its files; everything else belongs to the model."""
_WEIGHTS = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)|pytorch_model_fsdp_\d+/.*")


def recognises(path: Path) -> bool:
    """Random states beside weights, and no Trainer's state: nobody else writes that."""
    if not is_directory(path):
        return False
    names = local.names(path)
    return "trainer_state.json" not in names and (
        any(PARTS[2][1].fullmatch(name) for name in names)
        or (_NAME.fullmatch(path.name) is not None and any(_WEIGHTS.fullmatch(name) for name in names))
    )


def look(path: Path) -> Found:
    """What it holds, by its file names."""
    files = files_of(path)
    parts: dict[str, list[str]] = {"model": []}
    for name in files:
        part = next((part for part, pattern in PARTS if pattern.fullmatch(name)), "model")
        parts.setdefault(part, []).append(name)
    faults = [f"{name} is empty" for name, size in files.items() if size == 0]
    if not any(_WEIGHTS.fullmatch(name) for name in files):
        faults.append("no file with weights in it")
    if "rng" not in parts:
        faults.append("no random states: the save was interrupted")
    number = _NAME.fullmatch(path.name)
    return Found(
        path=path,
        layout="accelerate",
        step=int(number[1]) if number else -1,
        state="incomplete" if faults else "full" if "optimizer" in parts else "weights",
        parts={part: tuple(names) for part, names in parts.items()},
        files=files,
        problem="; ".join(faults),
        created=modified(path),
    )


def problems(path: Path, *, full: bool) -> tuple[str, ...]:
    """Headers cover the files, archives are whole (full: pass their checksums)."""
    found = look(path)
    faults = [found.problem] if found.problem else []
    for name in found.files:
        if name.endswith(".safetensors"):
            try:
                read_header(path / name)
            except CorruptCheckpoint as error:
                faults.append(error.message)
        elif name.endswith((".bin", ".pt", ".pkl")) and found.files[name]:
            faults += filter(None, [archive.check(path / name, full=full)])
    return tuple(faults)
