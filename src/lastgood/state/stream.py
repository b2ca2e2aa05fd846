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

from lastgood.errors import CorruptCheckpoint, Incompatible, NotSupported, UsageError, wrong_type
from lastgood.report import Change
from lastgood.state import position
from lastgood.state.cost import Cost, changes, target
from lastgood.state.course import Course
from lastgood.state.followed import attach, of
from lastgood.state.own import frozen
from lastgood.state.position import Mark
from lastgood.state.rng import Rng
from lastgood.state.tree import JSON
from lastgood.state.walk import Goal, Past, Walk
from lastgood.state.way import How, Skip, facts, inner_of, way


class Once:
    """The random state that training goes on under, for several loaders of one loop: the first to begin sets it."""

    def __init__(self, then: Rng | None) -> None:
        self._then = then

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
    course = of(loader)
    if course is None:
        stream = Stream(loader, Course(loader, inner_of(loader), skip))
        if stream.course.way.batches:
            attach(loader, inner_of(loader), stream.course)
        stream.course.stream = weakref.ref(stream)
        return stream
    if skip != "auto":
        course.choose(way(loader, inner_of(loader), skip))
    known: Stream | None = course.stream()
    if known is None:
        known = Stream(loader, course)
        course.stream = weakref.ref(known)
    return known


class Stream:
    """Follows a loader. Made by `follow`.

    The loader holds its course and nothing holds the loader but its user and this: a loader in a reference cycle ends
    its worker processes late and slowly.
    """

    def __init__(self, loader: Any, course: Course) -> None:
        self.loader = loader
        self.course = course

    # ---- where it stands -------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Iterations of the loader that were gone through to their end."""
        return self.course.goal[0].epoch if self.course.goal is not None else self.course.ended

    @property
    def consumed(self) -> int:
        """Batches handed out in the iteration under way."""
        if self.course.goal is not None:
            return self.course.goal[0].consumed
        walk = self.course.under_way()
        return 0 if walk is None else walk.consumed

    def mark(self) -> Mark:
        """Where the loop stands now; stays right whatever is fetched later.

        Raises NotSupported if two iterations of this loader are used at the same time.
        """
        course = self.course
        if course.goal is not None:  # not begun since it was loaded
            return course.goal[0]
        if course.twice:
            raise NotSupported(
                "two iterations of the same loader are used at the same time: there is no one place to go on from",
                hint="make a second loader for the second iteration",
            )
        walk = course.under_way()
        if walk is None or walk.start is None or walk.draws is None:
            reused = course.warm or self._reuses()
            own, state = course.own.capture(), self._state(None)
            return Mark(epoch=course.ended, own=own, state=state, past=course.past, reused=reused)
        return Mark(
            epoch=course.ended,
            consumed=walk.consumed,
            here=walk.past(),
            ahead={ordinal: moment for ordinal, moment in walk.ahead.items() if ordinal > walk.consumed},
            own=course.own.capture(),
            state=self._state(walk),
            past=course.past,
            reused=walk.reused,
            lost=walk.draws.lost,
        )

    def cost(self, mark: Mark) -> Cost:
        """What a resume from there would cost with this loader."""
        doubt, inner = "", inner_of(self.loader)
        if mark.lost:
            doubt = f"the loader and the training both draw from the generator of {', '.join(sorted(mark.lost))}"
        elif getattr(inner, "num_workers", 0) > 1 and not getattr(inner, "in_order", True):
            doubt = "in_order=False: batches come in the order in which workers happen to be ready"
        if mark.here is None or self.course.way.how in ("state", "dataset"):
            return Cost(how="nothing", doubt=doubt)
        batches = mark.consumed + sum(past.consumed for past in mark.past)
        if not batches:
            return Cost(how="nothing", doubt=doubt)
        clock = self.course.clocks.index if self.course.way.how == "indices" else self.course.clocks.fetch
        seconds = None if clock.mean is None else clock.mean * batches
        return Cost(how=self.course.way.how, batches=batches, seconds=seconds, why=self.course.way.why, doubt=doubt)

    def _reuses(self) -> bool:
        """Whether the next iteration has worker processes that are there already."""
        inner = inner_of(self.loader)
        return bool(getattr(inner, "persistent_workers", False)) and getattr(inner, "_iterator", None) is not None

    def _state(self, walk: Walk | None) -> Any:
        if self.course.way.how == "state" and (walk is not None or not isinstance(self.loader, DataLoader)):
            return frozen(self.loader.state_dict())
        if self.course.way.how == "dataset" and walk is not None:
            return frozen(inner_of(self.loader).dataset.state_dict())
        return None

    # ---- saving and loading ----------------------------------------------------------------

    def encode(self, mark: Mark, tensors: dict[str, torch.Tensor], where: str = "data") -> JSON:
        """The JSON for a mark; tensors in the state of a loader or dataset go to `tensors`, named "<where>...".

        Raises NotSupported for a state that can't be stored without pickle.
        """
        head = {"kind": self.course.way.kind, "how": self.course.way.how, "facts": facts(self.loader)}
        return {**head, **position.encode(mark, tensors, where)}

    def check(self, value: JSON) -> None:
        """Raise Incompatible, before anything is changed, if a mark of another kind of loader was saved."""
        saved = value.get("facts") if isinstance(value, dict) else None
        if not isinstance(saved, dict) or not all(number is None or type(number) is int for number in saved.values()):
            raise CorruptCheckpoint("the position in the data can't be read: it doesn't say of what loader")
        kind = value.get("kind")
        if kind != self.course.way.kind:
            raise Incompatible(
                f"the position in the data was saved with a {kind}, this run has a {self.course.way.kind}",
                hint="resume with the kind of loader that the run was started with",
            )
        if self.course.alive() is not None:
            raise UsageError(
                "the loader is iterated already: its position can't be set any more",
                hint="restore before iter(loader); after an earlier run in the same process, make a new loader",
            )

    def changes(self, value: JSON) -> list[Change]:
        """What is different now, and what that does to the epoch that was under way."""
        return changes(value, facts(self.loader), self.course.way)

    def load(self, value: JSON, tensors: Mapping[str, torch.Tensor], *, then: Rng | Once) -> list[tuple[str, str]]:
        """Have the next iteration go on where the mark was; returns (part, detail) for the restore report.

        then: the state of the generators at the mark. It is set when the resumed iteration begins; if none was under
        way the caller has set it, and nothing is drawn. One loop over several loaders passes the same `Once` to all.

        Raises what `check` raises.
        """
        self.check(value)
        mark = position.decode(value, tensors)
        once = then if isinstance(then, Once) else Once(then)
        consumed, fits = target(value, facts(self.loader), self.course.way)
        course = self.course
        course.twice = course.at_end = False
        course.ended, course.past, course.warm = mark.epoch, mark.past, mark.reused
        lines = [("data", f"not set: {place}") for place in course.own.lacking(mark.own)]
        if not isinstance(self.loader, DataLoader) and course.way.how == "state":
            self.loader.load_state_dict(mark.state)
            if mark.here is not None and course.way.batches:
                course.goal = mark, Goal(here=mark.here, own=mark.own, then=once.take)
            return [("data", f"{course.way.kind}: its own state")]
        if mark.here is None:
            course.own.restore(mark.own)
            return [("data", f"beginning of epoch {mark.epoch}"), *lines]
        if not fits:
            course.own.restore(mark.here.start.own)
            return [("data", f"epoch {mark.epoch} begins again, the data or its batches changed"), *lines]
        if value["how"] != course.way.how or consumed != mark.consumed:
            # Noted for another way, or of other batches: it would be set at the wrong ones.
            known = {ordinal: state for ordinal, state in mark.here.known.items() if ordinal == 1}
            mark = replace(mark, consumed=consumed, here=Past(mark.here.start, consumed, known), ahead={}, past=())
            course.past = ()
        assert mark.here is not None
        # Saved under skip="replay" there is no state to load.
        lost_state = course.way.how in ("state", "dataset") and mark.state is None
        how: How = "replay" if lost_state else course.way.how
        goal = Goal(
            here=mark.here,
            how=how,
            ahead=mark.ahead,
            own=mark.own,
            then=once.take,
            load=None if lost_state else self._loading(mark),
            lost=mark.lost,
        )
        course.goal = mark, goal
        course.at_end = mark.here.ended
        if course.at_end:
            course.warm = course.persistent
            course.past = (*course.past, mark.here) if course.lives_on else ()
        cost = self.cost(mark)
        doubt = f"; NOT EXACT: {cost.doubt}" if cost.doubt else ""
        return [("data", f"epoch {mark.epoch}, behind batch {consumed} ({cost}){doubt}"), *lines]

    def _loading(self, mark: Mark) -> Callable[[], None] | None:
        if mark.state is None or self.course.way.how not in ("state", "dataset"):
            return None
        target = self.loader if self.course.way.how == "state" else inner_of(self.loader).dataset
        return lambda: target.load_state_dict(mark.state)

    # ---- iterating -------------------------------------------------------------------------

    def batches(self) -> Iterator[Any]:
        """Epoch after epoch, without end; sampler and dataset are told the number of each epoch if they want it.

        Raises UsageError if there is no batch in a whole epoch.
        """
        while True:
            resumed = self.course.goal is not None
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
