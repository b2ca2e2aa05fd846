"""One iteration of a loader, followed from its beginning; and how the next one gets to the same place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lastgood.errors import Incompatible
from lastgood.state import rng
from lastgood.state.data import FETCHES_AHEAD
from lastgood.state.draws import Draws
from lastgood.state.own import Own, State
from lastgood.state.rng import Rng
from lastgood.state.way import How


@dataclass(frozen=True, slots=True)
class Moment:
    """The generators of the process, and what the loader has of its own."""

    rng: Rng
    own: State


@dataclass(frozen=True, slots=True)
class Past:
    """An iteration, as much of it as a replay needs.

    known: see `Draws`; ended: the loader had no more batches.
    """

    start: Moment
    consumed: int
    known: dict[int, Rng]
    ended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Where the next iteration goes on: after `here`.

    ahead: batches that were fetched and not handed out yet -> the moment before each fetch; then: the one that
    everything after is drawn under; load: puts the state of the loader or its dataset back.
    """

    here: Past
    how: How | None = None  # None: the loader's own way
    ahead: dict[int, Moment] = field(default_factory=dict)
    own: State = field(default_factory=dict)
    then: Callable[[], Rng | None] = lambda: None
    load: Callable[[], None] | None = None
    lost: frozenset[str] = frozenset()


@dataclass(slots=True)
class Clock:
    """Seconds that the loop waited for so many of something."""

    seconds: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float | None:
        return self.seconds / self.count if self.count else None

    def measured(self, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - begin
        self.count += 1
        return result


@dataclass(slots=True)
class Clocks:
    fetch: Clock = field(default_factory=Clock)
    index: Clock = field(default_factory=Clock)


class Walk:
    """The bookkeeping of one iteration.

    consumed: batches handed to the loop; peeks: the loader fetches batches before the loop asks for them; at_once: its
    sampler draws an epoch's order as a whole; reused: by worker processes that were there before.
    """

    def __init__(self, own: Own, clocks: Clocks, how: How, *, peeks: bool) -> None:
        self.own, self.clocks, self.how, self.peeks = own, clocks, how, peeks
        self.at_once = self.reused = self.idle = self.resumed = self.exhausted = False
        self.consumed = self.fetched = self.skip = 0
        self.start: Moment | None = None  # None until its first fetch is prepared
        self.draws: Draws | None = None
        self.ahead: dict[int, Moment] = {}
        self.goal: Goal | None = None

    def begin(
        self, make: Callable[[], Iterator[Any]], goal: Goal | None, past: tuple[Past, ...] = (), warm: bool = False
    ) -> Fetches:
        """Have the iterator made, and bring it to `goal`.

        past: iterations that its worker processes are to see first; warm: they are to be there before it begins.
        """
        if past or warm:
            self._prepare(make, past)
        if goal is None:
            self.start = Moment(rng.capture(), self.own.capture())
            self.draws = Draws(self.start.rng)
            return Fetches(self, make())
        self.resumed, entry = True, rng.capture()
        self.how = goal.how or self.how
        iterator = self._repeat(goal.here, make, goal)
        self.start = goal.here.start
        self.goal = replace(goal, ahead=dict(goal.ahead), then=lambda: goal.then() or entry)
        if not goal.ahead:  # else these come first
            self.arrive()
        return Fetches(self, iterator)

    def _prepare(self, make: Callable[[], Iterator[Any]], past: tuple[Past, ...]) -> None:
        now = Moment(rng.capture(), self.own.capture(whole=True))
        for one in past:
            self._repeat(one, make)
        if not past:
            # An iteration draws the seed of the workers when it starts them, and at no other time.
            self.idle = True
            make()
            self.idle = False
        self.consumed = self.fetched = self.skip = 0
        self.own.restore(now.own)
        rng.restore(now.rng)

    def _repeat(self, past: Past, make: Callable[[], Iterator[Any]], goal: Goal | None = None) -> Iterator[Any]:
        """The iterator after the same batches as in that iteration."""
        self.own.restore(past.start.own)
        rng.restore(past.start.rng)
        self.draws = Draws(past.start.rng, past.known, frozenset() if goal is None else goal.lost)
        if goal is not None and goal.load is not None:
            goal.load()
        self.skip = past.consumed if self.how == "indices" else 0
        iterator = make()
        if self.how == "indices":
            # With worker processes it was done when the iterator was made: that sends the first indices out.
            indices = getattr(iterator, "_sampler_iter", None)
            if isinstance(indices, Indices) and not indices.drop():
                raise _too_short(past.consumed)
        elif self.how == "replay":
            for ordinal in range(1, past.consumed + 1):
                self.draws.replay(ordinal)
                if next(iterator, iterator) is iterator:
                    raise _too_short(past.consumed)
            if past.ended:
                next(iterator, None)
        self.draws.replayed()
        self.consumed = self.fetched = past.consumed
        return iterator

    def arrive(self) -> None:
        """What comes from here on wasn't fetched before the save."""
        if self.goal is not None:
            goal, self.goal = self.goal, None
            # Those that were loaded with a state of their own have it already.
            self.own.restore(goal.own, but_stateful=self.how in ("state", "dataset"))
            then = goal.then()
            if then is not None:
                rng.restore(then)

    def fetch(self, iterator: Iterator[Any]) -> Any:
        """The next batch, under the states that it is to be fetched under."""
        ordinal = self.fetched + 1
        draws, watched = self.draws, self.how == "replay"
        if self.goal is not None:
            moment = self.goal.ahead.pop(ordinal, None)
            if moment is None:
                self.arrive()
            else:
                self.own.restore(moment.own)
                rng.restore(moment.rng)
        if self.peeks:
            self.ahead[ordinal] = Moment(rng.capture(), self.own.capture())
            self.ahead.pop(ordinal - FETCHES_AHEAD, None)
        if watched and draws is not None:
            draws.before()
        try:
            batch = self.clocks.fetch.measured(lambda: next(iterator))
        except StopIteration:
            self.exhausted = True
            raise
        if watched and draws is not None:
            draws.after(ordinal)
        self.fetched = ordinal
        return batch

    def finish(self, iterator: Any) -> None:
        """A resumed iteration ended without a batch: let the dataset's own iterator see its end too.

        torchdata's loader doesn't ask it, and a dataset that goes on in a generator would go on from there once more.
        """
        fetcher: Any = getattr(iterator, "_dataset_fetcher", None)
        if self.how == "state" and hasattr(fetcher, "dataset_iter"):
            now = rng.capture()
            next(fetcher.dataset_iter, None)
            rng.restore(now)

    def past(self) -> Past:
        """This iteration as far as it went; it ended if the loop has had all there is, whether it knows or not."""
        assert self.start is not None
        assert self.draws is not None
        ended = self.exhausted and self.consumed == self.fetched
        return Past(self.start, self.consumed, dict(self.draws.known), ended)


class Fetches:
    """An iterator whose every fetch goes through its walk; anything else is the iterator's."""

    def __init__(self, walk: Walk, iterator: Iterator[Any]) -> None:
        self._walk = walk
        self._iterator = iterator

    def __iter__(self) -> Fetches:
        return self

    def __next__(self) -> Any:
        return self._walk.fetch(self._iterator)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_iterator":
            raise AttributeError(name)
        return getattr(self._iterator, name)


class Order:
    """A sampler of which the walk under way may leave out the first indices; anything else is the sampler's."""

    def __init__(self, sampler: Any, walk: Callable[[], Walk | None]) -> None:
        self._sampler = sampler
        self._walk = walk  # not the walk itself: workers that persist keep this for all epochs

    def __iter__(self) -> Iterator[Any]:
        walk = self._walk()
        if walk is not None and walk.idle:
            return iter(())
        return iter(self._sampler) if walk is None else Indices(iter(self._sampler), walk)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)


class Indices:
    """The indices of one iteration, batch by batch."""

    def __init__(self, indices: Iterator[Any], walk: Walk) -> None:
        self._indices = indices
        self._walk = walk
        self._ordinal = 0

    def __iter__(self) -> Indices:
        return self

    def __next__(self) -> Any:
        self.drop()
        return self._draw()

    def drop(self) -> bool:
        """Draw the ones that are to be left out, if it wasn't done yet; False if there aren't as many."""
        skip, self._walk.skip = self._walk.skip, 0
        try:
            for _ in range(skip):
                self._draw()
        except StopIteration:
            return False
        return True

    def _draw(self) -> Any:
        self._ordinal += 1
        draws = self._walk.draws
        if draws is None:
            return next(self._indices)
        # Drawn before the save, and now once more.
        draws.replay(self._ordinal)
        if self._walk.at_once and self._ordinal > 1:
            return self._walk.clocks.index.measured(lambda: next(self._indices))
        draws.before()
        index = next(self._indices)
        draws.after(self._ordinal)
        return index


def _too_short(consumed: int) -> Incompatible:
    return Incompatible(
        f"the loader ends before batch {consumed}, the last one that had been used when it was saved",
        hint="resume with the data that the run was started with",
    )
