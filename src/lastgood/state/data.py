"""Where a run stands in its data, and how to stand there again.

A fetched batch depends on the order of the samples (drawn when an epoch's iteration
begins), on the random numbers that dataset and collator draw, and on when they are drawn:
loaders fetch ahead of training. So the state of the generators is kept from the beginning
of the epoch and from just before each fetch that training hasn't used yet; on resume every
fetch happens under the state that it had the first time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lastgood.state import rng
from lastgood.state.batch import Batches
from lastgood.state.rng import Rng

FETCHES_AHEAD = 8
"""Fetches whose random state is remembered; Accelerate's loaders are one ahead."""


@dataclass(frozen=True, slots=True)
class Position:
    """`consumed` batches of an epoch were trained on.

    start: generators at the beginning of the epoch; fetches: ordinal (from 1) -> generators just
    before a batch that was fetched and not used; own and own_start: states of the loader's and
    samplers' own torch generators, now and at the beginning of the epoch.
    """

    consumed: int
    start: Rng
    fetches: dict[int, Rng]
    own: list[torch.Tensor]
    own_start: list[torch.Tensor]

    def encode(self) -> dict[str, Any]:
        return {
            "consumed": self.consumed,
            "start": rng.encode(self.start),
            "fetches": {str(ordinal): rng.encode(state) for ordinal, state in self.fetches.items()},
            "own": [rng.to_text(state) for state in self.own],
            "own_start": [rng.to_text(state) for state in self.own_start],
        }

    @classmethod
    def decode(cls, value: dict[str, Any]) -> Position:
        return cls(
            consumed=int(value["consumed"]),
            start=rng.decode(value["start"]),
            fetches={int(ordinal): rng.decode(state) for ordinal, state in value["fetches"].items()},
            own=[rng.from_text(text) for text in value["own"]],
            own_start=[rng.from_text(text) for text in value["own_start"]],
        )


class Tracker:
    """Follows one run's loader through its epochs; wraps each epoch's iterable with `watch`.

    batches: gets every batch that is fetched for training; None if nobody wants to know them.
    """

    def __init__(self, batches: Batches | None = None) -> None:
        self.batches = batches
        self._skip = 0
        self._start: Rng | None = None
        self._own: list[torch.Generator] = []
        self._own_start: list[torch.Tensor] = []
        self._before: dict[int, Rng] = {}
        self._ahead = True

    def watch(self, loader: Any, *, resume: Position | None = None, then: Rng | None = None, discard: int = 0) -> Any:
        """`loader`, iterating as before while its fetches are followed.

        resume: begin where this position says; `then` is the state that training goes on with.
        discard: batches to load and drop first (a loader that skips by itself needs none).
        """
        self._own = own_generators(loader)
        # Accelerate's loaders iterate one batch ahead over an inner loader: the inner one sees each single fetch.
        inner = getattr(loader, "base_dataloader", None)
        target = loader if inner is None else inner
        # What the outer one drops has gone through the inner one.
        self._skip = 0 if inner is None else int(getattr(loader, "skip_batches", 0) or 0)
        if isinstance(target, Watched):
            target = target.loader
        watched = Watched(target, self, resume, then, discard)
        if inner is None:
            return watched
        loader.base_dataloader = watched
        return loader

    def begin(self, *, ahead: bool) -> None:
        """An epoch's iteration begins."""
        self._start = rng.capture()
        self._own_start = [generator.get_state() for generator in self._own]
        self._before = {}
        self._ahead = ahead
        if self.batches is not None:
            self.batches.begin(self._skip)

    def fetching(self, ordinal: int) -> None:
        """Batch number `ordinal` is about to be fetched."""
        # With worker processes a fetch draws nothing here.
        if self._ahead:
            self._before[ordinal] = rng.capture()
            self._before.pop(ordinal - FETCHES_AHEAD, None)

    def fetched(self, batch: Any) -> None:
        """A batch came; it is still where the loader made it."""
        if self.batches is not None:
            self.batches.add(batch)

    def position(self, consumed: int) -> Position:
        """Where the run stands after training on `consumed` batches of this epoch."""
        return Position(
            consumed=consumed,
            start=self._start if self._start is not None else rng.capture(),
            fetches={ordinal: state for ordinal, state in self._before.items() if ordinal > consumed},
            own=[generator.get_state() for generator in self._own],
            own_start=list(self._own_start),
        )

    def set_own(self, states: list[torch.Tensor]) -> None:
        """Set the loader's own generators; their number differs only if the loader was built differently."""
        for generator, state in zip(self._own, states, strict=False):
            generator.set_state(state)


class Watched:
    """A loader whose every fetch is announced to a tracker; anything else is the loader's."""

    def __init__(self, loader: Any, tracker: Tracker, resume: Position | None, then: Rng | None, discard: int) -> None:
        self.loader = loader
        self._tracker = tracker
        self._resume = resume
        self._then = then
        self._discard = discard

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet while unpickling or copying: don't recurse
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        if resume is not None:
            self._tracker.set_own(resume.own_start)
            rng.restore(resume.start)
        self._tracker.begin(ahead=getattr(self.loader, "num_workers", 0) == 0)
        iterator = iter(self.loader)
        ordinal = 0
        if resume is not None:
            draw_order(iterator)
            for _ in range(self._discard):
                next(iterator, None)
            ordinal = resume.consumed
        then = self._then if resume is not None else None
        while True:
            ordinal += 1
            if resume is not None and ordinal in resume.fetches:
                rng.restore(resume.fetches[ordinal])
            elif then is not None:
                rng.restore(then)
                then = None
            self._tracker.fetching(ordinal)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._tracker.fetched(batch)
            yield batch


def draw_order(iterator: Any) -> None:
    """Let the sampler draw the order of the epoch now: it does so at the first fetch, which here happens later.

    With worker processes the first indices were sent out when the iterator was made: nothing is left to do.
    """
    indices = getattr(iterator, "_sampler_iter", None)
    if indices is not None and getattr(iterator, "_num_workers", 0) == 0:
        iterator._sampler_iter = itertools.chain(
            [first for first in [next(indices, None)] if first is not None], indices
        )


def own_generators(loader: Any) -> list[torch.Generator]:
    """The torch generators that the loader and its samplers hold, in a fixed order."""
    found: list[torch.Generator] = []
    level = [loader]
    for _ in range(4):
        following = []
        for thing in level:
            for name in ("generator", "synchronized_generator"):
                generator = getattr(thing, name, None)
                if isinstance(generator, torch.Generator) and all(generator is not known for known in found):
                    found.append(generator)
            # Not `if sampler`: that asks for its length, and the sampler of a stream has none.
            inner = (getattr(thing, name, None) for name in ("sampler", "batch_sampler"))
            following += [sampler for sampler in inner if sampler is not None]
        level = following
    return found


PURE_COLLATORS = frozenset(
    {
        "default_collate",
        "default_convert",
        "default_data_collator",
        "DefaultDataCollator",
        "DataCollatorWithPadding",
        "DataCollatorForSeq2Seq",
        "DataCollatorForTokenClassification",
        "DataCollatorForPreference",
    }
)
"""Collators known to draw no random numbers."""


def can_skip_unread(loader: Any) -> bool:
    """Whether the first batches can be left out without loading them: a stream has to be read."""
    return not isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset)


def draws_nothing(loader: Any) -> bool:
    """Whether loading a batch is known to depend on nothing but its indices, so that batches can be skipped unread."""
    collate = getattr(loader, "collate_fn", None)
    collate = getattr(collate, "data_collator", collate)  # transformers wraps it to drop unused columns
    name = getattr(collate, "__name__", type(collate).__name__)
    pure = name in PURE_COLLATORS or (name == "DataCollatorForLanguageModeling" and not getattr(collate, "mlm", False))
    dataset = getattr(loader, "dataset", None)
    while type(dataset) is torch.utils.data.Subset:
        dataset = dataset.dataset
    if isinstance(dataset, (list, tuple, torch.utils.data.TensorDataset)):
        return pure
    format_type = getattr(dataset, "format", None)  # a Hugging Face dataset without a transform of the user's
    return pure and isinstance(format_type, dict) and format_type.get("type") != "custom"
