"""The moment before an optimizer changes anything, of every optimizer of the process: there the copying ends.

torch calls a global hook at the beginning of `step` of every class that derives from its Optimizer, whoever wraps it.
Which of them it really reaches isn't taken on trust: an optimizer whose step passed by here since the last save is one
that it reaches. With a closure, a step of torch's own changes nothing before that was called: there it ends behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lastgood.behind import Behind
from lastgood.repo.draft import Eager, Window
from lastgood.state.closures import Arguments, behind, waits
from lastgood.state.device import captured
from lastgood.state.flying import aboard
from lastgood.state.lazy import Lazy, Pace, Place
from lastgood.state.optimizer import plain
from lastgood.state.views import Views


@dataclass(slots=True)
class Steps:
    """Makes the windows of a run's saves, and ends them.

    run: it asks for a window before each save; optimizers: those of the run, as they are then.
    """

    run: Behind
    optimizers: Callable[[], Iterable[Any]]
    pace: Pace = field(default_factory=Pace)
    _window: Window = field(default_factory=Eager)
    _seen: set[int] = field(default_factory=set)  # by id: somebody's own optimizer may have no hash
    _graphs: set[int] = field(default_factory=set)  # those whose steps are replayed without a hook
    _hook: int = -1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Be called before every step inside, if anything is to be copied later at all."""
        self.run.ordered = Views().ordered
        if self.run.background is None or not self.run.background.lazy:
            if self.run.pin is None:
                self.run.stages = lambda: Lazy((), (), self.pace)
            yield
            return

        def before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            # In a step that torch.compile makes a graph of, this is looked at once and never called: such an optimizer
            # is none that was seen.
            return None if torch.compiler.is_compiling() else self.begins(optimizer, args, kwargs)

        self.run.stages = self.window
        handle = register_optimizer_step_pre_hook(before)
        self._hook = handle.id
        try:
            yield
        finally:
            handle.remove()
            self._window.finish()

    def begins(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """An optimizer is about to change what it trains, now or behind its closure; with what it is to be called."""
        self._seen.add(id(optimizer))
        replayed = self.run.pin is not None and captured()
        if replayed:
            self._graphs.add(id(optimizer))
        later = behind(args, kwargs, self._ends) if not replayed and waits(optimizer, self._hook) else None
        if later is None:
            self._ends()
        return later

    def _ends(self) -> None:
        """The window that is open now: a closure may have made a save of its own."""
        self._window.finish()

    def window(self) -> Window:
        """For the next save: one that copies later if every optimizer is known to come by here before it changes
        anything."""
        found = [plain(optimizer) for optimizer in self.optimizers()]
        safe = bool(found) and all(id(optimizer) in self._seen and not _swaps(optimizer) for optimizer in found)
        self._seen.clear()
        places = cache(partial(_places, found, self.pace.small))  # of many small ones nobody asks
        weights, state, own = Asked(lambda: places()[0]), Asked(lambda: places()[1]), Asked(cache(partial(_own, found)))
        window: Window = Lazy(weights, state, self.pace, own=own) if safe else Lazy((), (), self.pace)
        known = [optimizer for optimizer in found if safe and id(optimizer) not in self._graphs]
        self._window = window if self.run.pin is None else aboard(window, known)
        return self._window


@dataclass(frozen=True, slots=True)
class Asked(Container[Any]):
    """A set that is made when the first one is asked about."""

    found: Callable[[], Container[Any]]

    def __contains__(self, one: object) -> bool:
        return one in self.found()


def _swaps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has other weights to train with than to evaluate, as schedule-free ones have, and changes them between
    two steps."""
    return any(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _places(optimizers: Iterable[torch.optim.Optimizer], small: int) -> tuple[set[Place], set[Place]]:
    """(of the weights that they train, of their state). What both claim counts as a weight."""
    weights, state = zip(*map(_tensors, optimizers), strict=True)
    return _large(chain.from_iterable(weights), small), _large(chain.from_iterable(state), small)


def _own(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    """By `id`."""
    return set(map(id, chain.from_iterable(chain.from_iterable(map(_tensors, optimizers)))))


def _large(tensors: Iterable[torch.Tensor], small: int) -> set[Place]:
    return {(one.data_ptr(), one.nbytes) for one in tensors if one.layout is torch.strided and one.nbytes >= small}


def _tensors(optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(what it trains, what it keeps of that)."""
    state: list[torch.Tensor] = []
    for entry in optimizer.state.values():
        if isinstance(entry, torch.Tensor):
            state.append(entry)
        elif isinstance(entry, (Mapping, list, tuple)):
            for value in entry.values() if isinstance(entry, Mapping) else entry:
                if isinstance(value, torch.Tensor):  # a generator for each takes longer than the rest
                    state.append(value)
                elif isinstance(value, (Mapping, list, tuple)):
                    state += _inside(value)
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups)), state


def _inside(entry: object) -> Iterator[torch.Tensor]:
    if isinstance(entry, torch.Tensor):
        yield entry
    elif isinstance(entry, (Mapping, list, tuple)):
        for value in entry.values() if isinstance(entry, Mapping) else entry:
            yield from _inside(value)
