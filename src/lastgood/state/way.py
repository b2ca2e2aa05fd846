"""How a loader gets back to where it was: decided from what it is, before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from lastgood.errors import NotSupported
from lastgood.state.data import draws_nothing

How = Literal["indices", "replay", "state", "dataset"]
Skip = Literal["auto", "fast", "replay"]

DRAW_AT_ONCE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
"""Samplers that draw the order of an epoch as a whole; with a generator of their own some draw on the way from that."""

REWRITE = "put the batches into a torch DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """kind: what has to be the same when resuming; why: of `how`, in words.

    indices: draw the indices of the batches before and drop them. replay: load those batches and drop them.
    state: the loader's own state_dict(). dataset: its dataset's.
    """

    kind: str
    how: How
    why: str = ""

    @property
    def batches(self) -> bool:
        """Whether its batches are drawn in an iteration that is to be followed: not if there is only a state."""
        return self.kind != "object"


def way(loader: Any, inner: Any, skip: Skip) -> Way:
    """The way of `loader`, whose single fetches are those of `inner`. Raises NotSupported."""
    if isinstance(loader, DataLoader):
        prepared = "" if inner is loader else " prepared by Accelerate"
        whose = " with a state" if stateful(inner) else ""
        stream = isinstance(inner.dataset, IterableDataset)
        how, why = (_stream if stream else _map)(inner, skip)
        if how == "dataset" and prepared:
            how, why = "replay", "the state of its dataset is ahead of the loop: Accelerate fetches ahead"
        return Way(kind=f"{'stream' if stream else 'map-style'} loader{whose}{prepared}", how=how, why=why)
    iterates = callable(getattr(loader, "__iter__", None))
    name = f"{type(loader).__module__}.{type(loader).__qualname__}"
    if stateful(loader):
        return Way(kind=name if iterates else "object", how="state")
    if iterates and not isinstance(loader, Iterator):
        return Way(kind=name, how="replay", why="it has no state_dict()")
    raise NotSupported(
        f"a {name} can't be put back to where it is in its data: it runs out, and has no state_dict()",
        hint=f"{REWRITE}, or give it state_dict() and load_state_dict()",
    )


def inner_of(loader: Any) -> Any:
    """Accelerate's loaders iterate one batch ahead over an inner one, which sees each single fetch."""
    inner = getattr(loader, "base_dataloader", None)
    return loader if inner is None else inner


def _map(loader: Any, skip: Skip) -> tuple[How, str]:
    fast: How = "state" if stateful(loader) else "indices"
    if skip == "replay":
        return "replay", 'skip="replay"'
    if skip == "auto" and loader.num_workers > 0 and not draws_nothing(loader):
        return "replay", "random draws in its worker processes can't be excluded"
    return fast, ""


def _stream(loader: Any, skip: Skip) -> tuple[How, str]:
    if skip == "replay":
        return "replay", 'skip="replay"'
    dataset = loader.dataset
    if not stateful(dataset):
        return "replay", "its dataset is a stream without state_dict()"
    how: How = "state" if stateful(loader) else "dataset"
    if loader.num_workers > 0 and how == "dataset":
        return "replay", "the state of its dataset is in the worker processes"
    why = _inexact(dataset)
    if not why and loader.num_workers > 0:
        why = "random draws in its worker processes can't be excluded"
    return ("replay", why) if why and skip == "auto" else (how, "")


def _inexact(dataset: Any) -> str:
    """Why a Hugging Face dataset wouldn't go on with the same examples from its state; "" if it does."""
    step = getattr(dataset, "_ex_iterable", None)
    waiting = [] if step is None else [step]
    while waiting:
        step = waiting.pop()
        name = type(step).__name__
        if name == "BufferShuffledExamplesIterable":
            return "its dataset's state leaves out the shuffle buffer"
        if name in ("MappedExamplesIterable", "FilteredExamplesIterable") and getattr(step, "batched", False):
            return "its dataset's state is that of the last whole batch of a map(), whose draws would come twice"
        inner = getattr(step, "ex_iterable", None)
        waiting += [*([] if inner is None else [inner]), *getattr(step, "ex_iterables", ())]
    return ""


def stateful(thing: Any) -> bool:
    """Whether it says where it is, and can be told."""
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def draws_at_once(loader: Any) -> bool:
    """Whether the order of an epoch is known to come from the states that its first index was drawn under."""
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None:
        sampler = getattr(loader, "sampler", None)
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler) in DRAW_AT_ONCE or isinstance(sampler, (list, tuple, range))


def facts(loader: Any) -> dict[str, int | None]:
    """Numbers that the place of a batch depends on; None where they aren't known."""
    numbers = {name: getattr(loader, name, None) for name in ("batch_size", "num_workers")}
    numbers["samples"] = _length(getattr(loader, "dataset", None))
    if numbers["samples"] is None and not isinstance(getattr(loader, "dataset", None), IterableDataset):
        numbers["batches"] = _length(loader)
    return {name: value if isinstance(value, int) else None for name, value in numbers.items()}


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except (TypeError, NotImplementedError, RuntimeError):
        return None
