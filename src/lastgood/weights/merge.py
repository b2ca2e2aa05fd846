"""A LoRA adapter merged into its base: transformers and peft do it, `weights.check` proves it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lastgood.errors import Incompatible
from lastgood.store import local
from lastgood.store.appear import appearing
from lastgood.weights.adapter import Adapter
from lastgood.weights.base import Base, find_base, weight_of
from lastgood.weights.cast import dtype_named
from lastgood.weights.check import check, check_files
from lastgood.weights.source import Weights

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that belong together: all are taken from the adapter if it has a tokenizer, else all from the base."""

PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class MergeReport:
    """target: the new directory. tensors: all of the model. merged and replaced: names by what happened to them.

    files_checked: tensors that were also compared with the base's files. copied: tokenizer and processor files.
    """

    target: Path
    base: Path
    dtype: str
    tensors: int
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    files_checked: int
    copied: tuple[str, ...]


def merge(adapter_dir: Path, base: Path | None, target: Path, dtype: str | None = None) -> MergeReport:
    """Create the directory `target` with the merged model; nothing is left there unless every tensor is as it must be.

    base: a local directory; None: the one that the adapter names, if it is on this machine. dtype: of all floating
    tensors, else that of the base. Holds the model twice in memory, for the check. Never uses the network.
    Raises UsageError (target exists), NoCheckpoint (no adapter, no base), NotSupported, Incompatible (the check).
    """
    wanted = dtype_named(dtype) if dtype is not None else None
    adapter = Adapter.open(adapter_dir)
    source = Base.open(find_base(adapter.config) if base is None else base, adapter)
    with appearing(target) as staging:
        name = _write(source, adapter_dir, staging, wanted)
        copied = _copy_tokenizer(adapter_dir, source.path, staging)
        # Both are read anew: what counts is what is on disk.
        reference, result = source.load(source.wide(wanted)), source.load_merged(staging)
        check(reference, result, adapter, wanted)
        changed = adapter.touched() | set(_twins(reference, adapter))
        tensors = len(result.state_dict())
        del reference, result
        written = sorted(path for path in staging.iterdir() if path.suffix == ".safetensors")
        files_checked = check_files(source.weights, Weights.open(written), changed, wanted) if source.weights else 0
        for path in written:
            local.adopt(path)
    return MergeReport(
        target=target,
        base=source.path,
        dtype=name,
        tensors=tensors,
        merged=tuple(sorted(adapter.factors)),
        replaced=tuple(sorted(adapter.copies)),
        files_checked=files_checked,
        copied=tuple(copied),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and deprecations: what matters is said at the end, errors are raised."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write(source: Base, adapter_dir: Path, staging: Path, wanted: torch.dtype | None) -> str:
    """What peft makes of it, saved. Returns the dtype."""
    from peft import PeftModel

    adapter, model = source.adapter, source.load(source.wide(wanted))
    missing = sorted(adapter.touched() - model.state_dict().keys())
    if missing:
        raise Incompatible(
            f"the base {source.path} ({type(model).__name__}) lacks what the adapter changes: {', '.join(missing[:8])}",
            hint="give the base that the adapter was trained on",
        )
    _untie(model, adapter)
    tuned = PeftModel.from_pretrained(model, str(adapter_dir), torch_device="cpu", is_trainable=False)
    merged = tuned.merge_and_unload()
    if wanted is not None:
        merged = merged.to(wanted)
    merged.save_pretrained(staging)
    return str(merged.dtype).removeprefix("torch.")


def _untie(model: Any, adapter: Adapter) -> None:
    """Give the output layer its own weight if the adapter changes only one of two that are the same."""
    shared = weight_of(model, "get_input_embeddings")
    if shared is None or weight_of(model, "get_output_embeddings") is not shared:
        return
    names = {name for name, tensor in model.state_dict().items() if tensor.data_ptr() == shared.data_ptr()}
    if names & (adapter.factors.keys() | adapter.apart):
        model.get_output_embeddings().weight = torch.nn.Parameter(shared.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _twins(model: torch.nn.Module, adapter: Adapter) -> Iterator[str]:
    """Tensors that are the same memory as one that the adapter changes."""
    state = model.state_dict()
    places = {state[name].data_ptr() for name in adapter.touched() if name in state}
    return (name for name, tensor in state.items() if tensor.data_ptr() in places)


def _copy_tokenizer(adapter_dir: Path, base: Path, target: Path) -> list[str]:
    """Names of the files copied. A link is followed: the cache of the hub consists of links."""
    owner = adapter_dir if any((adapter_dir / name).is_file() for name in TOKENIZER[:3]) else base
    wanted = [owner / name for name in TOKENIZER]
    wanted += [next((d / name for d in (adapter_dir, base) if (d / name).is_file()), base / name) for name in PROCESSOR]
    copied = []
    for path in wanted:
        if path.is_file() and not (target / path.name).exists():
            with open(path, "rb") as file:
                local.write(target / path.name, iter(lambda file=file: file.read(1 << 20), b""), sync=False)  # type: ignore[misc]
            copied.append(path.name)
    return copied
