"""Metrics as they are named on the command line: `mmlu`, `mmlu:max`, `0.5*mmlu + 0.5*gsm8k:max`."""

from __future__ import annotations

from typing import Any

from lastgood.errors import UsageError
from lastgood.formula import parse
from lastgood.ranking import Mode, known_mode


def split(word: str) -> tuple[str, Mode | None]:
    """(metric, direction if it is named)."""
    name, _, way = word.rpartition(":")
    if name and way in ("min", "max"):
        return name, "min" if way == "min" else "max"
    return word, None


def named(words: tuple[str, ...], mode: Mode | None) -> dict[str, Any]:
    """The options monitor and mode of a policy, from --monitor (any number of times) and --mode."""
    pairs = [split(word) for word in words]
    if mode is not None and len(pairs) > 1:
        raise UsageError("--mode is for one metric", hint="--monitor eval_loss:min --monitor mmlu:max")
    if mode is not None and any(way not in (None, mode) for _, way in pairs):
        raise UsageError(f"--mode {mode} and --monitor {words[0]} disagree", hint="leave --mode out")
    if len(pairs) > 1:
        return {"monitor": tuple(name for name, _ in pairs), "mode": tuple(way for _, way in pairs)}
    return {"monitor": pairs[0][0] if pairs else None, "mode": (pairs[0][1] if pairs else None) or mode}


def aims(word: str) -> dict[str, Mode]:
    """`eval_loss:min,mmlu:max`: the metrics of a Pareto view. Raises UsageError."""
    found: dict[str, Mode] = {}
    for part in filter(None, map(str.strip, _outside_brackets(word))):
        name, way = split(part)
        parse(name)  # a slip in a formula is named as such
        direction = way or known_mode(name)
        if direction is None:
            raise UsageError(f"is a lower or a higher {name} better?", hint=f"{name}:min or {name}:max")
        found[name] = direction
    if len(found) < 2:
        raise UsageError("--pareto weighs metrics against each other: name two or more", hint="eval_loss:min,mmlu:max")
    return found


def _outside_brackets(word: str) -> list[str]:
    """Split at the commas that aren't between the values of a function."""
    parts, depth = [""], 0
    for letter in word:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
