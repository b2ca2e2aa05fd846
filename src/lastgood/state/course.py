"""The iterations of one loader, one after the other: what its followed class tells of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from lastgood.errors import UsageError
from lastgood.state import rng
from lastgood.state.own import Own
from lastgood.state.position import Mark
from lastgood.state.walk import Clocks, Goal, Order, Past, Walk
from lastgood.state.way import Skip, Way, draws_at_once, way

if TYPE_CHECKING:
    from lastgood.state.stream import Stream


class Course:
    """Where the iterations of a loader are. Doesn't hold the loader: see `Stream`.

    ended: iterations that were gone through to their end; past: those that its worker processes have seen, or are to
    see before the next one; warm: they are to be there before it begins; goal: where the next one is to go on; at_end:
    it is to end at once; twice: two were used at the same time.
    """

    def __init__(self, loader: Any, inner: Any, skip: Skip) -> None:
        self.way: Way = way(loader, inner, skip)
        # What is nothing but its state has everything in it.
        self.own = Own(loader if isinstance(loader, DataLoader) or self.way.how == "replay" else None)
        self.clocks = Clocks()
        self.ended = 0
        self.past: tuple[Past, ...] = ()
        self.goal: tuple[Mark, Goal] | None = None
        self.warm = self.at_end = self.twice = False
        self.stream: Callable[[], Stream | None] = lambda: None
        self._peeks = inner is not loader
        self.persistent = bool(getattr(inner, "persistent_workers", False))
        self._walk: Walk | None = None
        self._iteration: weakref.ref[Iteration] | None = None

    def choose(self, chosen: Way) -> None:
        """Another way. Raises UsageError in the middle of an iteration."""
        if chosen != self.way and self.alive() is not None:
            raise UsageError("skip can't change while the loader is iterated", hint="follow it before the loop begins")
        self.way = chosen

    @property
    def lives_on(self) -> bool:
        """Whether worker processes go on with their generators as the iterations before have left them."""
        return self.persistent and self.way.how == "replay"

    def alive(self) -> Iteration | None:
        """The iteration that the loop is in."""
        iteration = None if self._iteration is None else self._iteration()
        return iteration if self._walk is not None else None

    def under_way(self) -> Walk | None:
        """The walk of that iteration; one that nobody holds any more was left."""
        if self.alive() is None:
            self._leave()
        return self._walk

    def begin(self, make: Callable[[], Iterator[Any]]) -> Iteration:
        """The loop begins an iteration."""
        before = self.alive()
        self._leave()
        if before is not None:
            before.left = True
        if self._peeks and self.goal is not None:
            # Accelerate's loaders tell the sampler their epoch before the inner loader is asked for anything.
            self.own.restore(self.goal[1].here.start.own)
        self._walk = walk = Walk(self.own, self.clocks, self.way.how, peeks=self._peeks)
        iteration = Iteration(self, walk)
        self._iteration = weakref.ref(iteration)
        iteration.number = getattr(self.own.loader(), "iteration", None)
        if not self.at_end:
            iteration.batches = make()
        return iteration

    def fetches(self, loader: Any, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """The fetching of its batches begins: at once, or at the first batch (Accelerate)."""
        walk = self._walk
        if walk is None or walk.start is not None:  # the inner loader of Accelerate's, iterated by itself
            return make()
        loaded, self.goal = self.goal, None
        dataset: Any = getattr(loader, "dataset", None)
        if loaded is None and getattr(dataset, "_starting_state_dict", None) is not None:
            dataset._starting_state_dict = None  # Hugging Face's would begin each epoch where this one was resumed
        walk.at_once = draws_at_once(loader)
        walk.reused = self.persistent and getattr(loader, "_iterator", None) is not None
        past = () if walk.reused else self.past
        warm = self.warm and not (walk.reused or past)
        walk.reused, self.warm = walk.reused or warm or bool(past), False
        return walk.begin(make, None if loaded is None else loaded[1], past, warm)

    def order(self, sampler: Any) -> Any:
        """The sampler that the iterator under construction is to use."""
        return Order(sampler, lambda: self._walk) if self.way.how == "indices" and self._walk is not None else sampler

    def turn(self, workers: int) -> int:
        """How many workers are to be passed over at first."""
        return self._walk.skip % workers if self._walk is not None and workers else 0

    def handed(self, iteration: Iteration) -> None:
        """The iteration has a batch for the loop."""
        if iteration.left:
            self.twice = True
        iteration.walk.consumed += 1
        iteration.count += 1

    def over(self, iteration: Iteration) -> None:
        """It has no more."""
        if iteration.walk is not self._walk:
            return
        walk, loader = iteration.walk, self.own.loader()
        walk.arrive()  # the end, too, may have been fetched ahead
        if self.at_end and self.goal is not None:
            (mark, goal), self.goal, self.at_end = self.goal, None, False
            self.own.restore(mark.own)
            then = goal.then()
            if then is not None:
                rng.restore(then)
            if self._peeks and hasattr(loader, "iteration") and loader.iteration == iteration.number:
                loader.iteration += 1  # Accelerate's would have counted it now
        elif walk.resumed and not iteration.count:
            walk.finish(iteration.batches)
        self.ended += 1
        self._leave()

    def _leave(self) -> None:
        walk, self._walk, self._iteration = self._walk, None, None
        if walk is not None and walk.start is not None and self.lives_on:
            self.past = (*self.past, walk.past())


class Iteration:
    """What `iter(loader)` gives: the loader's own iterator, counted."""

    def __init__(self, course: Course, walk: Walk) -> None:
        self._course = course
        self.walk = walk
        self.left = False  # another one was begun
        self.count = 0  # batches handed out
        self.number: int | None = None  # of Accelerate
        self.batches: Iterator[Any] = iter(())

    def __iter__(self) -> Iteration:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self.batches)
        except StopIteration:
            self._course.over(self)
            raise
        self._course.handed(self)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)
