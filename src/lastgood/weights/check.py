"""Whether a merged model is the base plus the adapter: computed from the adapter's files, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lastgood.errors import Incompatible
from lastgood.state.tensors import same_bits
from lastgood.weights.adapter import Adapter
from lastgood.weights.source import STEP, Weights

_SINGLE = torch.finfo(torch.float32).eps


def check(base: torch.nn.Module, merged: torch.nn.Module, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
    """Compare every tensor of the live models; floating ones have to be in `dtype`, or in that of the base.

    Raises Incompatible, naming the tensors that are something else than base + scaling * B @ A (within the rounding
    of their dtype), the adapter's copy, or the base's bits.
    """
    wrong = differences(base, merged, adapter, dtype)
    if wrong:
        raise Incompatible(
            f"{len(wrong)} tensors of the merged model aren't what base and adapter give: "
            + "; ".join(wrong[:8])
            + ("; ..." if len(wrong) > 8 else ""),
            hint="the merge was given up; the adapter and its base are untouched, and still work together with peft",
        )


def differences(
    base: torch.nn.Module, merged: torch.nn.Module, adapter: Adapter, dtype: torch.dtype | None = None
) -> list[str]:
    """One line for each tensor that isn't as expected."""
    old, new = dict(base.state_dict()), dict(merged.state_dict())
    lines = [f"{name}: the base has no such tensor" for name in sorted(adapter.touched() - old.keys())]
    lines += [f"{name}: only in one of them" for name in sorted(old.keys() ^ new.keys())]
    transposed = transposed_weights(base)
    copies = dict(adapter.copies)
    for name, copy in adapter.copies.items():
        if name not in adapter.apart:
            # It was loaded into the place of the original, for whatever is tied to that as well.
            copies |= {twin: copy for twin in _tied(old, name) if twin not in adapter.copies}
    for name, tensor in old.items():
        if name in new:
            target = dtype if dtype and tensor.is_floating_point() else tensor.dtype
            start = copies[name].to(tensor.dtype) if name in copies else tensor
            factors = adapter.factors.get(name)
            fault = _fault(start, new[name], target, factors.rows(name in transposed) if factors else None)
            lines += [f"{name}: {fault}"] if fault else []
    return lines


def transposed_weights(model: torch.nn.Module) -> set[str]:
    """Weights kept as [in, out]. The class says so; `fan_in_fan_out` in a configuration is often wrong."""
    return {f"{path}.weight" for path, module in model.named_modules() if type(module).__name__ == "Conv1D"}


def check_files(base: Weights, merged: Weights, changed: set[str], dtype: torch.dtype | None) -> int:
    """Compare what two directories hold under the same name, but for `changed`; returns how many tensors that were.

    It finds what loading may do to both live models alike, such as rounding to one dtype.
    Raises Incompatible, naming the tensors.
    """
    names = [name for name in base.names() if name in merged.slots and name not in changed]
    wrong = []
    for name in names:
        target = dtype if dtype and base.is_float(name) else base.dtype(name)
        alike = merged.dtype(name) == target and merged.slot(name).shape == base.slot(name).shape
        if not alike or not all(
            same_bits(left.to(target), right) for left, right in zip(base.steps(name), merged.steps(name), strict=True)
        ):
            wrong.append(f"{name} ({base.slot(name).dtype} -> {merged.slot(name).dtype})")
    if wrong:
        raise Incompatible(
            f"{len(wrong)} tensors that the adapter doesn't touch are not those of the base: " + ", ".join(wrong[:8]),
            hint="if the base has several dtypes, say which one the merged model should have",
        )
    return len(names)


def _fault(
    start: torch.Tensor, new: torch.Tensor, target: torch.dtype, factors: tuple[torch.Tensor, torch.Tensor] | None
) -> str | None:
    """What is wrong with `new`, which has to be start + left @ right in `target`."""
    if new.dtype != target or new.shape != start.shape:
        return f"{new.dtype}{list(new.shape)}, expected {target}{list(start.shape)}"
    if factors is None:
        return None if same_bits(start.to(target), new) else "changed, although the adapter doesn't say so"
    left, right = factors
    old, now = start.reshape(start.shape[0], -1), new.reshape(start.shape[0], -1)
    if old.shape != (left.shape[0], right.shape[1]):
        return f"{list(start.shape)} doesn't fit the adapter's {left.shape[0]} x {right.shape[1]}"
    worst = 0.0
    step = max(1, STEP // max(1, right.shape[1]))
    for at in range(0, left.shape[0], step):
        rows = slice(at, at + step)
        expected = old[rows].double() + left[rows] @ right
        # What float32 may lose in the product and the sum, then one rounding to the stored dtype.
        product = (left[rows].abs() @ right.abs()) * (right.shape[0] + 4) * _SINGLE
        info = torch.finfo(target)
        allowed = product + expected.abs() * (0.5 * info.eps + 2 * _SINGLE) + info.tiny * info.eps
        excess = (now[rows].double() - expected).abs() / allowed
        # A NaN compares as false, so it has to be asked for.
        if not bool((excess <= 1).all()):
            worst = max(worst, float(excess.nan_to_num(nan=torch.inf).max()))
    return f"off by {worst:.3g} times the rounding error" if worst else None


def _tied(state: Mapping[str, torch.Tensor], name: str) -> list[str]:
    if name not in state:
        return []
    place = state[name].data_ptr()
    return [other for other, tensor in state.items() if other != name and place and tensor.data_ptr() == place]
