"""Which tensors an optimizer keeps for each parameter, with shapes and dtypes as the real libraries make them.

Sources: torch.optim 2.13 (AdamW, SGD, Adagrad, RMSprop, Muon), transformers' Adafactor, bitsandbytes 0.48 and later
(optim/optimizer.py: fp32 below 4,096 elements and for embeddings, else 8 bits with a scale per 256 elements).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from lastgood.errors import UsageError
from lastgood.format.tensors import SIZES
from lastgood.planner.tensor import Tensor

BLOCK = 256
"""Elements that share one scale in bitsandbytes' 8-bit states."""
SMALLEST_8BIT = 4096
"""Tensors with fewer elements stay in fp32 there."""

DTYPES = {
    **{"fp32": "F32", "float32": "F32", "bf16": "BF16", "bfloat16": "BF16"},
    **{"fp16": "F16", "float16": "F16", "fp64": "F64", "float64": "F64"},
}
"""The words for dtypes and their safetensors codes."""


class Slot(NamedTuple):
    """One tensor of a parameter's state. shared: the same storage for all parameters (a quantisation table)."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    shared: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return SIZES[self.dtype] * math.prod(self.shape)


class Optimizer(NamedTuple):
    """name: as shown. states: the state of one parameter whose weights, or fp32 masters, have this dtype code."""

    name: str
    states: Callable[[Tensor, str], tuple[Slot, ...]]


STEP = Slot("step", "F32", ())


def _like(*keys: str, step: bool = False) -> Callable[[Tensor, str], tuple[Slot, ...]]:
    """States of the parameter's own shape and dtype."""

    def states(tensor: Tensor, dtype: str) -> tuple[Slot, ...]:
        return ((STEP,) if step else ()) + tuple(Slot(key, dtype, tensor.shape) for key in keys)

    return states


def _adafactor(tensor: Tensor, dtype: str) -> tuple[Slot, ...]:
    dtype = dtype if SIZES[dtype] > 4 else "F32"  # it makes fp32 of half-precision gradients first
    if len(tensor.shape) < 2:
        return (Slot("exp_avg_sq", dtype, tensor.shape), Slot("RMS", "F32", ()))
    row = Slot("exp_avg_sq_row", dtype, tensor.shape[:-1])
    return (row, Slot("exp_avg_sq_col", dtype, tensor.shape[:-2] + tensor.shape[-1:]), Slot("RMS", "F32", ()))


def _muon(tensor: Tensor, dtype: str) -> tuple[Slot, ...]:
    if len(tensor.shape) == 2 and not tensor.role:
        return (Slot("momentum_buffer", dtype, tensor.shape),)
    return _adamw(tensor, dtype)


def _bitsandbytes(bits: int, buffers: tuple[int, ...]) -> Callable[[Tensor, str], tuple[Slot, ...]]:
    """buffers: for each state how many times the parameter's size it has (AdEMAMix keeps two averages in one)."""

    def states(tensor: Tensor, dtype: str) -> tuple[Slot, ...]:
        eight = bits == 8 and tensor.count >= SMALLEST_8BIT and tensor.role != "embedding"
        slots = []
        for number, times in enumerate(buffers, 1):
            shape = tensor.shape if times == 1 else (times, *tensor.shape)
            slots.append(Slot(f"state{number}", "U8" if eight else "F32", shape))
            if eight:
                blocks = -(-tensor.count // BLOCK)
                slots.append(Slot(f"qmap{number}", "F32", (256,), shared=True))
                slots.append(Slot(f"absmax{number}", "F32", (blocks,) if times == 1 else (times, blocks)))
        return tuple(slots)

    return states


_adamw = _like("exp_avg", "exp_avg_sq", step=True)

KNOWN: dict[str, Optimizer] = {
    **dict.fromkeys(
        ("adamw", "adam", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"),
        Optimizer("AdamW", _adamw),
    ),
    "sgd": Optimizer("SGD", _like()),
    "sgd_momentum": Optimizer("SGD with momentum", _like("momentum_buffer")),
    "adafactor": Optimizer("Adafactor", _adafactor),
    "adagrad": Optimizer("Adagrad", _like("sum", step=True)),
    "rmsprop": Optimizer("RMSprop", _like("square_avg", step=True)),
    "muon": Optimizer("Muon", _muon),
}


def _names(kind: str, bits: int) -> tuple[str, ...]:
    words = {"adamw": ("adamw", "adamw_bnb"), "rmsprop": ("rmsprop_bnb",)}.get(kind, (kind,))
    names = [f"{paged}{word}_{bits}bit" for word in words for paged in ("", "paged_")]
    return (*names, *((kind if kind != "rmsprop" else "rmsprop_bnb",) if bits == 32 and kind != "adamw" else ()))


for _kind, _title, _buffers in (
    ("adamw", "AdamW", (1, 1)),
    ("lion", "Lion", (1,)),
    ("rmsprop", "RMSprop", (1,)),
    ("ademamix", "AdEMAMix", (2, 1)),
):
    for _bits in (8, 32):
        _made = Optimizer(f"{_bits}-bit {_title} (bitsandbytes)", _bitsandbytes(_bits, _buffers))
        KNOWN.update(dict.fromkeys(_names(_kind, _bits), _made))


def optimizer(name: str) -> Optimizer:
    """By its name here or in TrainingArguments(optim=...). Raises UsageError with near names."""
    word = re.sub(r"[^a-z0-9]+", "_", name.lower().replace("momentum=", "momentum ")).strip("_")
    word = "sgd_momentum" if re.fullmatch(r"sgd(_with)?_momentum(_\d+)*", word) else word
    if word in KNOWN:
        return KNOWN[word]
    near = difflib.get_close_matches(word, KNOWN, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"those that are: {', '.join(KNOWN)}"
    raise UsageError(f"the state of the optimizer {name!r} isn't known", hint=hint)


def dtype_code(option: str, name: str) -> str:
    """The safetensors code of "bf16" and the like. Raises UsageError, naming the option."""
    code = DTYPES.get(name.lower().removeprefix("torch."))
    if code is None:
        raise UsageError(f"{option}={name!r} isn't a dtype to train in", hint=f"one of {', '.join(DTYPES)}")
    return code
