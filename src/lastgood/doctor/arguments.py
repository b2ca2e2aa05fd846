"""Training arguments from wherever people keep them: an object, a mapping, JSON, YAML or training_args.bin."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lastgood.errors import UsageError
from lastgood.layouts import trainer
from lastgood.store import local

LIMIT = 16 << 20
"""Bytes of a file of arguments that are read: more is something else."""

SECTIONS = ("training_arguments", "training_args", "training", "train", "args", "trainer")
"""Where configuration files of training scripts put them, if not at the top."""


def load(source: Any) -> Mapping[str, object]:
    """name -> value. Raises UsageError for what can't be read, or holds no arguments."""
    if isinstance(source, Mapping):
        return _section({str(name): value for name, value in source.items()})
    if isinstance(source, (str, os.PathLike)):
        return _section(_read(Path(source)))
    values = getattr(source, "__dict__", None)
    if isinstance(values, dict) and ("save_strategy" in values or "output_dir" in values):
        return {name: _plain(value) for name, value in values.items() if not name.startswith("_")}
    raise UsageError(
        f"args is a {type(source).__name__}, not training arguments",
        hint="give a TrainingArguments object, a mapping, or the path of a JSON or YAML file",
    )


def _read(path: Path) -> dict[str, object]:
    if path.name == "training_args.bin":
        found = trainer.arguments(path.parent)
        if not found:
            raise UsageError(f"{path} can't be read, or holds no training arguments")
        return dict(found)
    try:
        text = local.read(path, LIMIT).decode()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
    value = _json(path, text) if path.suffix == ".json" else _yaml(path, text)
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no arguments: a table of names and values is expected at its top")
    return {str(name): item for name, item in value.items()}


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} isn't JSON: {error}") from error


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UsageError(f"{path} is YAML, and PyYAML isn't installed", hint="pip install pyyaml, or JSON") from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path} isn't YAML: {error}") from error


def _section(values: dict[str, object]) -> dict[str, object]:
    """The table itself, or the one inside it that holds the arguments."""
    for name in SECTIONS:
        inner = values.get(name)
        if isinstance(inner, dict) and "save_steps" not in values and "save_strategy" not in values:
            return {str(key): value for key, value in inner.items()}
    return values


def _plain(value: Any) -> Any:
    inner = getattr(value, "value", None)
    return inner if isinstance(inner, (str, int, float)) else value
