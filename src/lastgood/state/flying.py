"""The window of a save from an accelerator (`lastgood.repo.draft.Window`): what lies there flies, the rest doesn't.

Two kinds of tensors fly. Those that only an optimizer's step changes, as far as is known, fly during the next forward
and backward pass: the stream of training waits for them at that step. All others are copied first, and the stream waits
for them at once: that is on the accelerator, the host goes on. What was taken for the first kind and changed all the
same is found out before anything is committed: the accelerator adds up the bytes as it comes to the save, and the copy
has to have that sum. See docs/decisions/024.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from lastgood.behind import Behind
from lastgood.format import tensors as safetensors
from lastgood.format.tensors import Tensor
from lastgood.repo.draft import Changed, Eager, Source, Window
from lastgood.state.device import Flight, Mark, Pair, flat, flies, pinned
from lastgood.state.match import some
from lastgood.state.tensors import Named, code_of
from lastgood.store.memory import Arena

SMALL = 1 << 17
"""Bytes (128 KiB) below which a tensor is copied first: to hold the accelerator for it costs less than to guard it."""

Spot = tuple[str, int, int]
"""Device, address there and number of bytes."""


def spot(tensor: torch.Tensor) -> Spot | None:
    """Where a tensor lies that can be guarded; None for one that is copied first in any case."""
    count = tensor.numel() * tensor.element_size()
    if count < SMALL or tensor.device.type in ("cpu", "meta") or tensor.data_ptr() % 8 or not flies(tensor):
        return None
    return str(tensor.device), tensor.data_ptr(), count


@dataclass(slots=True, eq=False)
class Landing:
    """The tensors of one file. marks: by name, of those that fly."""

    entries: tuple[Tensor, ...]
    host: Source
    marks: dict[str, Mark] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor, ...]:
        there = {entry.name: entry for entry in self.host.tensors()}
        return tuple(there.get(entry.name, entry) for entry in self.entries)

    def ready(self, name: str) -> None:
        """Wait until the tensor of that name is there. Raises SaveFailed if it won't be."""
        if name in self.marks:
            self.marks[name].check()
        else:
            self.host.ready(name)


@dataclass(slots=True, eq=False)
class _Guarded:
    name: str
    pair: Pair
    sum: torch.Tensor
    landing: Landing


@dataclass(slots=True, eq=False)
class Flying:
    """inner: the window of what doesn't fly. steady: where the tensors lie that only an optimizer's step changes, and
    `finish` is called before that without fail.
    """

    inner: Window
    steady: Collection[Spot] = ()
    _flight: Flight = field(default_factory=Flight)
    _guarded: list[_Guarded] = field(default_factory=list)
    _arena: Arena | None = None
    _sums: Pair | None = None
    _sums_there: Mark | None = None

    @property
    def waited(self) -> float:
        return self.inner.waited

    def stage(self, tensors: Iterable[Tensor], arena: Arena) -> Source:
        if not isinstance(tensors, Named):
            return self.inner.stage(tensors, arena)
        if self._arena is None:
            self._arena = arena
            arena.landing(self._flight.land)
        flying = {name: tensor for name, tensor in tensors.tensors.items() if flies(tensor)}
        entries = {name: _room(name, tensor, arena) for name, tensor in flying.items()}
        rest = self.inner.stage(Named({n: t for n, t in tensors.tensors.items() if n not in flying}), arena)
        entries |= {entry.name: entry for entry in rest.entries}
        landing = Landing(tuple(entries[name] for name in tensors.tensors), rest)
        safetensors.check(landing.entries)
        order = [entry.name for entry in safetensors.ordered(entries[name] for name in flying)]
        late = [name for name in order if self.steady and spot(flying[name]) in self.steady]
        self._guarded += [
            _Guarded(name, (flying[name].detach(), entries[name].data), _sum(flying[name]), landing) for name in late
        ]
        first = [name for name in order if name not in late]
        marks = self._flight.launch([(flying[name], entries[name].data) for name in first])
        landing.marks.update(zip(first, marks, strict=True))
        return landing

    def begin(self) -> None:
        self.inner.begin()
        if self._guarded and self._arena is not None:
            sums = _together(one.sum for one in self._guarded)
            self._sums = sums, self._arena.take(8 * len(self._guarded))
            (self._sums_there,) = self._flight.launch([self._sums])
        self._flight.fence()
        marks = self._flight.launch([one.pair for one in self._guarded])
        for one, mark in zip(self._guarded, marks, strict=True):
            one.landing.marks[one.name] = mark
            one.pair, one.sum = (_NOTHING, one.pair[1]), _NOTHING  # the flight keeps it, for as long as it takes
        self._flight.depart()

    def finish(self) -> None:
        self._flight.fence()
        self.inner.finish()

    def fill(self) -> None:
        self.inner.fill()

    def prove(self) -> None:
        self.inner.prove()
        if self._sums is None or self._sums_there is None:
            return
        self._sums_there.check()
        wanted = np.frombuffer(self._sums[1], np.int64)
        names = [one.name for one, sum in zip(self._guarded, wanted, strict=True) if _host_sum(one.pair[1]) != sum]
        if names:
            raise Changed(
                f"outside of any optimizer's step, while it was being copied, something changed {some(names)}"
            )
        self._guarded, self._sums = [], None  # proven once is proven; the memory may be given back


_NOTHING = torch.empty(0)


def _room(name: str, tensor: torch.Tensor, arena: Arena) -> Tensor:
    code = code_of(name, tensor)
    return Tensor(name, code, tuple(tensor.shape), arena.take(tensor.numel() * tensor.element_size()))


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Of its bytes, eight at a time, modulo 2^64; the last up to seven one by one. On its device, in its turn."""
    data = flat(tensor)
    whole = data.numel() // 8 * 8
    return data[:whole].view(torch.int64).sum() + data[whole:].sum(dtype=torch.int64)


def _together(sums: Iterable[torch.Tensor]) -> torch.Tensor:
    """On the first one's device."""
    found = list(sums)
    return torch.stack([one.to(found[0].device, non_blocking=True) for one in found])


def _host_sum(data: memoryview) -> int:
    """The same of the copy."""
    whole = len(data) // 8 * 8
    with np.errstate(over="ignore"):
        words = np.frombuffer(data[:whole], np.int64).sum(dtype=np.int64)
        return int(words + np.frombuffer(data[whole:], np.uint8).sum(dtype=np.int64))


def _replayed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it may step as part of a CUDA graph, whose replay calls no hook: torch captures none that isn't so."""
    return any(group.get("capturable") for group in optimizer.param_groups)


def _touched(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The tensors that its step changes, as far as they are where torch's own optimizers keep them."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for entry in optimizer.state.values():
        if isinstance(entry, Mapping):
            yield from (value for value in entry.values() if isinstance(value, torch.Tensor))


def at_once() -> Window:
    """For a save that nothing is known about: training's stream waits for all that flies."""
    return Flying(Eager())


def boarding(run: Behind, *, accelerated: bool) -> None:
    """To be called before the run is opened. accelerated: whether what is trained lies on an accelerator."""
    if accelerated and run.background is not None:
        run.stages = run.at_once = at_once
        run.pin = pinned


def aboard(inner: Window, optimizers: Iterable[torch.optim.Optimizer]) -> Window:
    """The same with what lies on an accelerator. optimizers: whose steps call `finish` first."""
    known = [optimizer for optimizer in optimizers if not _replayed(optimizer)]
    steady = {spot(tensor) for optimizer in known for tensor in _touched(optimizer)}
    return Flying(inner, frozenset(found for found in steady if found is not None))
