"""Checkpoints without a manifest, as the stock Trainer writes them: what can be known without torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastgood.errors import CorruptCheckpoint
from lastgood.format.tensors import read_header
from lastgood.store import local

STATE = "trainer_state.json"
ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin", "adapter_model.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """parts: the files there that a resume reads. history: the run's log up to this step. problems: () if intact."""

    path: Path
    step: int
    parts: tuple[str, ...]
    history: tuple[str, ...]
    problems: tuple[str, ...]


def inspect(path: Path) -> Stock:
    """Check structure: headers cover the files, archives pass their CRC, JSON parses. Nothing is unpickled."""
    state, problems = _state(path / STATE)
    weights = sorted(file for file in path.rglob("*.safetensors") if file.is_file())
    for file in weights:
        try:
            read_header(file)
        except CorruptCheckpoint as error:
            problems.append(error.message)
    archives = [path / name for name in ARCHIVES if local.size(path / name) is not None]
    archives += sorted(path.glob("pytorch_model-*.bin"))
    problems += filter(None, map(_archive, archives))
    problems += _shards(path)
    if not weights and not any("model" in file.name for file in archives):
        problems.append("no file with weights in it")
    step = state.get("global_step")
    log = state.get("log_history")
    return Stock(
        path=path,
        step=step if isinstance(step, int) else -1,
        parts=tuple(file.relative_to(path).as_posix() for file in [*weights, *archives]),
        history=tuple(json.dumps(row, sort_keys=True) for row in log) if isinstance(log, list) else (),
        problems=tuple(problems),
    )


def chain(found: Sequence[Stock]) -> list[list[Stock]]:
    """Groups of checkpoints of one run: in a run, each log begins with the log of the checkpoint before."""
    groups: list[list[Stock]] = []
    for item in sorted(found, key=lambda item: item.step):
        for group in groups:
            earlier = group[-1].history
            if item.history[: len(earlier)] == earlier and item.step > group[-1].step:
                group.append(item)
                break
        else:
            groups.append([item])
    return groups


def _state(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        value = json.loads(local.read(path, 1 << 30))
    except FileNotFoundError:
        return {}, [f"{STATE} is missing: the save was interrupted, or this is an exported model"]
    except (OSError, ValueError) as error:
        return {}, [f"{STATE} can't be read: {error}"]
    if not isinstance(value, dict) or not isinstance(value.get("global_step"), int):
        return {}, [f"{STATE} has no global_step"]
    return value, []


def _archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        return f"{path.name} is damaged: {error}"
    return f"{path.name} is damaged: {broken} fails its checksum" if broken else ""


def _shards(path: Path) -> list[str]:
    problems = []
    for index in path.glob("*.index.json"):
        try:
            names = set(json.loads(local.read(index, 1 << 28))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{index.name} can't be read")
            continue
        problems += [f"{name} is missing" for name in sorted(names) if local.size(path / str(name)) is None]
    return problems
