"""Names and shapes on disk -> those of the live model, by transformers' own conversions.

`save_pretrained` writes many architectures in the layout they were published in (one
tensor per expert, older module names). The way back is the one `from_pretrained` takes,
run on a copy of the model that holds no data, so that nothing live is touched.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from lastgood.state.fingerprint import live_tensors


def converted(model: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """live name -> tensor for all that the conversions yield from `saved`; {} for a model without conversions.

    Which of them are right is for the caller to check against digests: conversions depend on
    the version of transformers and on how the model was made.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return {}
    if not isinstance(model, PreTrainedModel):
        return {}
    # How the files look depends on how the model came about; both candidates are tried, digests decide.
    mappings = [get_model_conversion_mapping(model)]
    if getattr(model, "_weight_conversions", None):
        mappings.insert(0, model._weight_conversions)
    result: dict[str, torch.Tensor] = {}
    for mapping in mappings:
        for name, tensor in _load(model, saved, mapping).items():
            result.setdefault(name, tensor)
    return result


def tables() -> None:
    """Have transformers make its tables of conversions: a fifth of a second that the first save would take."""
    if "transformers" not in sys.modules:
        return
    with suppress(Exception):  # it is only for speed
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("")


def _load(model: Any, saved: Mapping[str, torch.Tensor], mapping: list[Any]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    shadow = hollow(model)
    settings = LoadStateDictConfig(weight_mapping=copy.deepcopy(mapping), device_map={"": "cpu"})
    with _without_progress_bars():
        convert_and_load_state_dict_in_model(shadow, dict(saved), settings)
    return {name: tensor.detach() for name, tensor in live_tensors(shadow).items()}


def hollow(model: torch.nn.Module) -> Any:
    """A copy of the model's structure with every parameter and buffer on the meta device: no data is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


class _without_progress_bars:
    """transformers draws a bar for each load; a self-check inside a save is nobody's progress."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self._shown = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        self._level = logging.getLogger("transformers").level

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf_logging

        if self._shown:
            hf_logging.enable_progress_bar()
