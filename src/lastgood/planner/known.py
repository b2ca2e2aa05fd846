"""Well-known models: their families and the sizes of their published configurations."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_LLAMA = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_KEYS = {
    "gpt2": ("vocab_size", "n_embd", "n_layer"),
    "t5": ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff", "feed_forward_proj"),
    "bert": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "roberta": (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("max_position_embeddings", "type_vocab_size"),
    ),
    "distilbert": ("vocab_size", "dim", "n_layers"),
}


class Known(NamedTuple):
    """tokenizer: bytes of its files as save_pretrained writes them, about."""

    title: str
    family: str
    values: tuple[Any, ...]
    tokenizer: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """As its config.json has it. Last values of the llama-like ones: inner width, head_dim, tied."""
        if self.family in _KEYS:
            return {"model_type": self.family, **dict(zip(_KEYS[self.family], self.values, strict=True))}
        keys = (*_LLAMA, "intermediate_size", "head_dim", "tie_word_embeddings")
        return {"model_type": self.family, **dict(zip(keys, self.values, strict=False))}


def _table() -> dict[str, Known]:
    mb = 1_000_000
    llama2, llama3, mistral, nemo = 3.6 * mb, 17.3 * mb, 3.6 * mb, 17.1 * mb
    qwen, gemma, gemma3, phi, gpt2, t5, bert = (11.5 * mb, 34.4 * mb, 33.4 * mb, 3.6 * mb, 3.6 * mb, 2.4 * mb, 0.7 * mb)
    rows: tuple[tuple[str, str, float, tuple[Any, ...]], ...] = (
        ("Llama-2-7B", "llama", llama2, (32000, 4096, 32, 32, 32, 11008)),
        ("Llama-2-13B", "llama", llama2, (32000, 5120, 40, 40, 40, 13824)),
        ("Llama-2-70B", "llama", llama2, (32000, 8192, 80, 64, 8, 28672)),
        ("Llama-30B", "llama", llama2, (32000, 6656, 60, 52, 52, 17920)),
        ("Llama-65B", "llama", llama2, (32000, 8192, 80, 64, 64, 22016)),
        ("Llama-3-8B", "llama", llama3, (128256, 4096, 32, 32, 8, 14336)),
        ("Llama-3-70B", "llama", llama3, (128256, 8192, 80, 64, 8, 28672)),
        ("Llama-3.1-8B", "llama", llama3, (128256, 4096, 32, 32, 8, 14336)),
        ("Llama-3.1-70B", "llama", llama3, (128256, 8192, 80, 64, 8, 28672)),
        ("Llama-3.3-70B", "llama", llama3, (128256, 8192, 80, 64, 8, 28672)),
        ("Llama-3.1-405B", "llama", llama3, (128256, 16384, 126, 128, 8, 53248)),
        ("Llama-3.2-1B", "llama", llama3, (128256, 2048, 16, 32, 8, 8192, 64, True)),
        ("Llama-3.2-3B", "llama", llama3, (128256, 3072, 28, 24, 8, 8192, 128, True)),
        ("TinyLlama-1.1B", "llama", llama2, (32000, 2048, 22, 32, 4, 5632)),
        ("Mistral-7B", "mistral", mistral, (32000, 4096, 32, 32, 8, 14336)),
        ("Mistral-7B-v0.3", "mistral", mistral, (32768, 4096, 32, 32, 8, 14336)),
        ("Mistral-Nemo", "mistral", nemo, (131072, 5120, 40, 32, 8, 14336, 128)),
        ("Mistral-Small-24B", "mistral", nemo, (131072, 5120, 40, 32, 8, 32768, 128)),
        ("Mixtral-8x7B", "mixtral", mistral, (32000, 4096, 32, 32, 8, 14336)),
        ("Mixtral-8x22B", "mixtral", mistral, (32768, 6144, 56, 48, 8, 16384)),
        ("Qwen2.5-0.5B", "qwen2", qwen, (151936, 896, 24, 14, 2, 4864, 64, True)),
        ("Qwen2.5-1.5B", "qwen2", qwen, (151936, 1536, 28, 12, 2, 8960, 128, True)),
        ("Qwen2.5-3B", "qwen2", qwen, (151936, 2048, 36, 16, 2, 11008, 128, True)),
        ("Qwen2.5-7B", "qwen2", qwen, (152064, 3584, 28, 28, 4, 18944)),
        ("Qwen2.5-14B", "qwen2", qwen, (152064, 5120, 48, 40, 8, 13824)),
        ("Qwen2.5-32B", "qwen2", qwen, (152064, 5120, 64, 40, 8, 27648)),
        ("Qwen2.5-72B", "qwen2", qwen, (152064, 8192, 80, 64, 8, 29568)),
        ("Qwen3-0.6B", "qwen3", qwen, (151936, 1024, 28, 16, 8, 3072, 128, True)),
        ("Qwen3-1.7B", "qwen3", qwen, (151936, 2048, 28, 16, 8, 6144, 128, True)),
        ("Qwen3-4B", "qwen3", qwen, (151936, 2560, 36, 32, 8, 9728, 128, True)),
        ("Qwen3-8B", "qwen3", qwen, (151936, 4096, 36, 32, 8, 12288, 128)),
        ("Qwen3-14B", "qwen3", qwen, (151936, 5120, 40, 40, 8, 17408, 128)),
        ("Qwen3-32B", "qwen3", qwen, (151936, 5120, 64, 64, 8, 25600, 128)),
        ("Gemma-2B", "gemma", gemma, (256000, 2048, 18, 8, 1, 16384, 256, True)),
        ("Gemma-7B", "gemma", gemma, (256000, 3072, 28, 16, 16, 24576, 256, True)),
        ("Gemma-2-2B", "gemma2", gemma, (256000, 2304, 26, 8, 4, 9216, 256, True)),
        ("Gemma-2-9B", "gemma2", gemma, (256000, 3584, 42, 16, 8, 14336, 256, True)),
        ("Gemma-2-27B", "gemma2", gemma, (256000, 4608, 46, 32, 16, 36864, 128, True)),
        ("Gemma-3-1B", "gemma3_text", gemma3, (262144, 1152, 26, 4, 1, 6912, 256, True)),
        ("Phi-3-mini", "phi3", phi, (32064, 3072, 32, 32, 32, 8192)),
        ("Phi-3-medium", "phi3", phi, (32064, 5120, 40, 40, 10, 17920)),
        ("Phi-4", "phi3", 7 * mb, (100352, 5120, 40, 40, 10, 17920)),
        ("DistilGPT2", "gpt2", gpt2, (50257, 768, 6)),
        ("GPT2", "gpt2", gpt2, (50257, 768, 12)),
        ("GPT2-medium", "gpt2", gpt2, (50257, 1024, 24)),
        ("GPT2-large", "gpt2", gpt2, (50257, 1280, 36)),
        ("GPT2-xl", "gpt2", gpt2, (50257, 1600, 48)),
        ("T5-small", "t5", t5, (32128, 512, 6, 8, 64, 2048, "relu")),
        ("T5-base", "t5", t5, (32128, 768, 12, 12, 64, 3072, "relu")),
        ("T5-large", "t5", t5, (32128, 1024, 24, 16, 64, 4096, "relu")),
        ("T5-3B", "t5", t5, (32128, 1024, 24, 32, 128, 16384, "relu")),
        ("T5-11B", "t5", t5, (32128, 1024, 24, 128, 128, 65536, "relu")),
        ("Flan-T5-small", "t5", t5, (32128, 512, 8, 6, 64, 1024, "gated-gelu")),
        ("Flan-T5-base", "t5", t5, (32128, 768, 12, 12, 64, 2048, "gated-gelu")),
        ("Flan-T5-large", "t5", t5, (32128, 1024, 24, 16, 64, 2816, "gated-gelu")),
        ("Flan-T5-xl", "t5", t5, (32128, 2048, 24, 32, 64, 5120, "gated-gelu")),
        ("Flan-T5-xxl", "t5", t5, (32128, 4096, 24, 64, 64, 10240, "gated-gelu")),
        ("BERT-base", "bert", bert, (30522, 768, 12, 12, 3072)),
        ("BERT-large", "bert", bert, (30522, 1024, 24, 16, 4096)),
        ("RoBERTa-base", "roberta", gpt2, (50265, 768, 12, 12, 3072, 514, 1)),
        ("RoBERTa-large", "roberta", gpt2, (50265, 1024, 24, 16, 4096, 514, 1)),
        ("DistilBERT-base", "distilbert", bert, (30522, 768, 6)),
    )
    return {title.lower(): Known(title, family, values, int(size)) for title, family, size, values in rows}


MODELS = _table()

SIZES = {
    **{"82M": "distilgpt2", "110M": "bert-base", "124M": "gpt2", "340M": "bert-large", "350M": "gpt2-medium"},
    **{"355M": "gpt2-medium", "774M": "gpt2-large", "0.5B": "qwen2.5-0.5b", "500M": "qwen2.5-0.5b"},
    **{"0.6B": "qwen3-0.6b", "1B": "gemma-3-1b", "1.1B": "tinyllama-1.1b", "1.5B": "qwen2.5-1.5b"},
    **{"1.7B": "qwen3-1.7b", "3B": "qwen2.5-3b", "3.8B": "phi-3-mini", "4B": "qwen3-4b", "7B": "llama-2-7b"},
    **{"8B": "llama-3.1-8b", "9B": "gemma-2-9b", "12B": "mistral-nemo", "13B": "llama-2-13b"},
    **{"14B": "qwen2.5-14b", "24B": "mistral-small-24b", "27B": "gemma-2-27b", "32B": "qwen2.5-32b"},
    **{"47B": "mixtral-8x7b", "8X7B": "mixtral-8x7b", "8X22B": "mixtral-8x22b", "65B": "llama-65b"},
    **{"70B": "llama-3.1-70b", "72B": "qwen2.5-72b", "405B": "llama-3.1-405b"},
}
"""Bare sizes and the model whose shapes they get; each has about that many parameters (tests: within 6 %)."""

_NOISE = frozenset(
    (
        *("meta", "hf", "instruct", "chat", "base", "it", "pt", "uncased", "cased", "v0.1", "v0.2", "v0.3", "v1.0"),
        *("4k", "8k", "128k", "2407", "2409", "2501", "openai", "google"),
    )
)
"""Words in the names of models that don't change their shapes."""


def by_name(name: str) -> Known | None:
    """The model of a name as the hub spells it: owner, -Instruct and the like don't count."""
    words = re.split(r"[-_\s]+", name.strip().rstrip("/").rpartition("/")[2].lower())
    found = []
    for key, known in MODELS.items():
        parts = key.split("-")
        if "".join(word for word in words if word in parts or word not in _NOISE) == "".join(parts):
            found.append((len(parts), key, known))
    return max(found)[2] if found else None


def scaled(count: float) -> Mapping[str, Any]:
    """A llama-like configuration with about `count` parameters: depth from the cube root, then width, then the rest."""
    tied = count < 1e9
    vocabulary = 32000 if count >= 5e7 else 4000 if count >= 2e6 else 256
    # A layer of width d has about 12 d^2 parameters, and models are about 112 times as wide as deep.
    layers = max(2, round((count / (12 * 112**2)) ** (1 / 3)))
    tables = vocabulary * (1 if tied else 2)
    width_as_is = (math.sqrt(tables**2 + 48 * layers * count) - tables) / (24 * layers)
    unit = 128 if width_as_is >= 1024 else 64 if width_as_is >= 256 else 8
    width = max(unit, round(width_as_is / unit) * unit)
    rest = (count - tables * width) / layers - 4 * width**2
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // unit),
        "intermediate_size": max(1, round(rest / (3 * width))),
        "tie_word_embeddings": tied,
    }
