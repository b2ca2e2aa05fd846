"""The weighted average of checkpoints, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lastgood.errors import CorruptCheckpoint, Incompatible, NotSupported, UsageError
from lastgood.weights.encode import Entry, bits, rounded, write
from lastgood.weights.source import Progress, Weights


def equal(n: int) -> list[float]:
    """The same weight for each of n checkpoints."""
    if n < 1:
        raise UsageError("there is nothing to average")
    return [1 / n] * n


def ema(n: int, decay: float) -> list[float]:
    """Weights, oldest first: each is `decay` times the next one; they sum to 1.

    Without the start-up bias of the plain recursion, which would give the oldest of a few checkpoints nearly all.
    """
    if n < 1 or not 0 < decay <= 1:
        raise UsageError(f"an average of {n} checkpoints with decay {decay!r}: at least 1, and more than 0 up to 1")
    raw = [decay ** (n - 1 - index) for index in range(n)]
    return [weight / math.fsum(raw) for weight in raw]


def average(
    sources: Sequence[Weights],
    weights: Sequence[float],
    write_to: Path,
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write one safetensors file; returns the names that were taken from the last source instead of averaged.

    Floating and complex numbers are summed in float64 and rounded once. Integers and booleans that differ are taken
    from the last source. Where all sources hold the same bits, so does the file.
    Raises UsageError (weights that are negative or don't sum to 1), Incompatible (other names, shapes or dtypes),
    CorruptCheckpoint (a NaN), NotSupported (float8 that differs); then nothing is written.
    """
    _check(sources, weights)
    last = sources[-1]
    done, total = 0, last.size()
    taken: list[str] = []

    def blocks(name: str) -> Iterator[torch.Tensor]:
        nonlocal done
        numeric = last.is_float(name) or last.dtype(name).is_complex
        for parts in zip(*(source.steps(name) for source in sources), strict=True):
            for index, part in enumerate(parts):
                if (numeric or last.is_float8(name)) and bool(part.isnan().any()):
                    raise CorruptCheckpoint(f"tensor {name!r} of checkpoint {index + 1} of {len(sources)} has a NaN")
            if all(torch.equal(bits(part), bits(parts[-1])) for part in parts[:-1]):
                block = parts[-1]
            elif numeric:
                block = _mean(name, parts, weights)
            elif last.is_float8(name):
                raise NotSupported(
                    f"tensor {name!r} is {last.slot(name).dtype}: its numbers mean nothing apart from their scales",
                    hint="average the checkpoints before they are quantised",
                )
            else:
                block = parts[-1]
                if name not in taken:
                    taken.append(name)
            yield block
            done += block.nbytes
            if progress:
                progress(done, total)

    write(write_to, [Entry(name, slot.dtype, slot.shape) for name, (_, slot) in last.slots.items()], blocks, metadata)
    return taken


def _mean(name: str, parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    complex_ = parts[0].is_complex()
    real = [torch.view_as_real(part) if complex_ else part for part in parts]
    total = torch.zeros(real[0].shape, dtype=torch.float64)
    for part, weight in zip(real, weights, strict=True):
        if weight:  # 0 times an infinity would be NaN
            # Not add_(alpha=...): that fuses on some processors only, and the bits would depend on the machine.
            total.add_(part.to(torch.float64, copy=True).mul_(weight))
    if total.isnan().any():
        raise CorruptCheckpoint(f"tensor {name!r} has infinities of both signs, which have no average")
    mean = rounded(total, real[0].dtype)
    return torch.view_as_complex(mean) if complex_ else mean


def _check(sources: Sequence[Weights], weights: Sequence[float]) -> None:
    if not sources or len(sources) != len(weights):
        raise UsageError(f"{len(sources)} checkpoints and {len(weights)} weights can't be averaged")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or abs(math.fsum(weights) - 1) > 1e-9:
        raise UsageError(f"weights of an average must not be negative and sum to 1, not {list(weights)!r}")
    kinds = [{name: (slot.dtype, slot.shape) for name, (_, slot) in source.slots.items()} for source in sources]
    names = dict.fromkeys(name for kind in kinds for name in kind)
    wrong = [name for name in names if len({kind.get(name) for kind in kinds}) > 1]
    if wrong:
        raise Incompatible(
            f"{len(wrong)} tensors are not in all checkpoints with the same shape and dtype: "
            + ", ".join(wrong[:8])
            + (", ..." if len(wrong) > 8 else ""),
            hint="only checkpoints of the same run, or of the same model, can be averaged",
        )
