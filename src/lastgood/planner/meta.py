"""A configuration -> its parameters, by building the model on torch's meta device: exact for every architecture.

The one file of this package that imports torch and transformers, inside its functions. Nothing is downloaded and no
memory is taken: meta tensors have a shape and no data.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lastgood.errors import UsageError
from lastgood.planner.arithmetic import LAYERS_LIMIT
from lastgood.planner.tensor import Role, Tensor

HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
"""What a model type is built as where its configuration names no architecture, in this order."""


DEPTHS = frozenset(
    f"{word}{end}" for word in ("num_", "n_", "encoder_", "decoder_", "num_hidden_", "num_decoder_", "num_encoder_")
    for end in ("layer", "layers", "blocks", "experts", "local_experts", "routed_experts")
)  # fmt: skip
"""What configurations call the number of modules that are made again and again."""


def installed() -> bool:
    """Whether torch and transformers are there, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def tensors(config: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The parameters in the order of the module, tied ones once.

    Raises UsageError where transformers doesn't know the model type or can't build the model.
    """
    if not installed():
        raise UsageError(
            "torch and transformers aren't installed, so this model can't be built",
            hint="pip install 'lastgood[trl]', or name a model of the table, such as --model 7B",
        )
    _believed(config)
    import torch

    with _offline(), torch.device("meta"):
        try:
            model = _build(config)
        except UsageError:
            raise
        except Exception as error:  # a model's __init__ can raise anything for a configuration that isn't right
            raise UsageError(
                f"transformers can't build a {config.get('model_type')!r} model from this configuration:"
                f" {type(error).__name__}: {str(error)[:300]}",
                hint="correct the configuration, or point to the model's directory with its safetensors files",
            ) from error
    return tuple(_described(model))


def _believed(config: Mapping[str, Any]) -> None:
    """Raise UsageError for a number of layers that would take all memory and hours, even without their data."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _believed(value)
        elif key in DEPTHS and isinstance(value, (int, float)) and value > LAYERS_LIMIT:
            raise UsageError(f"{key} of the configuration is {value!r}, not a possible size")


def _build(config: Mapping[str, Any]) -> Any:
    import transformers

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UsageError(
            f"transformers {transformers.__version__} has no model type {kind!r}",
            hint="a newer transformers may have it; or point to the model's directory with its safetensors files",
        )
    made = transformers.CONFIG_MAPPING[kind].from_dict(
        {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    )
    named = config.get("architectures")
    wanted = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    if wanted is not None and hasattr(wanted, "_from_config"):
        return wanted._from_config(made)
    for name in HEADS:
        head = getattr(transformers, name)
        if type(made) in head._model_mapping:
            return head.from_config(made)
    raise UsageError(f"transformers has no model class for {kind!r}")


def _described(model: Any) -> Iterator[Tensor]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        weight = leaf == "weight"
        role: Role = ""
        if weight and (module is head or isinstance(module, nn.Embedding)):
            role = "head" if module is head else "embedding"
        yield Tensor(name, tuple(parameter.shape), weight and isinstance(module, (nn.Linear, Conv1D)), role)


@contextmanager
def _offline() -> Iterator[None]:
    """Some configurations name a backbone that transformers would fetch; a plan never waits for a network."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
