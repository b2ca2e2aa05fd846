"""The base that an adapter belongs to: whether it is the one on this machine, and what of it the adapter repeats."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lastgood.doctor.case import Case
from lastgood.doctor.disk import JSON_LIMIT, Disk
from lastgood.doctor.rule import Sight
from lastgood.doctor.rules import fit
from lastgood.doctor.rules.peft_look import FACTOR, adapters, tensors
from lastgood.errors import CorruptCheckpoint
from lastgood.format.digests import signature
from lastgood.format.tensors import Slot, read_header
from lastgood.model import Record
from lastgood.store import local
from lastgood.store.checksum import Kind, Sum, kind_of

PRINTED = 4 << 20
"""Bytes of a base that are hashed, the smallest tensors first; all with `full`."""
LARGE = 0.2
"""Share of its base from which on an adapter is large."""
EMBEDDING = re.compile(r"(?:^|\.)(?:wte|embed_tokens|lm_head|embed_out|word_embeddings)\.(?:\w+\.)*weight$")
"""Tensors with a row per token."""


def base_of(values: Mapping[str, Any]) -> Path | None:
    """The directory of the base that an adapter names, if it is on this machine: a path, or in the hub's cache."""
    name = values.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    try:
        if os.path.isfile(os.path.join(name, "config.json")):
            return Path(os.path.realpath(name))
        if not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name):
            return None
        home = os.environ.get("HF_HOME", os.path.join(os.path.expanduser("~"), ".cache", "huggingface"))
        place = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))) / f"models--{name.replace('/', '--')}"
        revision = values.get("revision") or "main"
        commit = (place / "refs" / str(revision)).read_text().strip()[:64]
        found = place / "snapshots" / commit
        return found if commit.isalnum() and (found / "config.json").is_file() else None
    except (OSError, ValueError):
        return None


def _config(base: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(local.read(os.path.realpath(base / "config.json"), JSON_LIMIT))
    except (OSError, ValueError, RecursionError):
        return {}
    return fit.flat(value) if isinstance(value, dict) else {}


def _slots(base: Path) -> dict[str, tuple[Path, Slot]]:
    """Name -> (file, slot) of the base's tensors, without the prefix that some classes save."""
    found: dict[str, tuple[Path, Slot]] = {}
    for name in sorted(local.names(base))[:10_000]:
        if name.endswith(".safetensors"):
            try:
                path = Path(os.path.realpath(base / name))
                found.update({key: (path, slot) for key, slot in read_header(path).slots.items()})
            except (CorruptCheckpoint, OSError):
                continue
    return found


def large(case: Case) -> Iterator[Sight]:
    """Whole matrices of the base in an adapter that nobody asked for."""
    for record, values in adapters(case.disk)[-1:] if case.disk is not None else ():
        assert case.disk is not None
        slots = tensors(case.disk, record)
        asked = values.get("modules_to_save")
        wanted = {str(name) for name in asked} if isinstance(asked, list) else set()
        if values.get("peft_type") != "LORA" or not slots:
            continue
        whole = {
            name: slot
            for name, slot in slots.items()
            if "lora_" not in name and name.endswith(".weight") and len(slot.shape) > 1
            if not wanted & set(name.split("."))
        }
        if not whole:
            continue
        base = base_of(values)
        size = _config(base).get("vocab_size") if base is not None else None
        if type(size) is int and all(EMBEDDING.search(name) and slot.shape[0] != size for name, slot in whole.items()):
            continue  # the vocabulary was extended: the adapter has to bring the embedding
        total, held = fit.elements(slots), fit.elements(whole)
        of_base = fit.elements({name: slot for name, (_, slot) in _slots(base).items()}) if base is not None else 0
        share = f"; the adapter has {total / of_base:.0%} of the size of its base" if of_base else ""
        yield Sight(
            saw=f"{fit.ADAPTER} holds whole tensors of the base: {fit.some(sorted(whole), 3)}",
            where=record.name,
            evidence=(f"{held / total:.0%} of its {total:,} numbers are in these{share}",),
            severity="warning" if type(size) is int or total > LARGE * of_base > 0 else "info",
        )


def other_base(case: Case) -> Iterator[Sight]:
    """The base on this machine, or in a later checkpoint, isn't the one that the adapter was trained on."""
    disk = case.disk
    known = adapters(disk) if disk is not None else []
    for (before, mine), (after, theirs) in itertools.pairwise(known):
        lines = fit.different({k: mine[k] for k in ("base_model_name_or_path", "revision") if mine.get(k)}, theirs)
        if lines:
            yield Sight(
                saw=f"{before.name} and {after.name} name other bases: {'; '.join(lines)}",
                where=after.name,
                severity="warning",
                means="unless it is the same model in another place, the adapter was trained on two of them",
            )
    if disk is None or not known:
        return
    record, values = known[-1]
    base = base_of(values)
    if base is None:
        return
    slots, lines = _slots(base), []
    lines += _outer(tensors(disk, record), slots)
    lines += _recorded(disk, record, slots)
    lines += _tokens(disk, record, values, _config(base))
    if lines:
        yield Sight(
            saw=lines[0],
            where=record.name,
            evidence=(*lines[1:4], f"the base: {base}"),
        )


def _outer(adapter: Mapping[str, Slot], base: Mapping[str, tuple[Path, Slot]]) -> list[str]:
    """Factors that don't fit the matrix that they change."""
    lines = []
    for name, slot in adapter.items():
        side = FACTOR.search(name)
        target = name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
        if side is None or target not in base or len(slot.shape) != 2 or "embedding_" in side.group():
            continue
        outer = slot.shape[1 if side.group(1) == "A" else 0]
        shape = base[target][1].shape
        if len(shape) == 2 and outer not in shape:  # quantised weights are stored as one column
            lines += [f"{target} is {list(shape)} in the base, and the adapter was trained on one with {outer}"] * (
                1 not in shape
            )
    return lines


def _recorded(disk: Disk, record: Record, base: Mapping[str, tuple[Path, Slot]]) -> list[str]:
    """A managed run records a digest of every tensor, the frozen ones of the base among them."""
    told = disk.json(record, "tensors.json")
    digests = told.get("tensors") if isinstance(told, dict) else None
    # What is trained beside the adapter is in the checkpoint, and differs from the base with good reason.
    trained = disk.header(record, "extra.safetensors") if "extra.safetensors" in disk.files(record) else {}
    lines, left = [], PRINTED
    waiting: list[tuple[int, str, str]] = []
    for name, digest in digests.items() if isinstance(digests, dict) else ():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain not in base or not isinstance(digest, str) or name in trained:
            continue
        slot = base[plain][1]
        kind = digest.partition(":")[0]
        if kind.partition("[")[2] != f"{list(slot.shape)}"[1:]:
            lines.append(f"{plain} was {kind} at the save, the base has {slot.dtype}{list(slot.shape)}")
        elif kind.partition("[")[0] == slot.dtype:
            waiting.append((slot.end - slot.begin, plain, digest))
    for size, plain, digest in sorted(waiting):
        left -= size
        if lines or (left < 0 and not disk.full):
            break
        if _digest(*base[plain], kind_of(digest)) not in (digest, None):
            lines.append(f"{plain} of the base has other values than at the save")
    return lines


def _digest(path: Path, slot: Slot, kind: Kind) -> str | None:
    whole = Sum(kind)
    try:
        with open(path, "rb") as file:
            file.seek(slot.begin)
            left = slot.end - slot.begin
            while left and (piece := file.read(min(left, 1 << 20))):
                whole.update(memoryview(piece))
                left -= len(piece)
    except OSError:
        return None
    return f"{signature(slot.dtype, slot.shape)}:{whole.tensor()}" if not left else None


def _tokens(disk: Disk, record: Record, values: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Tokens of the saved tokenizer that the base has no row for, and the adapter doesn't bring."""
    size = base.get("vocab_size")
    if type(size) is not int or "text_config" in base:
        return []
    lines = []
    rows = {
        slot.shape[0]
        for name, slot in tensors(disk, record).items()
        if EMBEDDING.search(name) and "lora_" not in name and slot.shape
    }
    added = disk.json(record, "added_tokens.json")
    told = disk.json(record, "tokenizer_config.json")
    decoder = told.get("added_tokens_decoder") if isinstance(told, dict) else None
    numbers = [value for value in added.values() if type(value) is int] if isinstance(added, dict) else []
    numbers += [int(key) for key in decoder if re.fullmatch(r"\d{1,12}", str(key))] if isinstance(decoder, dict) else []
    if numbers and max(numbers) >= max({size} | rows):
        count = len({number for number in numbers if number >= max({size} | rows)})
        lines.append(f"the tokenizer has {count} tokens beyond the {max({size} | rows)} rows of base and adapter")
    return lines
