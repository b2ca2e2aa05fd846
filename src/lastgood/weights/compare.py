"""What differs between two checkpoints: which tensors, how many elements, how much."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lastgood.weights.encode import bits
from lastgood.weights.source import Progress, Weights

STATES = ("same", "changed", "added", "removed", "reshaped")


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor. state is one of STATES ("reshaped": another shape or dtype).

    relative: ||b - a|| / ||a||; inf where ||a|| is 0 or a changed element isn't finite; nan where there is no
    number to give (added, removed, reshaped). `squares` holds ||b - a||^2 and ||a||^2, which groups are summed from.
    """

    name: str
    state: str
    elements: int
    changed_elements: int = 0
    relative: float = math.nan
    squares: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tensors in the order of `a`, then those that only `b` has."""

    tensors: tuple[Change, ...]

    @property
    def same(self) -> bool:
        return all(change.state == "same" for change in self.tensors)


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one part of a layer; relative is over those that both sides have in the same shape and dtype."""

    name: str
    counts: dict[str, int]
    elements: int
    changed_elements: int
    relative: float


def compare(a: Weights, b: Weights, progress: Progress | None = None) -> Comparison:
    """Every tensor of `a` and `b`, element by element; -0.0 differs from 0.0, a NaN equals the same NaN.

    Raises CorruptCheckpoint for files that can't be read, NotSupported for dtypes that torch doesn't know.
    """
    both = [name for name in a.slots if name in b.slots and _kind(a, name) == _kind(b, name)]
    done, total = 0, a.size(both)
    changes: dict[str, Change] = {}
    for name in a.slots:
        if name not in b.slots or _kind(a, name) != _kind(b, name):
            changes[name] = Change(name, "reshaped" if name in b.slots else "removed", a.elements(name))
            continue
        changes[name] = _changed(a, b, name)
        done += a.size([name])
        if progress:
            progress(done, total)
    for name in b.slots.keys() - a.slots.keys():
        changes[name] = Change(name, "added", b.elements(name))
    # What is the same has been looked at as bits only. Its norm is needed just where its group has changed.
    touched = {group_of(change.name) for change in changes.values() if change.state == "changed"}
    for name, change in changes.items():
        if change.state == "same" and group_of(name) in touched:
            norm = math.fsum(_square(_finite(_numbers(block))) for block in a.steps(name))
            changes[name] = Change(name, "same", change.elements, 0, 0.0, (0.0, norm))
    order = [*a.slots, *(name for name in b.slots if name not in a.slots)]
    return Comparison(tuple(changes[name] for name in order))


def groups(comparison: Comparison) -> list[Group]:
    """One group per part of a layer, in the order of the tensors."""
    members: dict[str, list[Change]] = {}
    for change in comparison.tensors:
        members.setdefault(group_of(change.name), []).append(change)
    return [
        Group(
            name=name,
            counts={state: n for state in STATES if (n := sum(change.state == state for change in changes))},
            elements=sum(change.elements for change in changes),
            changed_elements=sum(change.changed_elements for change in changes),
            relative=_relative(*map(_sum, zip(*(change.squares for change in changes), strict=True))),
        )
        for name, changes in members.items()
    ]


def group_of(name: str) -> str:
    """`model.layers.31.self_attn` of `model.layers.31.self_attn.q_proj.weight`; without a number: the module."""
    parts = name.split(".")[:-1]
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 2] if numbers else parts) or name


def _kind(weights: Weights, name: str) -> tuple[str, tuple[int, ...]]:
    slot = weights.slot(name)
    return slot.dtype, slot.shape


def _changed(a: Weights, b: Weights, name: str) -> Change:
    changed, differences, norms = 0, [0.0], [0.0]
    held = 0  # blocks that were the same so far: their norm is only computed once something differs
    for left, right in zip(a.steps(name), b.steps(name), strict=True):
        differs = None if torch.equal(bits(left), bits(right)) else bits(left) != bits(right)
        if differs is None and not changed:
            held += 1
            continue
        old = _numbers(left)
        if differs is not None:
            changed += int(differs.sum())
            spread = differs.repeat_interleave(2) if left.is_complex() else differs
            differences.append(_square((_numbers(right) - old).where(spread, 0.0)))
            old = old.where(spread | old.isfinite(), 0.0)
        else:
            old = _finite(old)
        norms.append(_square(old))
    if not changed:
        return Change(name, "same", a.elements(name), 0, 0.0)
    for _, left in zip(range(held), a.steps(name), strict=False):
        norms.append(_square(_finite(_numbers(left))))
    squares = (_sum(differences), _sum(norms))
    return Change(name, "changed", a.elements(name), changed, _relative(*squares), squares)


def _numbers(block: torch.Tensor) -> torch.Tensor:
    """As float64; complex numbers as pairs."""
    return (torch.view_as_real(block).reshape(-1) if block.is_complex() else block).double()


def _finite(values: torch.Tensor) -> torch.Tensor:
    # An infinity that is the same on both sides (a mask) says nothing about how much has changed.
    return values.where(values.isfinite(), 0.0)


def _square(values: torch.Tensor) -> float:
    return float(values.dot(values))


def _sum(values: Iterable[float]) -> float:
    # math.fsum refuses inf - inf and overflows with an exception.
    total = sum(values)
    return total if math.isfinite(total) else math.inf


def _relative(difference: float, norm: float) -> float:
    if difference == 0:
        return 0.0
    if norm == 0 or not (math.isfinite(difference) and math.isfinite(norm)):
        return math.inf
    return math.sqrt(difference) / math.sqrt(norm)
