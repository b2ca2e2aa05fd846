"""A checkpoint of any tool -> its content. Pickles are never executed: see `pickles`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lastgood.convert import dcp, managed, pickles, weights
from lastgood.convert.content import Content, check, is_rng, legacy_numpy, listed, numbered
from lastgood.errors import CorruptCheckpoint, LastgoodError, NotSupported, UsageError
from lastgood.layouts import accelerate as accelerate_layout
from lastgood.layouts import dcp as dcp_layout
from lastgood.layouts.found import files_of
from lastgood.layouts.progress import STATE
from lastgood.layouts.trainer import ARCHIVES, parts_of
from lastgood.model import Manifest
from lastgood.store import local

_PICKLES = (*(pattern[1:] for pattern in ARCHIVES), ".pkl")


def read(path: Path, layout: str, manifest: Manifest | None = None) -> Content:
    """What the checkpoint holds; everything is read into memory, on the CPU.

    layout: "" or "imported" (ours), "trainer", "fsdp", "accelerate", "lightning" or "dcp". Raises NotSupported for
    "deepspeed" and where there is more than tensors and plain data, CorruptCheckpoint for what can't be read.
    """
    if layout in ("", "imported"):
        return managed.read(path, manifest)
    if layout == "deepspeed":
        raise NotSupported(
            f"{path} was written by DeepSpeed, whose state is spread over its processes",
            hint="its own zero_to_fp32.py, which lies in the checkpoint, makes a file of weights from it",
        )
    readers = {"trainer": _trainer, "fsdp": _trainer, "accelerate": _accelerate, "lightning": _lightning, "dcp": _dcp}
    if layout not in readers:
        raise UsageError(f"layout must be one of {', '.join(readers)}, not {layout!r}")
    try:
        # A manifest knows what belongs to it: not itself, nor what stands where a stripped one's optimizer was.
        adopted = (
            list(manifest.files) if manifest is not None and manifest.id and layout in ("trainer", "fsdp") else None
        )
        content = _trainer(path, adopted) if adopted is not None else readers[layout](path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, LastgoodError):
            raise
        raise CorruptCheckpoint(f"{path} isn't laid out as {layout} does it: {error!r}") from error
    check(content, path)
    content.layout, content.name = layout, path.name
    if manifest is not None and content.step < 0:
        content.step = manifest.step
    return content


# ---- directories of the Trainer and of Accelerate ----------------------------------------


def _trainer(path: Path, names: list[str] | None = None) -> Content:
    names = list(files_of(path)) if names is None else names
    parts = parts_of(dict.fromkeys(names, 0))
    content = Content()
    _models(content, path, names)
    _optimizers(content, path, [*parts.get("optimizer", ())])
    content.schedulers = [pickles.load(path / name) for name in parts.get("scheduler", ())]
    for name in parts.get("scaler", ()):
        content.scaler = pickles.load(path / name)
    _random(content, {_rank(name): pickles.load(path / name) for name in parts.get("rng", ())})
    _files(content, path, [*parts["model"], *parts.get("progress", ())])
    state = _state(path / STATE) if STATE in content.files else {}
    content.step, content.epoch = state.get("global_step", -1), state.get("epoch")
    return content


def _accelerate(path: Path) -> Content:
    names = sorted(files_of(path), key=lambda name: (_rank(name), name))
    parts = {part: [n for n in names if pattern.fullmatch(n)] for part, pattern in accelerate_layout.PARTS}
    loaded = {
        part: [pickles.load(path / name) for name in parts[part]] for part in parts if part not in ("optimizer", "rng")
    }
    content = Content(schedulers=loaded["scheduler"], custom=loaded["custom"])
    content.scaler = next(iter(loaded["scaler"]), None)
    content.rest |= {f"{part}s": loaded[part] for part in ("sampler", "dataloader") if loaded[part]}
    _models(content, path, names)
    _optimizers(content, path, parts["optimizer"])
    states = {_rank(name): pickles.load(path / name) for name in parts["rng"]}
    steps = {rank: state.pop("step") for rank, state in states.items() if isinstance(state, dict) and "step" in state}
    if steps:
        content.rest["accelerator_step"] = steps[min(steps)]
    _random(content, {rank: _from_accelerate(state) for rank, state in states.items()})
    known = {name for found in parts.values() for name in found}
    _files(content, path, [name for name in names if name not in known])
    # A directory's number counts the saves, not the steps.
    content.step = _updates(content.optimizers) or accelerate_layout.look(path).step
    return content


def _updates(optimizers: list[dict[str, Any]]) -> int:
    """How often the optimizers were stepped, as far as their states say; 0 if they don't."""
    found = [entry.get("step") for state in optimizers for entry in state["state"].values() if isinstance(entry, dict)]
    numbers = [float(step) for step in found if isinstance(step, (int, float, torch.Tensor)) and _single(step)]
    return int(max(numbers, default=0))


def _single(step: Any) -> bool:
    return not isinstance(step, torch.Tensor) or step.numel() == 1


def _from_accelerate(state: Any) -> Any:
    words = {"random_state": "python", "numpy_random_seed": "numpy", "torch_manual_seed": "cpu", "xm_seed": "xla"}
    if not isinstance(state, dict):
        return state
    return {words.get(k, k.removeprefix("torch_").removesuffix("_manual_seed")): v for k, v in state.items()}


def _models(content: Content, path: Path, names: list[str]) -> None:
    models = weights.read(path, names)
    sharded = sorted(name for name in names if re.fullmatch(r"pytorch_model_fsdp_\d+/\.metadata", name))
    if not models:
        models = [dcp.read((path / name).parent)["model"] for name in sharded]
    if not models:
        raise CorruptCheckpoint(f"{path}: no file with weights in it")
    content.model = models[0]
    if models[1:]:
        content.rest["models"] = models[1:]


def _optimizers(content: Content, path: Path, names: list[str]) -> None:
    """By the number in their names, which is the order in which a tool prepared them."""
    found: dict[int, tuple[dict[str, Any], list[str] | None]] = {}
    for name in names:
        if name.endswith("/.metadata"):
            folder = name.rpartition("/")[0]
            found[_rank(folder)] = numbered(dcp.read(path / folder).get("optimizer"), f"{path / folder}")
        elif "/" not in name:
            found[_rank(name)] = numbered(pickles.load(path / name), f"{path / name}")
    content.optimizers = [found[number][0] for number in sorted(found)]
    content.parameter_names = next(iter(found.values()))[1] if len(found) == 1 else None


def _random(content: Content, states: Mapping[int, Any]) -> None:
    """The first process's random state is `rng`, those of the others are kept beside it."""
    plain = {rank: _normal(state) for rank, state in states.items()}
    first = plain.pop(min(plain)) if plain else None
    if first is not None and is_rng(first):
        content.rng = first
    elif first is not None:
        content.rest["rng"] = first
    if plain:
        content.rest["rng_ranks"] = {str(rank): state for rank, state in plain.items()}


def _normal(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    words = {kind: value if kind in ("python", "numpy", "cpu") else listed(value) for kind, value in state.items()}
    return {**words, **({"numpy": legacy_numpy(words["numpy"])} if "numpy" in words else {})}


def _files(content: Content, path: Path, names: list[str]) -> None:
    rest = [n for n in names if not weights.is_weights(n) and not n.startswith("pytorch_model_fsdp_")]
    content.files = {name: path / name for name in rest if not name.endswith(_PICKLES)}
    if left := [name for name in rest if name.endswith(_PICKLES)]:
        content.rest["left_out"] = left


def _rank(name: str) -> int:
    number = re.search(r"_(\d+)(?:\.\w+)?$", name)
    return int(number[1]) if number else 0


def _state(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(local.read(path, 1 << 30))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error}") from error
    return value if isinstance(value, dict) else {}


# ---- Lightning and torch.distributed.checkpoint ------------------------------------------


def _lightning(path: Path) -> Content:
    if path.is_dir():
        inside = sorted(path.glob("*.ckpt"))
        if len(inside) != 1:
            raise UsageError(f"{path} holds {len(inside)} .ckpt files: name one of them")
        path = inside[0]
    loaded = pickles.load(path)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), Mapping):
        raise CorruptCheckpoint(f"{path} isn't a checkpoint of Lightning: it has no state_dict")
    content = Content()
    managed.fill(content, loaded, f"{path}")
    return content


def _dcp(path: Path) -> Content:
    state = dcp.read(path)
    keys: dict[str, str] = {}
    if len(state) == 1 and isinstance(inner := next(iter(state.values())), dict) and "model" in inner:
        keys["under"] = next(iter(state))  # everything in one Stateful object, "app" in torch's tutorial
        state = inner
    content = Content(step=dcp_layout.look(path).step)
    if isinstance(model := state.get("model"), dict) and all(isinstance(t, torch.Tensor) for t in model.values()):
        content.model = state.pop("model")
    elif "model" not in state:  # a bare state_dict
        content.model = {name: state.pop(name) for name in list(state) if isinstance(state[name], torch.Tensor)}
        keys["model"] = ""
    for word in ("optimizer", "optim"):
        if isinstance(found := state.get(word), dict) and "param_groups" in found:
            optimizer, content.parameter_names = numbered(state.pop(word), f"{path}: {word}")
            content.optimizers = [optimizer]
            keys |= {"optimizer": word} if word != "optimizer" else {}
            break
    if type(state.get("step")) is int:
        content.step = state.pop("step")
    if type(state.get("epoch")) in (int, float):
        content.epoch = state.pop("epoch")
    # Tuples are what `write.to_dcp` makes of these; anything else by these names stays where it is.
    for word in ("schedulers", "custom"):
        if isinstance(state.get(word), tuple):
            setattr(content, word, list(state.pop(word)))
    if isinstance(state.get("scaler"), tuple):
        (content.scaler,) = state.pop("scaler")
    if is_rng(state.get("rng")):
        content.rng = state.pop("rng")
    content.rest = {**state, **({"dcp_keys": keys} if keys else {})}
    return content
