"""A LoRA adapter as its files state it: which weights of the base it changes, and by what."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lastgood.errors import CorruptCheckpoint, NoCheckpoint, NotSupported
from lastgood.store import local
from lastgood.weights.source import Weights

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?P<part>weight|bias))?")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")

# Settings that the check follows, or that mean nothing once training is over. What isn't here must be unset.
# fmt: off
_KNOWN = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
))
# fmt: on

# Other ways to begin (pissa, olora, loftq, corda, lora_ga) change the base itself before the first step.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Factors:
    """The change of one tensor: scaling * B @ A, transposed for an embedding. a: [r, in, ...], b: [out, r, ...]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    embedding: bool

    def rows(self, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(left [rows, r], right [r, the rest]) in float64: the change, row by row, is left @ right."""
        a = self.a.double().reshape(self.a.shape[0], -1)
        b = self.b.double().reshape(self.b.shape[0], -1) * self.scaling
        return (a.T, b.T) if transposed or self.embedding else (b, a)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Everything by the names of the base's own tensors.

    factors: weights and biases that get something added. copies: tensors that the adapter brings in full; `apart`
    are those of them that live in modules of their own (`modules_to_save`): what is tied to the original stays.
    """

    config: Mapping[str, Any]
    factors: dict[str, Factors]
    copies: dict[str, torch.Tensor]
    apart: frozenset[str]

    @classmethod
    def open(cls, directory: Path) -> Adapter:
        """Raises NoCheckpoint, CorruptCheckpoint, NotSupported (another kind than LoRA, or a variant of it)."""
        config = _config(directory)
        if not (directory / TENSORS).is_file():
            raise NoCheckpoint(
                f"{directory} has no {TENSORS}", hint="save the adapter with peft's save_pretrained, as safetensors"
            )
        source = Weights.open([(directory / TENSORS).resolve()])
        sides: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
        copies, apart = {}, set()
        # Names with `modules_to_save` come last: where both are there, they are the trained ones.
        for name in sorted(source.names(), key=lambda name: ".modules_to_save." in name):
            short = name.removeprefix(_PREFIX)
            found = _FACTOR.fullmatch(short)
            if found:
                side = found["side"] + (".bias" if found["part"] == "bias" else "")
                sides.setdefault((found["module"], bool(found["embedding"])), {})[side] = source.tensor(name)
            elif short == name or "lora_" in short or "trainable_tokens" in short:
                raise NotSupported(f"{directory / TENSORS}: tensor {name!r} isn't of a plain LoRA adapter")
            elif ".original_module." not in f".{short}":
                plain = _WRAPPERS.sub("", short)
                copies[plain] = source.tensor(name)
                if _in_modules(plain, config.get("modules_to_save") or []):
                    apart.add(plain)
        factors = {}
        for (wrapped, embedding), parts in sides.items():
            module = _WRAPPERS.sub("", f"{wrapped}.")[:-1]
            if not {"A", "B"} <= parts.keys():
                raise CorruptCheckpoint(f"{directory / TENSORS}: {wrapped!r} has only {', '.join(parts)} of A and B")
            scaling = _scaling(config, module, parts["A"].shape[0])
            factors[f"{module}.weight"] = Factors(parts["A"], parts["B"], scaling, embedding)
            if "B.bias" in parts:
                one = torch.ones(1, 1)
                factors[f"{module}.bias"] = Factors(one, parts["B.bias"].reshape(-1, 1), scaling, False)
        return cls(config, factors, copies, frozenset(apart))

    def touched(self) -> set[str]:
        return {*self.factors, *self.copies}


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads(local.read((directory / CONFIG).resolve(), 16 << 20))
    except OSError as error:
        raise NoCheckpoint(f"{directory} holds no adapter: {CONFIG}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{directory / CONFIG}: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CorruptCheckpoint(f"{directory / CONFIG} isn't the configuration of an adapter")
    if config["peft_type"] != "LORA":
        raise NotSupported(f"{directory} is a {config['peft_type']} adapter: only LoRA can be merged with a check")
    if config.get("use_dora"):
        raise NotSupported(f"{directory} is a DoRA adapter: only plain LoRA can be merged with a check")
    unknown = sorted(name for name, value in config.items() if value and name not in _KNOWN)
    if unknown:
        raise NotSupported(f"{directory / CONFIG} sets {', '.join(unknown)}, which can't be merged with a check")
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise NotSupported(
            f"{directory} began with init_lora_weights={start!r}, which changes the base as well",
            hint="convert it to plain LoRA: peft's save_pretrained with path_initial_model_for_weight_conversion",
        )
    return config


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r). Raises CorruptCheckpoint if the configuration has another rank."""
    stated = _of_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if stated != rank or not isinstance(alpha, (int, float)):
        raise CorruptCheckpoint(
            f"adapter of {module!r}: rank {rank}, but its configuration has r={stated}, alpha={alpha}"
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first key, a regular expression, that fits the end of the module's path from a dot on."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _in_modules(name: str, modules: list[str]) -> bool:
    return any(f".{module}." in f".{name}" for module in modules)
