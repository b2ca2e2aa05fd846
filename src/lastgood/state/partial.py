"""A model that isn't quite the saved one: what is common to both, by name, with every difference allowed for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lastgood.errors import Incompatible, IncompleteRestore
from lastgood.state.conversions import converted
from lastgood.state.fingerprint import live_tensors
from lastgood.state.match import Match, some
from lastgood.state.tensors import by_digest, holds, same_bits, signature
from lastgood.state.weights import put


@dataclass(frozen=True, slots=True)
class Partial:
    """What goes into which live tensor; nothing was changed yet. detail: a line for the report."""

    live: Mapping[str, torch.Tensor]
    sources: Mapping[str, torch.Tensor]
    detail: str

    def apply(self) -> None:
        """Raises IncompleteRestore if a tensor doesn't hold what was saved even now."""
        for name, tensor in self.sources.items():
            put(self.live[name], tensor)
        wrong = [name for name, tensor in self.sources.items() if not same_bits(self.live[name], tensor)]
        if wrong:
            raise IncompleteRestore(f"after the restore these tensors don't hold what was saved: {some(wrong)}")


def by_name(
    model: torch.nn.Module,
    expected: Mapping[str, str],
    saved: Mapping[str, torch.Tensor],
    match: Match,
    what: str,
) -> Partial:
    """Find what goes into the tensors of `model`.

    expected: digests of what the saved model held, by its names; saved: the tensors of its files, by theirs.
    Raises Incompatible for differences that `match` doesn't allow, IncompleteRestore for a tensor that isn't stored.
    """
    live = live_tensors(model)
    pairs = match.pair(expected, live, what)
    stored = by_digest(saved.values(), expected.values())
    late: dict[str, torch.Tensor] | None = None
    sources: dict[str, torch.Tensor] = {}
    absent, other, cast = [], [], 0
    for here, name in pairs.items():
        tensor = stored.get(expected[name])
        if tensor is None and holds(live[here], expected[name]):
            continue  # the frozen base under an adapter, which comes with the model
        if tensor is None:
            late = converted(model, saved) if late is None else late
            tensor = late.get(here)
        if tensor is None:
            absent.append(name)
        elif tensor.shape != live[here].shape or (tensor.dtype != live[here].dtype and not match.cast):
            other.append(f"{here} ({signature(tensor)} saved, {signature(live[here])} here)")
        else:
            cast += tensor.dtype != live[here].dtype
            sources[here] = tensor.to(live[here].dtype)
    if other:
        raise Incompatible(
            f"{what} has tensors of another shape or dtype than the checkpoint's: {some(other)}",
            hint="cast=True converts dtypes; a tensor of another shape has to start afresh (new=[...] with gone=[...])",
        )
    if absent:
        raise IncompleteRestore(
            f"{len(absent)} tensors of {what} aren't stored in the checkpoint: {some(absent)}",
            hint="frozen weights aren't stored with an adapter: start from the same base model, or name them in new="
            " and gone=",
        )
    new, gone = len(live) - len(pairs), len(expected) - len(pairs)
    told = [f"{len(pairs)} tensors by name"]
    told += [f"{count} {word}" for count, word in ((cast, "cast"), (new, "new"), (gone, "not used")) if count]
    return Partial(live, sources, ", ".join(told))
