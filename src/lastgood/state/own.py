"""What a loader, its samplers and its dataset carry from one batch to the next in attributes of their own.

Generators that they hold are part of where a loop stands in its data, and so is what iterating changes in plain
attributes: `self.epoch += 1` in a sampler's `__iter__`, a counter in a dataset.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

State = dict[str, Any]
"""Place ("sampler.generator") -> state of the generator there, or the value of the plain attribute."""

INNER = ("sampler", "batch_sampler", "dataset", "collate_fn")
DEPTH = 4
PLAIN = (bool, int, float, str, type(None))


class Own:
    """The attributes that count, of the loader that is given, which wasn't iterated yet."""

    def __init__(self, loader: Any) -> None:
        found = dict(_places(loader))
        # Not to hold the loader itself: see `Stream`.
        self.loader = _weakly(found.pop("loader", None))
        self._rest = found
        self._first = dict(self._plain())

    @property
    def _places(self) -> State:
        loader = self.loader()
        return self._rest if loader is None else {"loader": loader, **self._rest}

    def capture(self, *, whole: bool = False) -> State:
        """Their states now; of plain attributes those that aren't what they were at first, or all of them."""
        found: State = {}
        seen: set[int] = set()
        for place, thing in self._places.items():
            for name, value in _attributes(thing):
                state = None if id(value) in seen else _state(value)
                if state is not None:
                    seen.add(id(value))
                    found[f"{place}.{name}"] = state
            epoch = _epoch(thing)
            if epoch is not None:
                found[f"{place}.set_epoch()"] = epoch
        for key, value in self._plain():
            if whole or key not in self._first or self._first[key] != value:
                found[key] = value
        return found

    def restore(self, saved: State, *, but_stateful: bool = False) -> None:
        """Set them, as far as this loader has them; but_stateful: leave out those of what has a state_dict()."""
        places = self._places
        for key, value in saved.items():
            place, _, name = key.rpartition(".")
            thing = places.get(place)
            if but_stateful and place != "loader" and hasattr(thing, "state_dict"):
                continue
            if thing is not None and self._fits(thing, name, value):
                thing.set_epoch(value) if name == "set_epoch()" else _set(thing, name, value)

    def rewind(self, saved: State) -> None:
        """Set them to what they were at a capture of this very loader, those that hadn't changed until then too."""
        self.restore({**self._first, **saved})

    def lacking(self, saved: State) -> list[str]:
        """The places that this loader doesn't have, or has something else at."""
        split = [(key, *key.rpartition(".")[::2]) for key in saved]
        places = self._places
        return [key for key, place, name in split if not self._fits(places.get(place), name, saved[key])]

    @staticmethod
    def _fits(thing: Any, name: str, value: Any) -> bool:
        if name == "set_epoch()":
            return _epoch(thing) is not None
        live = getattr(thing, name, None)
        if type(value) in PLAIN:
            return hasattr(thing, name) and type(live) in PLAIN
        if isinstance(value, bytes):  # None: it is made when its first epoch begins
            return isinstance(live, torch.Generator) or (live is None and hasattr(thing, name))
        if isinstance(value, tuple):
            return isinstance(live, random.Random)
        if isinstance(live, np.random.Generator):
            return bool(live.bit_generator.state["bit_generator"] == value.get("bit_generator"))
        return isinstance(live, np.random.RandomState)

    def _plain(self) -> Iterator[tuple[str, Any]]:
        for place, thing in self._places.items():
            # The loader's own are its settings; Accelerate counts epochs in `iteration`.
            for name, value in _attributes(thing):
                counts = (
                    name == "iteration" if place == "loader" else not (name == "epoch" and _epoch(thing) is not None)
                )
                if counts and type(value) in PLAIN:
                    yield f"{place}.{name}", value


def _weakly(thing: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(thing)
    except TypeError:  # None, a list
        return lambda: thing


def _places(loader: Any) -> Iterator[tuple[str, Any]]:
    """The loader, its samplers, dataset and collator, each once, outermost first."""
    level: list[tuple[str, Any]] = [("loader", loader)]
    seen: set[int] = set()
    for _ in range(DEPTH):
        following = []
        for place, thing in level:
            if thing is None or id(thing) in seen:
                continue
            seen.add(id(thing))
            yield place, thing
            prefix = "" if place == "loader" else f"{place}."
            # Asked of the object, not of its attributes: Accelerate's loaders hand on what their inner one has.
            following += [(f"{prefix}{name}", getattr(thing, name, None)) for name in INNER]
        level = following


def _attributes(thing: Any) -> list[tuple[str, Any]]:
    try:
        return [(name, value) for name, value in vars(thing).items() if not name.startswith("_lastgood")]
    except TypeError:  # a list, a function of C: it has none
        return []


def _epoch(thing: Any) -> int | None:
    """The epoch that it was told of, if it can be told."""
    if not callable(getattr(thing, "set_epoch", None)) or isinstance(thing, torch.utils.data.DataLoader):
        return None
    epoch = getattr(thing, "epoch", None)
    return int(epoch) if isinstance(epoch, (int, np.integer)) else None


def _state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().cpu().numpy())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return frozen(value.get_state(legacy=False))
    if isinstance(value, np.random.Generator):
        return frozen(value.bit_generator.state)
    return None


def _set(thing: Any, name: str, value: Any) -> None:
    live = getattr(thing, name)
    if type(value) in PLAIN:
        if live != value or type(live) is not type(value):
            setattr(thing, name, value)
    elif isinstance(value, bytes):
        if live is None:
            live = torch.Generator()
            setattr(thing, name, live)
        live.set_state(torch.frombuffer(bytearray(value), dtype=torch.uint8))
    elif isinstance(live, random.Random):
        live.setstate(value)
    elif isinstance(live, np.random.RandomState):
        live.set_state(value)
    else:
        live.bit_generator.state = value


def frozen(value: Any) -> Any:
    """The same state in containers, tensors and arrays that nobody else changes; what can't change is shared."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list):
        return [frozen(item) for item in value]
    if type(value) is tuple:
        return tuple(frozen(item) for item in value)
    if isinstance(value, (set, bytearray)):
        return value.copy()
    return value
