"""Where a loop of the user's own stands in its data: the loader that it iterates is followed, batch by batch.

The loop stays as it is. What `follow` changes is the class of that one loader, in place, so that each of its
iterations is known from the beginning; a resumed one goes on behind the last batch that was used, under the random
states that it had. docs/data.md says which loaders get there exactly, and what it costs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch.utils.data import DataLoader

from lastgood.errors import Incompatible, NotSupported, UsageError, wrong_type
from lastgood.report import Change
from lastgood.state import position
from lastgood.state.cost import Cost, changes, target
from lastgood.state.followed import attach, of
from lastgood.state.own import Own, frozen
from lastgood.state.position import Mark
from lastgood.state.rng import Rng
from lastgood.state.tree import JSON
from lastgood.state.walk import Clocks, Goal, Order, Past, Walk
from lastgood.state.way import Skip, Way, draws_at_once, facts, way


class Once:
    """The random state that training goes on under, for several loaders of one loop: the first to begin sets it."""

    def __init__(self, then: Rng) -> None:
        self._then: Rng | None = then

    def take(self) -> Rng | None:
        then, self._then = self._then, None
        return then


def follow(loader: Any, *, skip: Skip = "auto") -> Stream:
    """The stream of `loader`, which is iterated as before; the same one each time.

    skip: how a resume gets past the batches that were used. "auto": as fast as is exact; "fast": nothing random is
    drawn where it can't be repeated, the caller knows; "replay": load them all again.

    Raises NotSupported for what can't be put back (a generator), UsageError for a wrong `skip`.
    """
    if skip not in get_args(Skip):
        raise wrong_type("skip", skip, '"auto", "fast" or "replay"')
    stream = of(loader)
    if isinstance(stream, Stream):
        if skip != "auto":
            stream.choose(skip)
        return stream
    # Accelerate's loaders iterate one batch ahead over an inner loader: the inner one sees each single fetch.
    inner = getattr(loader, "base_dataloader", None)
    stream = Stream(loader, loader if inner is None else inner, skip)
    if stream.way.batches:
        attach(stream)
    return stream


class Stream:
    """Follows a loader. Made by `follow`."""

    def __init__(self, loader: Any, inner: Any, skip: Skip) -> None:
        self.loader, self.inner = loader, inner
        self.way: Way = way(loader, inner, skip)
        # What is nothing but its state has everything in it.
        self._own = Own(loader if isinstance(loader, DataLoader) or self.way.how == "replay" else None)
        self._clocks = Clocks()
        self._ended = 0
        self._walk: Walk | None = None
        self._iteration: weakref.ref[Iteration] | None = None
        self._past: tuple[Past, ...] = ()
        self._goal: tuple[Mark, Goal] | None = None
        self._twice = False

    def choose(self, skip: Skip) -> None:
        """Another `skip`. Raises UsageError in the middle of an iteration."""
        chosen = way(self.loader, self.inner, skip)
        if chosen != self.way and self._alive() is not None:
            raise UsageError("skip can't change while the loader is iterated", hint="follow it before the loop begins")
        self.way = chosen

    # ---- where it stands -------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Iterations of the loader that were gone through to their end."""
        return self._goal[0].epoch if self._goal is not None else self._ended

    @property
    def consumed(self) -> int:
        """Batches handed out in the iteration under way."""
        if self._goal is not None:
            return self._goal[0].consumed
        walk = self._under_way()
        return 0 if walk is None else walk.consumed

    def mark(self) -> Mark:
        """Where the loop stands now; stays right whatever is fetched later.

        Raises NotSupported if two iterations of this loader are used at the same time.
        """
        if self._goal is not None:  # not begun since it was loaded
            return self._goal[0]
        if self._twice:
            raise NotSupported(
                "two iterations of the same loader are used at the same time: there is no one place to go on from",
                hint="make a second loader for the second iteration",
            )
        walk = self._under_way()
        if walk is None or walk.start is None or walk.draws is None:
            return Mark(epoch=self._ended, own=self._own.capture(), state=self._state(None), past=self._past)
        return Mark(
            epoch=self._ended,
            consumed=walk.consumed,
            here=walk.past(),
            ahead={ordinal: moment for ordinal, moment in walk.ahead.items() if ordinal > walk.consumed},
            own=self._own.capture(),
            state=self._state(walk),
            past=self._past,
            lost=walk.draws.lost,
        )

    def cost(self, mark: Mark) -> Cost:
        """What a resume from there would cost with this loader."""
        doubt = ""
        if mark.lost:
            doubt = f"the loader and the training both draw from the generator of {', '.join(sorted(mark.lost))}"
        elif getattr(self.inner, "num_workers", 0) > 1 and not getattr(self.inner, "in_order", True):
            doubt = "in_order=False: batches come in the order in which workers happen to be ready"
        if mark.here is None or self.way.how in ("state", "dataset"):
            return Cost(how="nothing", doubt=doubt)
        batches = mark.consumed + sum(past.consumed for past in mark.past)
        if not batches:
            return Cost(how="nothing", doubt=doubt)
        clock = self._clocks.index if self.way.how == "indices" else self._clocks.fetch
        seconds = None if clock.mean is None else clock.mean * batches
        return Cost(how=self.way.how, batches=batches, seconds=seconds, why=self.way.why, doubt=doubt)

    def _state(self, walk: Walk | None) -> Any:
        if self.way.how == "state" and (walk is not None or not isinstance(self.loader, DataLoader)):
            return frozen(self.loader.state_dict())
        if self.way.how == "dataset" and walk is not None:
            return frozen(self.inner.dataset.state_dict())
        return None

    # ---- saving and loading ----------------------------------------------------------------

    def encode(self, mark: Mark, tensors: dict[str, torch.Tensor], where: str = "data") -> JSON:
        """The JSON for a mark; tensors in the state of a loader or dataset go to `tensors`, named "<where>...".

        Raises NotSupported for a state that can't be stored without pickle.
        """
        head = {"kind": self.way.kind, "how": self.way.how, "facts": facts(self.loader)}
        return {**head, **position.encode(mark, tensors, where)}

    def check(self, value: JSON) -> None:
        """Raise Incompatible, before anything is changed, if a mark of another kind of loader was saved."""
        kind = value.get("kind")
        if kind != self.way.kind:
            raise Incompatible(
                f"the position in the data was saved with a {kind}, this run has a {self.way.kind}",
                hint="resume with the kind of loader that the run was started with",
            )
        if self._alive() is not None:
            raise UsageError(
                "the loader is iterated already: its position can't be set any more",
                hint="restore before iter(loader)",
            )

    def changes(self, value: JSON) -> list[Change]:
        """What is different now, and what that does to the epoch that was under way."""
        return changes(value, facts(self.loader), self.way)

    def load(self, value: JSON, tensors: Mapping[str, torch.Tensor], *, then: Rng | Once) -> list[tuple[str, str]]:
        """Have the next iteration go on where the mark was; returns (part, detail) for the restore report.

        then: the state of the generators at the mark. It is set when the resumed iteration begins; if none was under
        way the caller has set it, and nothing is drawn. One loop over several loaders passes the same `Once` to all.

        Raises what `check` raises.
        """
        self.check(value)
        mark = position.decode(value, tensors)
        once = then if isinstance(then, Once) else Once(then)
        consumed, fits = target(value, facts(self.loader), self.way)
        self._twice = False
        self._ended, self._past, self._walk, self._iteration = mark.epoch, mark.past, None, None
        if not isinstance(self.loader, DataLoader) and mark.state is not None and self.way.how == "state":
            self.loader.load_state_dict(mark.state)
            if mark.here is not None and self.way.batches:
                self._goal = mark, Goal(here=mark.here, own=mark.own, then=once.take)
            return [("data", f"{self.way.kind}: its own state")]
        lines = [("data", f"not set: {place}") for place in self._own.lacking(mark.own)]
        if mark.here is None:
            self._own.restore(mark.own)
            return [("data", f"beginning of epoch {mark.epoch}"), *lines]
        if not fits:
            self._own.restore(mark.here.start.own)
            return [("data", f"epoch {mark.epoch} begins again, the data or its batches changed"), *lines]
        if value["how"] != self.way.how or consumed != mark.consumed:
            # Noted for another way, or of other batches: it would be set at the wrong ones.
            here = Past(mark.here.start, consumed, {o: s for o, s in mark.here.known.items() if o == 1})
            mark = replace(mark, consumed=consumed, here=here, ahead={}, past=())
        assert mark.here is not None
        # Saved under skip="replay" there is no state to load.
        how = "replay" if self.way.how in ("state", "dataset") and mark.state is None else self.way.how
        goal = Goal(
            here=mark.here,
            how=how,
            past=mark.past if how == "replay" else (),
            ahead=mark.ahead,
            own=mark.own,
            then=once.take,
            load=None if how == "replay" else self._loading(mark),
            lost=mark.lost,
        )
        self._goal = mark, goal
        cost = self.cost(mark)
        doubt = f"; NOT EXACT: {cost.doubt}" if cost.doubt else ""
        return [("data", f"epoch {mark.epoch}, behind batch {consumed} ({cost}){doubt}"), *lines]

    def _loading(self, mark: Mark) -> Callable[[], None] | None:
        if mark.state is None or self.way.how not in ("state", "dataset"):
            return None
        target = self.loader if self.way.how == "state" else self.inner.dataset
        return lambda: target.load_state_dict(mark.state)

    # ---- iterating -------------------------------------------------------------------------

    def batches(self) -> Iterator[Any]:
        """Epoch after epoch, without end; sampler and dataset are told the number of each epoch if they want it.

        Raises UsageError if there is no batch in a whole epoch.
        """
        while True:
            resumed = self._goal is not None
            self._tell_epoch(self.epoch)
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty and not resumed:
                raise UsageError("the loader has no batches", hint="look at the dataset, batch_size and drop_last")

    def _tell_epoch(self, epoch: int) -> None:
        if callable(getattr(self.loader, "set_epoch", None)):  # Accelerate's tell the others
            self.loader.set_epoch(epoch)
            return
        batches = getattr(self.loader, "batch_sampler", None)
        inner = getattr(batches, "sampler", None)
        things: list[Any] = [
            getattr(self.loader, "sampler", None),
            batches,
            inner,
            getattr(self.loader, "dataset", None),
        ]
        for thing in things:
            if callable(getattr(thing, "set_epoch", None)):
                thing.set_epoch(epoch)

    def begin(self, make: Callable[[], Iterator[Any]]) -> Iteration:
        """The loop begins an iteration."""
        before = self._alive()
        self._leave()
        if before is not None:
            before.left = True
        peeks = self.inner is not self.loader
        if peeks and self._goal is not None:
            # Accelerate's loaders tell the sampler their epoch before the inner loader is asked for anything.
            self._own.restore(self._goal[1].here.start.own)
        walk = Walk(self._own, self._clocks, self.way.how, peeks=peeks, at_once=draws_at_once(self.inner))
        self._walk = walk
        iteration = Iteration(self, walk)
        self._iteration = weakref.ref(iteration)
        iteration.batches = make()
        return iteration

    def fetches(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """The fetching of its batches begins: at once, or at the first batch (Accelerate)."""
        walk = self._walk
        if walk is None or walk.start is not None:  # the inner loader of Accelerate's, iterated by itself
            return make()
        loaded, self._goal = self._goal, None
        dataset: Any = getattr(self.inner, "dataset", None)
        if loaded is None and getattr(dataset, "_starting_state_dict", None) is not None:
            dataset._starting_state_dict = None  # Hugging Face's would begin each epoch where this one was resumed
        return walk.begin(make, None if loaded is None else loaded[1])

    def order(self, sampler: Any) -> Any:
        """The sampler that the iterator under construction is to use."""
        return Order(sampler, lambda: self._walk) if self.way.how == "indices" and self._walk is not None else sampler

    def turn(self) -> int:
        """How many workers are to be passed over at first."""
        return self._walk.skip % self.inner.num_workers if self._walk is not None and self.inner.num_workers else 0

    def handed(self, iteration: Iteration) -> None:
        """The iteration has a batch for the loop."""
        if iteration.left:
            self._twice = True
        iteration.walk.consumed += 1

    def ended(self, iteration: Iteration) -> None:
        """It has no more."""
        if iteration.walk is self._walk:
            self._ended += 1
            self._leave(ended=True)

    def _alive(self) -> Iteration | None:
        iteration = None if self._iteration is None else self._iteration()
        return iteration if self._walk is not None else None

    def _under_way(self) -> Walk | None:
        """The walk of the iteration that the loop is in; one that nobody holds any more was left."""
        if self._alive() is None:
            self._leave()
        return self._walk

    def _leave(self, *, ended: bool = False) -> None:
        walk, self._walk, self._iteration = self._walk, None, None
        lives_on = getattr(self.inner, "persistent_workers", False) and self.way.how == "replay"
        if walk is not None and walk.start is not None and lives_on:
            # The workers go on with the generators as this iteration leaves them.
            self._past = (*self._past, walk.past(ended))


class Iteration:
    """What `iter(loader)` gives: the loader's own iterator, counted."""

    def __init__(self, stream: Stream, walk: Walk) -> None:
        self._stream = stream
        self.walk = walk
        self.left = False  # another one was begun
        self.batches: Iterator[Any] = iter(())

    def __iter__(self) -> Iteration:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self.batches)
        except StopIteration:
            self._stream.ended(self)
            raise
        self._stream.handed(self)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)
