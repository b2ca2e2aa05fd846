"""The parameters of a model as the other parts of a plan see them: names and shapes, no values."""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

Role = Literal["", "embedding", "head"]


class Tensor(msgspec.Struct, frozen=True):
    """One parameter. linear: the weight of a module that LoRA can go onto (nn.Linear, Conv1D).

    role: "embedding" (the weight of an nn.Embedding), "head" (the output head, where it isn't tied) or "".
    Optimizers treat those two differently: 8-bit ones keep embeddings in fp32, Muon leaves both to AdamW.

    Known of a live model only: dtype (its safetensors code; "": the one that is trained in), trained (an optimizer has
    state for it), stored (its name in the files; "": it isn't saved, as the base under an adapter; None: `name`).
    """

    name: str
    shape: tuple[int, ...]
    linear: bool
    role: Role = ""
    dtype: str = ""
    trained: bool = True
    stored: str | None = None

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """name: as shown. source: where the shapes are from, in words.

    tensors: every parameter once (tied ones under their first name), in the order of the module.
    beside: bytes of tokenizer and config files that each checkpoint holds as well.
    buffers: of a live model, its tensors that aren't parameters. adapter: a live PEFT model, its adapter among them.
    """

    name: str
    source: str
    tensors: tuple[Tensor, ...]
    beside: int = 0
    buffers: tuple[Tensor, ...] = ()
    adapter: bool = False

    @property
    def params(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(tensor.count for tensor in self.tensors)


_EMBEDDING = re.compile(r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|shared|relative_attention_bias)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|lm_head\.decoder|cls\.predictions\.decoder|vocab_projector)\.weight$")
_NO_LINEAR = re.compile(r"(^|\.)(experts|router|block_sparse_moe\.gate|mlp\.gate)\.|norm", re.IGNORECASE)


def guessed(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor with what its name says about its module: all there is to go by in a file of weights."""
    role: Role = "head" if _HEAD.search(name) else "embedding" if _EMBEDDING.search(name) else ""
    linear = len(shape) == 2 and role != "embedding" and name.endswith(".weight") and not _NO_LINEAR.search(name)
    return Tensor(name, shape, linear, role)
