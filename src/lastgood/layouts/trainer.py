"""Checkpoints of an unmanaged transformers Trainer: plain, PEFT, FSDP and DeepSpeed."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lastgood.errors import CorruptCheckpoint, NoCheckpoint
from lastgood.format import archive, inert, manifest
from lastgood.format.manifest import safe_name
from lastgood.format.tensors import read_header
from lastgood.layouts import dcp
from lastgood.layouts.found import Found, files_of, modified
from lastgood.layouts.progress import STATE, glance, state_of
from lastgood.model import finite
from lastgood.redact import masked
from lastgood.repo.layout import step_of
from lastgood.store import local

ARCHIVES = ("*.pt", "*.pth", "*.bin", "*.ckpt")
"""Files that torch.save wrote."""

PARTS = (
    ("optimizer", ("optimizer.pt", "optimizer.bin", "optimizer_[0-9]*/*", "*optim_states.pt")),
    ("scheduler", ("scheduler.pt", "scheduler.bin")),
    ("rng", ("rng_state*.pth", "random_states_*.pkl")),
    ("scaler", ("scaler.pt",)),
    ("progress", (STATE,)),
    ("arguments", ("training_args.bin",)),
)
"""Part -> patterns of its files; everything else belongs to the model."""

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "pytorch_model_fsdp_*/*", "*model_states.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """parts: the files there that a resume reads. history: the run's log up to this step. problems: () if intact."""

    path: Path
    step: int
    parts: tuple[str, ...]
    history: tuple[str, ...]
    problems: tuple[str, ...]


def look(path: Path) -> Found:
    """What a directory is, from names, sizes and trainer_state.json alone."""
    files = files_of(path)
    files.pop(manifest.NAME, None)  # of an adopted checkpoint into which a Trainer saved again
    step, rows, problems = glance(path / STATE)
    parts = parts_of(files)
    layout = _layout(files)
    has = {part for part, names in parts.items() if names}
    weights = any(_matches(name, WEIGHTS) for name in files)
    if not weights:
        problems.append("no file with weights in it")
    needed = {"optimizer", "rng", "progress"} | (set() if layout == "deepspeed" else {"scheduler"})
    name = step_of(path.name)
    if isinstance(step, int) and name is not None and step != name:
        problems.append(f"{STATE} is of step {step}")
    problem = "; ".join([*problems, *_empty(files)])
    metrics, loss = row_values(rows, step)
    return Found(
        path=path,
        layout=layout,
        step=name if name is not None else step if isinstance(step, int) else -1,
        state="incomplete" if problem else "full" if needed <= has else "weights",
        parts=parts,
        files=files,
        problem=problem,
        metrics=metrics,
        loss=loss,
        created=modified(path / STATE) or modified(path),
    )


def parts_of(files: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """part -> its files."""
    parts: dict[str, list[str]] = {"model": []}
    for name in files:
        part = next((part for part, patterns in PARTS if _matches(name, patterns)), "model")
        parts.setdefault(part, []).append(name)
    return {part: tuple(names) for part, names in parts.items()}


def row_values(rows: Sequence[Any], step: object) -> tuple[dict[str, float], float | None]:
    """(metrics of this step's evaluation, the last training loss up to it) from a Trainer's log."""
    metrics: dict[str, float] = {}
    loss = None
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not isinstance(step, int):
            continue
        if row["step"] <= step and finite(row.get("loss")) is not None:
            loss = finite(row["loss"])
        if row["step"] == step:
            metrics |= {k: n for k, v in row.items() if k.startswith("eval_") and (n := finite(v)) is not None}
    return metrics, loss


def arguments(path: Path) -> dict[str, object]:
    """The TrainingArguments in training_args.bin as plain values; {} where there are none that can be read."""
    try:
        node = archive.load(path / "training_args.bin")
    except CorruptCheckpoint:
        return {}
    fields = node.fields if isinstance(node, inert.Node) else {}
    left = [100_000]  # things that are looked at: more are no arguments
    known = {k: _plain(v, left) for k, v in fields.items() if isinstance(k, str) and not k.startswith("_")}
    return {k: masked(k, value) for k, value in known.items()}


def problems(path: Path, *, full: bool) -> tuple[str, ...]:
    """Structure: headers cover the files, archives are whole (full: pass their checksums), JSON parses."""
    _, found = state_of(path / STATE)
    files = files_of(path)
    for name in files:
        if name.endswith(".safetensors"):
            try:
                read_header(path / name)
            except CorruptCheckpoint as error:
                found.append(error.message)
        elif _matches(name, ARCHIVES):
            found += filter(None, [archive.check(path / name, full=full)])
        elif name.endswith(".json") and name != STATE:
            found += _json(path / name)
    found += _shards(path)
    for folder in sorted({Path(name).parent for name in files if Path(name).name == ".metadata"}):
        found += dcp.problems(path / folder, full=full)
    if not any(_matches(name, WEIGHTS) for name in files):
        found.append("no file with weights in it")
    return tuple(found)


def inspect(path: Path) -> Stock:
    """Check everything that can be checked, for a resume. Nothing is unpickled."""
    state, _ = state_of(path / STATE)
    step, log = state.get("global_step"), state.get("log_history")
    names = [name for name in files_of(path) if name.endswith(".safetensors") or _matches(name, ARCHIVES)]
    return Stock(
        path=path,
        step=step if isinstance(step, int) else -1,
        parts=tuple(names),
        history=_rows(log),
        problems=problems(path, full=True),
    )


def history(path: Path) -> tuple[str, ...]:
    """The run's log up to this checkpoint, one text per row."""
    state, _ = state_of(path / STATE)
    return _rows(state.get("log_history"))


def _rows(log: Any) -> tuple[str, ...]:
    if not isinstance(log, list):
        return ()
    try:
        return tuple(json.dumps(row, sort_keys=True) for row in log)
    except (RecursionError, ValueError):  # nested nearly as deep as the parser goes
        return ()


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


def choose(root: Path, old: Sequence[Stock]) -> tuple[Stock, tuple[tuple[str, str], ...]]:
    """The newest intact checkpoint of an unmanaged run, and (name, reason) of those passed over.

    Raises NoCheckpoint, also where two runs share the directory: nobody guesses which one is meant.
    """
    skipped = tuple((item.path.name, "; ".join(item.problems)) for item in old if item.problems)
    good = [item for item in old if not item.problems]
    usable = [item for item in good if not lacking(item.path)]
    skipped += tuple((item.path.name, lacking(item.path)) for item in good if item not in usable)
    if not usable:
        listing = "".join(f"\n  {name}: {reason}" for name, reason in skipped)
        raise NoCheckpoint(
            f"no checkpoint in {root} can be resumed from{listing}",
            hint="resume_from_checkpoint=False starts afresh and leaves these as they are",
        )
    groups = chain(usable)
    if len(groups) > 1:
        listing = "; ".join(", ".join(item.path.name for item in group) for group in groups)
        raise NoCheckpoint(
            f"{root} holds checkpoints of {len(groups)} runs ({listing}): which one to continue?",
            hint="name one: resume_from_checkpoint='<path of the checkpoint>'",
        )
    return max(usable, key=lambda item: item.step), skipped


def lacking(path: Path) -> str:
    """What a stock Trainer would silently do without, in words; "" if nothing."""
    files = files_of(path)
    if _layout(files) == "deepspeed":
        return ""
    parts = parts_of(files)
    names = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "rng": "rng_state.pth"}
    lost = [name for part, name in names.items() if not parts.get(part)]
    return f"no {', '.join(lost)}" if lost else ""


def _layout(files: Mapping[str, int]) -> str:
    if any(_matches(name, ("*optim_states.pt", "*model_states.pt", "zero_to_fp32.py")) for name in files):
        return "deepspeed"
    return "fsdp" if any(_matches(name, ("pytorch_model_fsdp*",)) for name in files) else "trainer"


@functools.lru_cache(maxsize=4096)
def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.rpartition("/")[2], pattern) for pattern in patterns)


def _empty(files: Mapping[str, int]) -> Iterator[str]:
    for name, size in files.items():
        if size == 0 and (_matches(name, ARCHIVES) or name.endswith((".safetensors", ".json"))):
            yield f"{name} is empty"


def _json(path: Path) -> list[str]:
    try:
        json.loads(local.read(path, 1 << 28))
    except (OSError, ValueError, RecursionError) as error:
        return [f"{path.name} can't be read: {error}"]
    return []


def _shards(path: Path) -> list[str]:
    found = []
    for index in sorted(path.glob("*.index.json")):
        try:
            names = set(json.loads(local.read(index, 1 << 28))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found.append(f"{index.name} can't be read")
            continue
        found += [f"{name} is missing" for name in sorted(map(str, names)) if not _there(path, name)]
    return found


def _there(path: Path, name: str) -> bool:
    return safe_name(name) and local.size(path / name) is not None


def _plain(value: Any, left: list[int], depth: int = 0) -> object:
    left[0] -= 1
    if left[0] < 0 or depth > 20:
        return "..."
    if isinstance(value, inert.Node):  # an enum: its value
        return _plain(value.args[0], left, depth + 1) if len(value.args) == 1 else value.name
    if isinstance(value, dict):
        return {key: _plain(item, left, depth + 1) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, (list, tuple)):
        return [_plain(item, left, depth + 1) for item in value[: left[0] + 1]]
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a number of many digits"
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
