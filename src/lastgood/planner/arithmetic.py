"""config.json -> every parameter's name and shape by arithmetic: for machines without torch, and in a millisecond."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lastgood.errors import UsageError
from lastgood.planner.families import FAMILIES, Family
from lastgood.planner.tensor import Role, Tensor

LAYERS_LIMIT, SIZE_LIMIT = 10_000, 1 << 32
"""Most layers, and the largest width or vocabulary, that are believed: a configuration with more is a mistake, and its
layers would take all memory."""


def tensors(config: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
    """The parameters in the order of the module; None for a family, head or option that no table describes.

    Raises UsageError for a size that isn't a positive whole number.
    """
    family = FAMILIES.get(str(config.get("model_type", "")))
    if family is None or not _usual(config, family):
        return None
    return tuple(_rows(family.table, _values(config, family)))


def _usual(config: Mapping[str, Any], family: Family) -> bool:
    plain = all(config.get(key, value) == value for key, value in family.plain.items())
    return plain and (config.get("architectures") or [family.architecture]) == [family.architecture]


def _values(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Letter -> size and key -> flag."""
    known = {**family.defaults, **config}
    sizes = {letter: known.get(key) for letter, key in family.letters.items()}
    # What a configuration leaves open is a size of its own: as many key heads as heads, an inner width of 4 ...
    width, heads = sizes.get("D"), sizes.get("H")
    derived = {
        "K": heads,
        "M": sizes.get("N"),
        "W": width,
        "A": width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None,
        "F": 4 * width if isinstance(width, int) else None,
    }
    for letter, key in family.letters.items():
        value = derived.get(letter) if sizes[letter] is None else sizes[letter]
        if type(value) is not int or not 1 <= value <= (LAYERS_LIMIT if letter in "NM" else SIZE_LIMIT):
            raise UsageError(f"{key} of the configuration is {known.get(key)!r}, not a possible size")
        sizes[letter] = value
    tied = family.always or bool(known.get("tie_word_embeddings", family.tied))
    gated = str(known.get("feed_forward_proj", "")).startswith("gated")
    return {
        **known,
        **sizes,
        **{"tied": tied, "untied": not tied, "gated": gated, "plain_mlp": not gated},
        "projected": sizes.get("W") != width,
    }


def _rows(table: str, values: Mapping[str, Any]) -> Iterator[Tensor]:
    block: list[list[str]] = []
    prefix, count = "", 1
    for line in [*table.splitlines(), "@"]:
        words = line.split()
        if not words:
            continue
        if words[0] != "@":
            block.append(words)
            continue
        for i in range(count):
            place = f"{prefix}.{i}." if prefix else ""
            for row in block:
                yield from _module(row, place, {**values, "first": i == 0} if prefix else values)
        block = []
        prefix, count = (words[1], values[words[2]]) if len(words) == 3 else ("", 1)


def _module(words: list[str], place: str, values: Mapping[str, Any]) -> Iterator[Tensor]:
    kind, name, *rest = words
    name = place + name
    if rest[-1].startswith("?") and not values.get(rest.pop()[1:]):
        return
    bias = rest.pop()[1:] if rest[-1].startswith("+") else None
    shape = tuple(_extent(text, values) for text in rest)
    if kind == "P":
        yield Tensor(name, shape, False)
        return
    role: Role = "embedding" if kind == "E" else "head" if kind == "H" else ""
    if kind != "H" or not values["tied"]:
        yield Tensor(f"{name}.weight", shape, kind in "LCH", role)
    if kind in "BC" or bias == "" or (bias is not None and values.get(bias)):
        yield Tensor(f"{name}.bias", (shape[-1] if kind in "BC" else shape[0],), False)


def _extent(text: str, values: Mapping[str, Any]) -> int:
    products = (part.split("*") for part in text.split("+"))
    return sum(math.prod(int(values.get(word, word)) for word in factors) for factors in products)
