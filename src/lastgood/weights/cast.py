"""The weights of a checkpoint in another floating dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from lastgood.errors import NotSupported, UsageError
from lastgood.state.tensors import CODE_OF
from lastgood.weights.encode import Entry, rounded, write
from lastgood.weights.source import Progress, Weights

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def dtype_named(name: str) -> torch.dtype:
    """Raises UsageError for anything that isn't in DTYPES."""
    if name not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


def cast(
    source: Weights,
    dtype: str,
    write_to: Path,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write one safetensors file; returns the names of the tensors that were converted.

    Integers, booleans and complex numbers are copied, as is what has the dtype already.
    Raises UsageError (a number too large for the dtype, named by its tensor), NotSupported (float8 without its
    scales is no number); then nothing is written.
    """
    target = dtype_named(dtype)
    for name in source.names():
        if source.is_float8(name):
            raise NotSupported(
                f"tensor {name!r} is {source.slot(name).dtype}: its numbers can't be converted apart from their scales",
                hint="dequantise the model with the library that quantised it",
            )
    converted = [name for name in source.names() if source.is_float(name) and source.dtype(name) != target]
    wanted = set(converted)
    done, total = 0, source.size()

    def blocks(name: str) -> Iterator[torch.Tensor]:
        nonlocal done
        for block in source.steps(name):
            result = block
            if name in wanted:
                result = rounded(block, target)
                if bool((result.isinf() & block.isfinite()).any()):
                    largest = float(block[block.isfinite()].abs().max())
                    raise UsageError(
                        f"tensor {name!r} holds {largest:.6g}, which {dtype} can't: its largest number is "
                        f"{torch.finfo(target).max:.6g}",
                        hint="bfloat16 has the range of float32" if dtype == "float16" else "choose a wider dtype",
                    )
            yield result
            done += block.nbytes
            if progress:
                progress(done, total)

    entries = [
        Entry(name, CODE_OF[target] if name in wanted else slot.dtype, slot.shape)
        for name, (_, slot) in source.slots.items()
    ]
    write(write_to, entries, blocks, metadata)
    return converted
