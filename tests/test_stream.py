"""A plain loop over a followed loader goes on, bit for bit, as if it had never been interrupted."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from lastgood.errors import CorruptCheckpoint, Incompatible, NotSupported, UsageError
from lastgood.state import rng
from lastgood.state.stream import Once, Stream, follow

SAMPLES, BATCH = 11, 3  # 4 batches an epoch, the last one smaller


# ---- data of many kinds: at module level, so that worker processes of any kind can have it ----


class Plain(Dataset[torch.Tensor]):
    """Draws nothing; `loaded` counts, in this process, how often a sample was."""

    loaded = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        Plain.loaded += 1
        return torch.tensor([index, index * index])


class Noisy(Plain):
    """Draws from each generator of the process that it is in."""

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.cat([super().__getitem__(index).double(), torch.tensor(drawn, dtype=torch.float64)])


class Augmented(Plain):
    """Draws from generators of its own, and counts."""

    def __init__(self) -> None:
        self.python, self.numpy = random.Random(5), np.random.default_rng(6)
        self.torch = torch.Generator().manual_seed(7)
        self.old = np.random.RandomState(8)
        self.calls = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.calls += 1
        drawn = [self.python.random(), self.numpy.random(), float(torch.rand((), generator=self.torch)), self.old.rand()]
        return torch.tensor([index, self.calls, *drawn], dtype=torch.float64)


class Told(Plain):
    """Whose samples depend on the epoch that it is told of."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index) + 100 * self.epoch


class Worker(Plain):
    """Whose samples say which worker process made them."""

    def __getitem__(self, index: int) -> torch.Tensor:
        info = torch.utils.data.get_worker_info()
        return torch.tensor([index, -1 if info is None else info.id])


class Flow(IterableDataset[torch.Tensor]):
    """A stream that shuffles by the generators of the process, and knows how often it was begun."""

    def __init__(self) -> None:
        self.begun = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.begun += 1
        info = torch.utils.data.get_worker_info()
        mine = range(SAMPLES)[0 if info is None else info.id :: 1 if info is None else info.num_workers]
        waiting: list[int] = []
        for index in mine:
            waiting.append(index)
            if len(waiting) > 4:
                yield self._sample(waiting.pop(random.randrange(len(waiting))))
        while waiting:
            yield self._sample(waiting.pop(int(torch.randint(len(waiting), ()))))

    def _sample(self, index: int) -> torch.Tensor:
        return torch.tensor([index, self.begun, float(torch.rand(()))])


class Stateful(IterableDataset[torch.Tensor]):
    """A stream that says where it is. Counts what it reads."""

    read = 0

    def __init__(self) -> None:
        self.at = self.start = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": [self.at]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"][0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.at, self.start = self.start, 0
        while self.at < SAMPLES:
            Stateful.read += 1
            self.at += 1
            yield torch.tensor([self.at, float(torch.rand(()))])


class Wandering:
    """A sampler that draws from the generators of the process on its way, and depends on what it drew before."""

    def __iter__(self) -> Iterator[int]:
        at = 0
        for _ in range(SAMPLES):
            at = (at + random.randrange(SAMPLES) + int(torch.randint(3, ()))) % SAMPLES
            yield at

    def __len__(self) -> int:
        return SAMPLES


class Rising:
    """A sampler that counts its epochs by itself."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        yield from torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def __len__(self) -> int:
        return SAMPLES


class Reiterable:
    """No loader of anybody's: it can be iterated again, and has no state."""

    def __init__(self) -> None:
        self.numpy = np.random.default_rng(3)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(4):
            yield torch.tensor([self.numpy.random(), float(torch.rand(())), random.random()])


class WithState:
    """A loader of the user's own, with a state of its own."""

    def __init__(self) -> None:
        self.generator, self.at = torch.Generator().manual_seed(2), 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 4:
            self.at += 1
            yield torch.rand(2, generator=self.generator)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        self.generator.set_state(state["generator"])


def noisy_collate(batch: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(batch).double() + torch.rand(()) + random.random()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def loader(dataset: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **{"batch_size": BATCH, **options})


def prepared(dataset: Any, **options: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(loader(dataset, **options))


def distributed() -> DistributedSampler[Any]:
    return DistributedSampler(Plain(), num_replicas=2, rank=1, shuffle=True)


def hugging(how: str) -> Any:
    from datasets import Dataset as Table

    stream = Table.from_dict({"x": list(range(SAMPLES))}).to_iterable_dataset(num_shards=2)
    if how == "buffer":
        stream = stream.shuffle(seed=1, buffer_size=5)
    if how == "map":
        stream = stream.map(lambda row: {"y": row["x"] + random.random()})
    if how == "batched":
        stream = stream.map(lambda rows: {"y": [x + random.random() for x in rows["x"]]}, batched=True, batch_size=4)
    return loader(stream.with_format("torch"))


def stateful(dataset: Any, **options: Any) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return module.StatefulDataLoader(dataset, **{"batch_size": BATCH, **options})


KINDS: dict[str, Callable[[], Any]] = {
    "in order": lambda: loader(Plain()),
    "shuffled": lambda: loader(Noisy(), shuffle=True),
    "generator": lambda: loader(Plain(), shuffle=True, generator=generator()),
    "replacement": lambda: loader(Plain(), sampler=RandomSampler(Plain(), True, 10, generator())),
    "weighted": lambda: loader(Noisy(), sampler=WeightedRandomSampler([1.0, 2.0] * 5, 10), drop_last=True),
    "distributed": lambda: loader(Noisy(), sampler=distributed(), batch_size=2),
    "own batches": lambda: DataLoader(Plain(), batch_sampler=BatchSampler(Rising(), 4, True)),
    "wandering": lambda: loader(Noisy(), sampler=Wandering(), batch_size=2),
    "single": lambda: loader(Noisy(), batch_size=None, shuffle=True),
    "collate": lambda: loader(Plain(), shuffle=True, collate_fn=noisy_collate),
    "own generators": lambda: loader(Augmented(), shuffle=True),
    "told": lambda: loader(Told(), shuffle=True),
    "flow": lambda: loader(Flow()),
    "stateful flow": lambda: loader(Stateful()),
    "prepared": lambda: prepared(Noisy(), shuffle=True),
    "prepared flow": lambda: prepared(Flow()),
    "hugging face": lambda: hugging(""),
    "hugging face buffer": lambda: hugging("buffer"),
    "hugging face map": lambda: hugging("map"),
    "hugging face batched": lambda: hugging("batched"),
    "torchdata": lambda: stateful(Noisy(), shuffle=True),
    "torchdata generator": lambda: stateful(Noisy(), shuffle=True, generator=generator()),
    "torchdata replacement": lambda: stateful(Plain(), sampler=RandomSampler(Plain(), True, 10, generator())),
    "torchdata flow": lambda: stateful(Flow()),
    "torchdata stateful": lambda: stateful(Stateful()),
    "re-iterable": Reiterable,
    "with a state": WithState,
}
WORKERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: loader(Plain(), shuffle=True, num_workers=2),
    "lists": lambda: loader(list(range(SAMPLES)), shuffle=True, num_workers=2, generator=generator(), prefetch_factor=1),
    "noisy": lambda: loader(Noisy(), shuffle=True, num_workers=2),
    "wandering": lambda: loader(list(range(SAMPLES)), sampler=Wandering(), num_workers=2, prefetch_factor=1),
    "persistent": lambda: loader(Noisy(), shuffle=True, num_workers=2, persistent_workers=True),
    "persistent lists": lambda: loader(list(range(SAMPLES)), shuffle=True, num_workers=2, persistent_workers=True),
    "flow": lambda: loader(Flow(), num_workers=2),
    "prepared": lambda: prepared(Noisy(), shuffle=True, num_workers=2),
    "torchdata": lambda: stateful(list(range(SAMPLES)), shuffle=True, num_workers=2),
    "torchdata noisy": lambda: stateful(Noisy(), shuffle=True, num_workers=2),
    "torchdata stateful": lambda: stateful(Stateful(), num_workers=2),
}


# ---- loops -----------------------------------------------------------------------------------


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def generators() -> str:
    return json.dumps(rng.encode(rng.capture()), sort_keys=True)


def train() -> None:
    """A step: it draws from every generator."""
    random.random(), np.random.standard_normal(), torch.rand(3)


def values(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {name: values(value) for name, value in batch.items()}
    return [values(item) for item in batch] if isinstance(batch, (list, tuple)) else batch


Seen = list[tuple[int, Any, str]]
Save = tuple[Any, dict[str, torch.Tensor], str]


def steps(stream: Stream, seen: Seen, until: int, *, between: bool = False) -> Save:
    """A loop over the loader itself that saves when it has made so many steps, or when that epoch is over.

    `seen`: epoch, batch and the generators after each step.
    """
    while True:
        for batch in stream.loader:
            train()
            seen.append((stream.epoch, values(batch), generators()))
            if len(seen) == until and not between:
                return saved(stream)
        train()  # what a loop does between two epochs
        if len(seen) >= until:
            return saved(stream)


def saved(stream: Stream) -> Save:
    tensors: dict[str, torch.Tensor] = {}
    value = stream.encode(stream.mark(), tensors)
    return json.loads(json.dumps(value, allow_nan=False)), tensors, json.dumps(rng.encode(rng.capture()))


def again(make: Callable[[], Any], save: Save, **options: Any) -> Stream:
    """What a new process does: the same loader anew, under other random states."""
    value, tensors, then = save
    seed(99)
    stream = follow(make(), **options)
    state = rng.decode(json.loads(then))
    rng.restore(state)
    stream.load(value, tensors, then=state)
    if value["here"]:
        torch.rand(5), random.random()  # the loop draws before it begins: that wasn't so the first time
    return stream


def exact(make: Callable[[], Any], points: list[tuple[int, bool]], total: int, **options: Any) -> None:
    """Interrupted at each of the points (step, whether between two epochs), the loop sees the same."""
    seed(1)
    whole: Seen = []
    steps(follow(make(), **options), whole, total + 2 * SAMPLES)
    seed(1)
    stream = follow(make(), **options)
    parts: Seen = []
    for point, between in points:
        if len(parts) < point:
            save = steps(stream, parts, point, between=between)
            stream = again(make, save, **options)
    if len(parts) < total:
        steps(stream, parts, total)
    assert parts == whole[: len(parts)]
    assert len(parts) >= total


POINTS = st.lists(st.tuples(st.integers(1, 14), st.booleans()), min_size=1, max_size=4).map(sorted)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), points=POINTS)
def test_resumes_see_what_an_uninterrupted_loop_sees(kind: str, points: list[tuple[int, bool]]) -> None:
    exact(KINDS[kind], points, 15)


@pytest.mark.parametrize("kind", KINDS)
def test_three_resumes_in_one_epoch_and_one_at_its_end(kind: str) -> None:
    exact(KINDS[kind], [(1, False), (2, False), (3, False), (4, True), (5, False), (6, False)], 10)


@pytest.mark.parametrize("kind", WORKERS)
def test_with_worker_processes(kind: str) -> None:
    exact(WORKERS[kind], [(2, False), (3, False), (6, False)], 9)
