"""Lightning's training and validation loaders, followed batch by batch, so that a resume begins where a save was made.

Lightning itself restores the number of the batch and then reads the epoch from its beginning. Here the
state of the generators is kept from when an iteration was made, from its first fetch (which draws the
order) and from each fetch that ran ahead of training; see state/data.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lastgood.state import rng, tree
from lastgood.state.data import can_skip_unread, draws_nothing, own_generators
from lastgood.state.rng import Rng

AHEAD = 4
"""Fetches whose random state is remembered; Lightning is one ahead where it doesn't know the length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One loader: `consumed` batches of its iteration were trained on, number `next` is fetched next (from 1).

    start, first: generators when the iteration was made, and at its first fetch. fetches: ordinal -> generators
    before a batch that was fetched and not used. own, own_start: the loader's own generators, now and at `start`.
    state: that of a loader which keeps one itself.
    """

    consumed: int
    next: int
    start: Rng | None
    first: Rng | None
    fetches: dict[int, Rng]
    own: list[torch.Tensor]
    own_start: list[torch.Tensor]
    state: Any = None

    def encode(self, tensors: dict[str, torch.Tensor], where: str) -> dict[str, Any]:
        return {
            "consumed": self.consumed,
            "next": self.next,
            "start": None if self.start is None else rng.encode(self.start),
            "first": None if self.first is None else rng.encode(self.first),
            "fetches": {str(number): rng.encode(state) for number, state in self.fetches.items()},
            "own": [rng.to_text(state) for state in self.own],
            "own_start": [rng.to_text(state) for state in self.own_start],
            "state": tree.encode(self.state, tensors, where),
        }

    @classmethod
    def decode(cls, value: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Place:
        return cls(
            consumed=int(value["consumed"]),
            next=int(value["next"]),
            start=None if value["start"] is None else rng.decode(value["start"]),
            first=None if value["first"] is None else rng.decode(value["first"]),
            fetches={int(number): rng.decode(state) for number, state in value["fetches"].items()},
            own=[rng.from_text(text) for text in value["own"]],
            own_start=[rng.from_text(text) for text in value["own_start"]],
            state=tree.decode(value["state"], tensors),
        )


@dataclass(slots=True)
class Watching:
    """What the loaders of one fit share. fetching: called before each fetch for training.

    train, evaluation: where the loaders begin, in the order in which Lightning prepares them.
    resuming: until the resumed run has arrived. dormant: it begins with a new epoch: Lightning makes an
    iteration too early, from which nothing is to be read.
    """

    fetching: Callable[[int], None]
    train: list[Place] = field(default_factory=list)
    evaluation: list[Place] = field(default_factory=list)
    resuming: bool = False
    dormant: bool = False

    def watch(self, loader: Any, *, training: bool) -> Watched:
        """`loader`, followed from now on."""
        loader = loader.loader if isinstance(loader, Watched) else loader
        watched = (Keeping if keeps_state(loader) or self.resuming else Watched)(loader, self, training)
        places = self.train if training else self.evaluation
        if places:
            watched.place = places.pop(0)
        return watched


_OWN = frozenset({"loader", "shared", "training", "place", "start", "first", "own_start", "before", "next"})


class Watched:
    """A loader whose fetches are followed; anything else is the loader's."""

    def __init__(self, loader: Any, shared: Watching, training: bool) -> None:
        self.loader, self.shared, self.training = loader, shared, training
        self.place: Place | None = None  # where the next iteration begins
        self.start: Rng | None = None
        self.first: Rng | None = None
        self.own_start: list[torch.Tensor] = []
        self.before: dict[int, Rng] = {}
        self.next = 1

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:  # not set yet while unpickling or copying: don't recurse
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets worker_init_fn, and takes the iterator away when it is done: of the loader, not of this.
        if name in _OWN or name == "__class__":
            object.__setattr__(self, name, value)
        else:
            setattr(self.loader, name, value)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.training and self.shared.dormant:
            return iter(())
        return Iteration(self)

    def position(self, ahead: int, *, undone: bool = False) -> Place:
        """Where training stands, with `ahead` batches fetched that it hasn't used.

        undone: it is in the middle of a batch, which is to be done again, from before the last fetch on.
        """
        following = max(self.before, default=self.next) if undone else self.next
        consumed = max(0, following - 1 - ahead)
        return Place(
            consumed=consumed,
            next=following,
            start=self.start,
            first=self.first,
            fetches={number: state for number, state in self.before.items() if consumed < number < following},
            own=[generator.get_state() for generator in own_generators(self.loader)],
            own_start=list(self.own_start),
            state=self.loader.state_dict() if keeps_state(self.loader) and not ahead and not undone else None,
        )

    def beginning(self) -> Place:
        """The same for a loader that is to be read from its beginning."""
        own = [generator.get_state() for generator in own_generators(self.loader)]
        return Place(
            consumed=0, next=1, start=self.start, first=None, fetches={}, own=own, own_start=self.own_start or own
        )

    def set_own(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(own_generators(self.loader), states, strict=False):
            generator.set_state(state)


class Keeping(Watched):
    """One that Lightning takes for a loader which can be resumed: because it can, or because we do it."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self.loader.state_dict()) if keeps_state(self.loader) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if keeps_state(self.loader):
            self.loader.load_state_dict(state)


def keeps_state(loader: Any) -> bool:
    """Whether the loader can say and set where it stands (torchdata's StatefulDataLoader)."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


class Iteration:
    """One pass over a loader. A resumed one is made when its first batch is asked for."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        place, watched.place = watched.place, None
        self.place, self.inner = place, None
        if place is None:
            watched.start = rng.capture()
            watched.own_start = [generator.get_state() for generator in own_generators(watched.loader)]
            watched.first, watched.before, watched.next = None, {}, 1
            self.inner = iter(watched.loader)
        else:
            watched.start, watched.first, watched.own_start = place.start, place.first, place.own_start
            watched.before, watched.next = {}, place.consumed + 1

    def __iter__(self) -> Iteration:
        return self

    def __next__(self) -> Any:
        watched = self.watched
        if self.inner is None:
            self.inner = self._catch_up()
        number = watched.next
        again = None if self.place is None else self.place.fetches.get(number)
        if again is not None:
            now = rng.capture()
            rng.restore(again)
        elif watched.training:
            watched.shared.fetching(number)
        state = rng.capture()
        if number == 1:
            watched.first = state
        watched.before[number] = state
        watched.before.pop(number - AHEAD, None)
        try:
            batch = next(self.inner)
        finally:
            if again is not None:
                rng.restore(now)
        watched.next = number + 1
        return batch

    def _catch_up(self) -> Any:
        """The iterator as it was after `consumed` batches; the generators are left as they are."""
        place, watched = self.place, self.watched
        assert place is not None
        loader, now = watched.loader, rng.capture()
        try:
            if place.start is not None:
                rng.restore(place.start)
            watched.set_own(place.own_start)
            if place.state is not None:
                loader.load_state_dict(place.state)
                return iter(loader)
            return _advanced(loader, place)
        finally:
            rng.restore(now)
            if place.state is None:
                watched.set_own(place.own)


def _advanced(loader: Any, place: Place) -> Any:
    workers = getattr(loader, "num_workers", 0)
    index = getattr(loader, "_index_sampler", None)
    unread = isinstance(loader, torch.utils.data.DataLoader) and can_skip_unread(loader) and index is not None
    if unread and workers and draws_nothing(loader):
        iterator: Any = _skipping(loader, place.consumed)
    else:
        iterator = iter(loader)
        if place.first is not None:
            rng.restore(place.first)
        if unread and not workers:
            for _ in range(place.consumed):
                next(iterator._sampler_iter, None)
        else:
            # A stream has to be read; and what workers draw depends on what each of them loaded before.
            for _ in range(place.consumed):
                next(iterator, None)
    return iterator


def _skipping(loader: Any, count: int) -> Any:
    """iter(loader) with worker processes that never load the first batches."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    original = getattr(loader, name)
    loader.__dict__[name] = _Skip(original, count)
    try:
        return iter(loader)
    finally:
        loader.__dict__[name] = original


class _Skip:
    """A sampler whose first iteration leaves out the first entries."""

    def __init__(self, inner: Any, count: int) -> None:
        self.inner, self.count = inner, count

    def __iter__(self) -> Iterator[Any]:
        count, self.count = self.count, 0
        entries = iter(self.inner)
        for _ in range(count):
            next(entries, None)
        return entries

    def __len__(self) -> int:
        return len(self.inner)
