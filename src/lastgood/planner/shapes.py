"""From whatever names a model, its parameters: a size, a name, a directory, a config.json, a safetensors file."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lastgood.errors import CorruptCheckpoint, LastgoodError, UsageError
from lastgood.format import strict
from lastgood.format.tensors import Slot, read_header
from lastgood.planner import arithmetic, known, live, meta
from lastgood.planner.tensor import Model, Tensor, guessed

__all__ = ["Model", "Tensor", "model_of"]

TABLE = "a table of well-known models"
SCALED = "a llama-like model of that size"
ARITHMETIC = "config.json, by arithmetic"
META = "config.json, built on the meta device"
HEADERS = "safetensors headers"

CONFIG_LIMIT = 16 << 20
"""Largest config.json or index that is read (16 MiB)."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbt])", re.IGNORECASE)
_BESIDE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|preprocessor_config|processor_config|chat_template)\.(json|txt|jinja)|merges\.txt"
    r"|(tokenizer|spiece|sentencepiece(\.bpe)?)\.model"
)
_BUFFER = re.compile(r"(\.(inv_freq|masked_bias|position_ids)|h\.\d+\.attn\.bias|attention\.bias)$")
_QUANTISED = re.compile(r"\.(absmax|quant_map|qweight|qzeros|SCB|weight_scale|weight_packed)$")


def model_of(what: object, *, torch: bool | None = None) -> Model:
    """The parameters of a model.

    what: "13B", "1.5B", "350M" (a well-known model of that size, else one that is scaled to it; `name` says which), a
    name such as "llama-3.1-8b", a directory (complete safetensors files, else its config.json), a config.json, a
    *.safetensors file or its index, a configuration (mapping, or an object with to_dict()), or a torch module.
    torch: True builds configurations on the meta device, False never imports torch, None does so only for families
    that arithmetic doesn't know.

    Raises UsageError for what names no model, an adapter, or a configuration nobody can build; CorruptCheckpoint
    for damaged files.
    """
    if live.is_module(what):
        return live.model_of_module(what)
    if hasattr(what, "to_dict"):
        what = what.to_dict()
    if isinstance(what, Mapping):
        return _from_config(dict(what), _title(what, "the configuration"), torch, _written(what))
    if not isinstance(what, (str, os.PathLike)):
        raise UsageError(f"a model is named by text, a path or a configuration, not by {type(what).__name__}")
    text = os.fspath(what)
    if not isinstance(text, str) or not text.strip():
        raise UsageError("the model's name is empty", hint="a size such as 7B, a name, or the path of its files")
    path = Path(text).expanduser()
    if os.path.isdir(path):  # Path's own methods raise for a name that is too long
        return _from_directory(path, torch)
    if os.path.isfile(path):
        return _from_file(path, torch)
    if isinstance(what, os.PathLike):
        raise UsageError(f"{text} isn't there", hint="the model's directory, its config.json or a safetensors file")
    return _from_words(text.strip(), torch)


def _from_words(text: str, torch: bool | None) -> Model:
    match = _SIZE.fullmatch(text)
    key = known.SIZES.get(text.upper().replace(" ", ""))
    found = known.MODELS[key] if key else known.by_name(text)
    if found is not None:
        name = f"{text} ({found.title}'s shapes)" if key else found.title
        return _from_config(found.config, name, torch, found.tokenizer, TABLE)
    if match is None:
        raise _unknown(text)
    count = float(match[1]) * {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2].upper()]
    if not 1e4 <= count <= 1e14:
        raise UsageError(f"a model of {text} parameters isn't one that can be planned for", hint="10K to 100T")
    return _from_config(known.scaled(count), f"{text} (llama-like shapes, scaled to that size)", torch, 0, SCALED)


def _unknown(text: str) -> UsageError:
    import difflib

    near = difflib.get_close_matches(text.rpartition("/")[2].lower(), known.MODELS, n=3, cutoff=0.5)
    titles = [known.MODELS[name].title for name in near]
    hint = f"did you mean {' or '.join(titles)}? " if titles else ""
    return UsageError(
        f"{text[:200]!r} is neither a file nor a model that is known here",
        hint=f"{hint}a size such as 7B works, and so does the path of the model's directory or config.json",
    )


def _from_config(
    config: Mapping[str, Any], name: str, torch: bool | None, beside: int, source: str | None = None
) -> Model:
    counted = None if torch else arithmetic.tensors(config)
    if counted is not None:
        return Model(name=name, source=source or ARITHMETIC, tensors=counted, beside=beside)
    if torch is False:
        kind = config.get("model_type") or "this model"
        raise UsageError(
            f"the shapes of {kind!r} ({_heads(config)}) can't be told without torch",
            hint="let torch and transformers build it, or point to a directory with its safetensors files",
        )
    return Model(name=name, source=source or META, tensors=meta.tensors(config), beside=beside)


def _from_directory(path: Path, torch: bool | None) -> Model:
    config = path / "config.json"
    about = _json(config) if config.is_file() else {}
    slots = _slots(path)
    title = _title(about, path.resolve().name)
    if slots is not None:
        return Model(name=title, source=HEADERS, tensors=_of_slots(slots, about), beside=_beside(path))
    if about:
        return _from_config(about, title, torch, _beside(path))
    _refuse_adapter(path)
    raise UsageError(
        f"{path} holds neither a config.json nor complete safetensors files",
        hint="point to the directory of the model itself",
    )


def _from_file(path: Path, torch: bool | None) -> Model:
    if path.name.endswith(".safetensors") or path.name.endswith(".safetensors.index.json"):
        if path.name.startswith("adapter_"):
            _refuse_adapter(path.parent, path)
        slots = _usable(_shards(path) if path.name.endswith(".json") else read_header(path).slots)
        if slots is None:
            raise UsageError(
                f"{path} doesn't show the model's own shapes: shards are missing or its weights are quantised",
                hint="point to the model's config.json",
            )
        config = path.parent / "config.json"
        about = _json(config) if config.is_file() else {}
        return Model(
            name=_title(about, path.name), source=HEADERS, tensors=_of_slots(slots, about), beside=_beside(path.parent)
        )
    about = _json(path)
    if "peft_type" in about:
        _refuse_adapter(path.parent, path)
    return _from_config(about, _title(about, path.parent.resolve().name), torch, _beside(path.parent))


# ---- files -------------------------------------------------------------------------------


def _slots(directory: Path) -> dict[str, Slot] | None:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return _usable(read_header(single).slots)
    return _usable(_shards(index)) if index.is_file() else None


def _shards(index: Path) -> dict[str, Slot] | None:
    """The tensors of all shards; None if one isn't there (yet)."""
    placed = _json(index).get("weight_map")
    if not isinstance(placed, dict):
        raise CorruptCheckpoint(f"{index} has no weight_map")
    slots: dict[str, Slot] = {}
    for file in sorted({str(name) for name in placed.values()}):
        path = index.parent / Path(file).name
        if not path.is_file():
            return None
        slots |= read_header(path).slots
    return slots if set(placed) <= set(slots) else None


def _usable(slots: dict[str, Slot] | None) -> dict[str, Slot] | None:
    """None for quantised weights: packed bytes have neither the shapes nor the number of the parameters."""
    if not slots or any(_QUANTISED.search(name) or ".quant_state." in name for name in slots):
        return None
    return slots


def _of_slots(slots: Mapping[str, Slot], config: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """What is known about each name from the configuration, else what the name suggests."""
    try:
        described = {tensor.name: tensor for tensor in arithmetic.tensors(config) or ()}
    except LastgoodError:
        described = {}
    found = []
    for name, slot in slots.items():
        tensor = described.get(name)
        if tensor is not None and tensor.shape == slot.shape:
            found.append(tensor)
        elif not _BUFFER.search(name):
            found.append(guessed(name, slot.shape))
    embeddings = {tensor.shape for tensor in found if tensor.role == "embedding"}
    if config.get("tie_word_embeddings", False):  # some files hold the tied head as well
        found = [tensor for tensor in found if tensor.role != "head" or tensor.shape not in embeddings]
    order = {name: place for place, name in enumerate(described)}
    return tuple(sorted(found, key=lambda tensor: (order.get(tensor.name, math.inf), _natural(tensor.name))))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _refuse_adapter(directory: Path, path: Path | None = None) -> None:
    """Raise UsageError if this is a LoRA adapter: it has the shapes of what was trained, not those of the model."""
    config = directory / "adapter_config.json"
    if not config.is_file() and path is None:
        return
    base = _json(config).get("base_model_name_or_path") if config.is_file() else None
    raise UsageError(
        f"{path or directory} is an adapter, which doesn't hold the model's shapes",
        hint=f"name its base model{f', {base}' if base else ''}, and say --train lora",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise UsageError(f"{path} is larger than any configuration ({path.stat().st_size} bytes)")
        value = strict.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} isn't a configuration: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} isn't a configuration: not a JSON object")
    return value


def _beside(directory: Path) -> int:
    """Bytes of the files that save_pretrained writes next to the weights."""
    return sum(entry.stat().st_size for entry in _files(directory) if _BESIDE.fullmatch(entry.name))


def _files(directory: Path) -> Iterable[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return [entry for entry in entries if entry.is_file()]


def _written(config: Mapping[str, Any]) -> int:
    """Bytes of config.json and generation_config.json, about."""
    return len(json.dumps(dict(config), indent=2, default=str)) + 200


def _title(config: Mapping[str, Any], otherwise: str) -> str:
    name = config.get("_name_or_path") or config.get("name_or_path")
    kind = config.get("model_type")
    if isinstance(name, str) and name:
        return name
    return f"{otherwise} ({kind})" if kind else otherwise


def _heads(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return ", ".join(map(str, named)) if isinstance(named, list) and named else "no architecture named"
