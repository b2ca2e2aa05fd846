"""A plain loop over a followed loader goes on, bit for bit, as if it had never been interrupted."""

from __future__ import annotations

import copy
import gc
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from lastgood.errors import CorruptCheckpoint, Incompatible, NotSupported, UsageError
from lastgood.state import draws, rng
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
        drawn = [
            self.python.random(),
            self.numpy.random(),
            float(torch.rand((), generator=self.torch)),
            self.old.rand(),
        ]
        return torch.tensor([index, self.calls, *drawn, self.old.rand()], dtype=torch.float64)


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


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.rand(())


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
    "prepared told": lambda: prepared(Told(), shuffle=True),
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
    "lists": lambda: loader(
        list(range(SAMPLES)), shuffle=True, num_workers=2, generator=generator(), prefetch_factor=1
    ),
    "noisy": lambda: loader(Noisy(), shuffle=True, num_workers=2),
    "wandering": lambda: loader(list(range(SAMPLES)), sampler=Wandering(), num_workers=2, prefetch_factor=1),
    "persistent": lambda: loader(Noisy(), shuffle=True, num_workers=2, persistent_workers=True),
    "persistent lists": lambda: loader(list(range(SAMPLES)), shuffle=True, num_workers=2, persistent_workers=True),
    "prepared persistent": lambda: prepared(Noisy(), shuffle=True, num_workers=2, persistent_workers=True),
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


def again(make: Callable[[], Any], save: Save, **way: Any) -> Stream:
    """What a new process does: the same loader anew, under other random states."""
    value, tensors, then = save
    seed(99)
    stream = follow(make(), **way)
    state = rng.decode(json.loads(then))
    rng.restore(state)
    stream.load(value, tensors, then=state)
    if value["here"]:
        torch.rand(5), random.random()  # the loop draws before it begins: that wasn't so the first time
    return stream


def exact(make: Callable[[], Any], points: list[tuple[int, bool]], total: int, most: int = SAMPLES, **way: Any) -> None:
    """Interrupted at each of the points (step, whether between two epochs), the loop sees the same.

    most: how many steps more than `total` it may make, up to the end of an epoch.
    """
    seed(1)
    whole: Seen = []
    steps(follow(make(), **way), whole, total + most)
    seed(1)
    stream = follow(make(), **way)
    parts: Seen = []
    for point, between in points:
        if len(parts) < point or (between and len(parts) == point):
            save = steps(stream, parts, point, between=between)
            stream = again(make, save, **way)
    if len(parts) < total:
        steps(stream, parts, total)
    assert parts == whole[: len(parts)]
    assert len(parts) >= total


POINTS = st.lists(st.tuples(st.integers(1, 14), st.booleans()), min_size=1, max_size=4).map(sorted)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), points=POINTS)
def test_resumes_see_what_an_uninterrupted_loop_sees(kind: str, points: list[tuple[int, bool]]) -> None:
    exact(KINDS[kind], points, 15)


@pytest.mark.parametrize("kind", KINDS)
def test_three_resumes_in_one_epoch_and_one_at_its_end(kind: str) -> None:
    exact(KINDS[kind], [(1, False), (2, False), (3, False), (4, True), (5, False), (8, False)], 10)


@pytest.mark.parametrize("kind", WORKERS)
def test_with_worker_processes(kind: str) -> None:
    exact(WORKERS[kind], [(2, False), (6, False)], 7, most=0)


@pytest.mark.parametrize("kind", ["persistent", "persistent lists", "prepared persistent"])
def test_with_worker_processes_that_live_on(kind: str) -> None:
    """They don't begin an epoch as new ones do: no seed is drawn, and theirs go on from the epoch before."""
    exact(WORKERS[kind], [(4, False), (4, True), (9, False)], 10, most=0)


def test_no_skipped_sample_is_loaded() -> None:
    def make() -> DataLoader[Any]:
        return loader(Plain(), shuffle=True)

    exact(make, [(3, False)], 6)
    seed(1)
    save = steps(follow(make()), [], 3)
    stream = again(make, save)
    assert stream.cost(stream.mark()).how == "indices"
    Plain.loaded = 0
    next(iter(stream.loader))
    assert Plain.loaded == 2  # 11 = 3 + 3 + 3 + 2


def test_nothing_is_read_again_where_the_dataset_says_where_it_is() -> None:
    save = steps(follow(loader(Stateful())), [], 3)
    stream = again(lambda: loader(Stateful()), save)
    Stateful.read = 0
    assert next(iter(stream.loader))[:, 0].tolist() == [10, 11]
    assert Stateful.read == 2


@pytest.mark.parametrize("point", [1, 2, 3])
def test_each_batch_comes_from_the_worker_that_it_came_from(point: int) -> None:
    exact(lambda: loader(Worker(), num_workers=2, shuffle=True), [(point, False)], 5, most=0, skip="fast")


def test_replayed_on_demand() -> None:
    exact(KINDS["in order"], [(3, False)], 6, skip="replay")
    save = steps(follow(KINDS["in order"](), skip="replay"), [], 3)
    stream = again(KINDS["in order"], save, skip="replay")
    Plain.loaded = 0
    iterator = iter(stream.loader)
    next(iterator)
    assert Plain.loaded == SAMPLES
    assert stream.cost(stream.mark()).how == "replay"


# ---- what else loops do ------------------------------------------------------------------------


def test_a_loop_that_leaves_its_epochs_early() -> None:
    """Saved behind the `break`, a new iteration comes next; saved before it, the same one goes on."""

    def rest(stream: Stream) -> list[Any]:
        return [values(batch) for batch in stream.loader]

    def make() -> DataLoader[Any]:
        return loader(Noisy(), shuffle=True)

    seed(1)
    stream = follow(make())
    for number, _ in enumerate(stream.loader):
        if number == 1:
            inside = saved(stream)
            break
    assert (stream.epoch, stream.consumed) == (0, 0)
    behind = saved(stream)
    assert stream.mark().here is None
    new = rest(stream)
    assert (stream.epoch, len(new)) == (1, 4)
    assert rest(again(make, behind)) == new
    same = rest(again(make, inside))
    assert len(same) == 2
    assert not [batch for batch in same if batch in new]


def test_batches_taken_by_hand() -> None:
    def take(stream: Stream, count: int, iterator: Any = None) -> tuple[list[Any], Any]:
        iterator = iter(stream.loader) if iterator is None else iterator
        taken = []
        while len(taken) < count:
            try:
                taken.append(values(next(iterator)))
            except StopIteration:
                iterator = iter(stream.loader)
            train()
        return taken, iterator

    for first in range(1, 10):
        seed(1)
        whole, _ = take(follow(KINDS["shuffled"]()), 12)
        seed(1)
        stream = follow(KINDS["shuffled"]())
        parts, iterator = take(stream, first)
        save = saved(stream)
        del iterator
        assert parts + take(again(KINDS["shuffled"], save), 12 - first)[0] == whole


def test_two_loaders_side_by_side() -> None:
    """`zip` asks the first for a batch even when the second has none left; the random state is one for both."""

    def pairs(one: Stream, other: Stream, until: int) -> tuple[list[Any], Any]:
        seen: list[Any] = []
        while True:
            for pair in zip(one.loader, other.loader, strict=False):
                train()
                seen.append((values(pair), generators()))
                if len(seen) == until:
                    return seen, (saved(one), saved(other))

    def two() -> tuple[Any, Any]:
        return loader(Noisy(), shuffle=True), loader(Noisy(), shuffle=True, batch_size=4)

    for point in range(1, 8):
        seed(1)
        whole, _ = pairs(*map(follow, two()), 10)
        seed(1)
        parts, saves = pairs(*map(follow, two()), point)
        seed(99)
        streams = [follow(one) for one in two()]
        state = rng.decode(json.loads(saves[0][2]))
        then = Once(state)
        for stream, (value, tensors, _) in zip(streams, saves, strict=True):
            stream.load(value, tensors, then=then)
        assert parts + pairs(streams[0], streams[1], 10 - point)[0] == whole


def test_gradient_accumulation_counts_every_batch() -> None:
    def updates(stream: Stream, until: int) -> tuple[list[Any], Save]:
        made: list[Any] = []
        while True:
            group: list[Any] = []
            for number, batch in enumerate(stream.loader, stream.consumed + 1):
                group.append(values(batch))
                if number % 3 == 0 or number == len(stream.loader):
                    train()
                    made.append(group)
                    group = []
                    if len(made) == until:
                        return made, saved(stream)

    for point in range(1, 5):
        seed(1)
        whole, _ = updates(follow(KINDS["collate"]()), 6)
        seed(1)
        parts, save = updates(follow(KINDS["collate"]()), point)
        stream = again(KINDS["collate"], save)
        assert stream.consumed == {1: 3, 2: 4, 3: 3, 4: 4}[point]
        assert parts + updates(stream, 6 - point)[0] == whole


@pytest.mark.parametrize("kind", ["told", "distributed", "shuffled", "prepared told", "stateful flow"])
def test_batches_without_end(kind: str) -> None:
    def take(stream: Stream, count: int) -> tuple[list[Any], Save]:
        seen = []
        for batch in stream.batches():
            train()
            seen.append((stream.epoch, values(batch), generators()))
            if len(seen) == count:
                return seen, saved(stream)
        raise AssertionError("it ended")

    seed(1)
    whole, _ = take(follow(KINDS[kind]()), 11)
    for point in (2, 4, 5):
        seed(1)
        parts, save = take(follow(KINDS[kind]()), point)
        assert parts + take(again(KINDS[kind], save), 11 - point)[0] == whole
    if kind == "told":
        assert whole[-1][1][0][0] >= 200
    with pytest.raises(UsageError, match="no batches"):
        next(follow(DataLoader([1, 2], batch_size=3, drop_last=True)).batches())


# ---- marks and streams -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_mark_stays_what_it_was(kind: str) -> None:
    stream = follow(KINDS[kind]())
    iterator = iter(stream.loader)
    next(iterator), next(iterator)
    mark, tensors = stream.mark(), {}
    early = json.dumps(stream.encode(mark, tensors))
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iterator, None), train(), next(iterator, None), next(iterator, None)
    late: dict[str, torch.Tensor] = {}
    assert json.dumps(stream.encode(mark, late)) == early
    assert list(late) == list(kept)
    assert all(torch.equal(late[name], kept[name]) for name in kept)


def test_a_position_that_was_loaded_can_be_saved_again_before_it_is_used() -> None:
    save = steps(follow(KINDS["generator"]()), [], 2)
    stream = again(KINDS["generator"], save)
    assert (stream.epoch, stream.consumed) == (0, 2)
    assert stream.encode(stream.mark(), {}) == save[0]


def test_the_loader_stays_the_users_own() -> None:
    mine, other = loader(Plain(), shuffle=True), loader(Plain())
    stream = follow(mine)
    assert follow(mine) is stream
    assert isinstance(mine, DataLoader)
    assert type(other) is DataLoader
    assert (len(mine), mine.batch_size, mine.dataset) == (4, BATCH, stream.loader.dataset)
    assert iter(mine)._num_yielded == 0  # the iterator's own attributes
    twin = copy.copy(mine)
    list(twin)
    assert (stream.epoch, stream.consumed) == (0, 0)
    assert follow(twin) is not stream


def test_a_loader_goes_with_its_last_user() -> None:
    """In a reference cycle it would be garbage: its workers would end late, each after seconds."""
    mine = loader(list(range(6)), num_workers=1, persistent_workers=True)
    stream = follow(mine)
    next(iter(mine))
    worker = mine._iterator._workers[0]
    gc.disable()
    try:
        del mine, stream
        worker.join(60)
        assert not worker.is_alive()
    finally:
        gc.enable()


def test_followed_again_a_loader_keeps_its_place() -> None:
    mine = loader(Plain(), num_workers=0)
    follow(mine, skip="replay")
    list(mine)
    stream = follow(mine)
    assert stream.epoch == 1
    iterator = iter(mine)
    next(iterator)
    assert stream.cost(stream.mark()).how == "replay"
    with pytest.raises(UsageError, match="skip can't change"):
        follow(mine, skip="fast")


def test_what_a_resume_costs() -> None:
    def cost(make: Callable[[], Any], batches: int) -> Any:
        stream = follow(make())
        iterator = iter(stream.loader)
        for _ in range(batches):
            next(iterator)
        return stream.cost(stream.mark())

    assert cost(KINDS["shuffled"], 0).how == "nothing"
    assert cost(KINDS["with a state"], 2).how == "nothing"
    assert cost(KINDS["stateful flow"], 2).how == "nothing"
    indices = cost(KINDS["shuffled"], 3)
    assert (indices.how, indices.batches, indices.doubt) == ("indices", 3, "")
    for kind in ("flow", "hugging face buffer", "hugging face batched"):
        replay = cost(KINDS[kind], 3)
        assert (replay.how, replay.batches) == ("replay", 3)
        assert replay.seconds > 0
        assert replay.why
        assert "3 batches are loaded again" in str(replay)
    assert "in_order" in cost(lambda: loader(list(range(9)), num_workers=2, in_order=False), 1).doubt


def test_more_interleaved_draws_than_are_kept_are_not_exact_and_it_says_so() -> None:
    stream = follow(loader(Endless()))
    iterator = iter(stream.loader)
    for _ in range(draws.MOST + 3):
        next(iterator)
        torch.rand(())
    mark = stream.mark()
    assert len(mark.here.known) == draws.MOST
    assert stream.cost(mark).doubt == "the loader and the training both draw from the generator of torch"
    value = stream.encode(mark, {})
    assert "NOT EXACT" in dict(follow(loader(Endless())).load(value, {}, then=rng.capture()))["data"]


def test_a_loader_that_has_a_state_and_no_iterations() -> None:
    class ByHand:
        at = 0

        def next_batch(self) -> int:
            self.at += 1
            return self.at

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    mine = ByHand()
    stream = follow(mine)
    mine.next_batch(), mine.next_batch()
    save = saved(stream)
    mine.next_batch()
    assert again(ByHand, save).loader.next_batch() == 3


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [(x for x in [1]), iter([1]), [1, 2], (1, 2), range(3), 5, {"a": 1}, "text"])
def test_what_cannot_be_put_back_is_refused(thing: Any) -> None:
    with pytest.raises(NotSupported) as caught:
        follow(thing)
    assert "DataLoader" in caught.value.hint


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError, match="skip"):
        follow(loader(Plain()), skip="quick")  # type: ignore[arg-type]


def test_two_iterations_at_once_are_refused() -> None:
    stream = follow(loader(Plain(), shuffle=True))
    for _ in zip(stream.loader, stream.loader, strict=True):
        with pytest.raises(NotSupported, match="same time"):
            stream.mark()


def test_another_kind_of_loader_is_refused_and_nothing_is_changed() -> None:
    save = steps(follow(KINDS["generator"]()), [], 2)
    stream = follow(KINDS["flow"]())
    before = generators()
    with pytest.raises(Incompatible, match="map-style loader, this run has a stream loader"):
        stream.load(save[0], save[1], then=rng.capture())
    assert (generators(), stream.epoch, stream.consumed) == (before, 0, 0)


def test_a_loop_that_runs_already_is_left_alone() -> None:
    save = steps(follow(KINDS["generator"]()), [], 2)
    stream = follow(KINDS["generator"]())
    iterator = iter(stream.loader)
    next(iterator)
    with pytest.raises(UsageError, match="iterated already"):
        stream.load(save[0], save[1], then=rng.capture())
    assert stream.consumed == 1


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_damaged_position_is_refused(data: st.DataObject) -> None:
    value = steps(follow(KINDS["generator"]()), [], 2)[0]
    place = data.draw(
        st.sampled_from([("epoch",), ("consumed",), ("here", "start"), ("here", "known"), ("past",), ("facts",)])
    )
    wrong = data.draw(st.sampled_from([None, "x", 5.5, [3], {"a": "b"}]))
    inner = value
    for name in place[:-1]:
        inner = inner[name]
    if data.draw(st.booleans()):
        inner[place[-1]] = wrong
    else:
        del inner[place[-1]]
    stream = follow(KINDS["generator"]())
    try:
        stream.load(value, {}, then=rng.capture())
    except CorruptCheckpoint:
        assert (stream.epoch, stream.consumed) == (0, 0)


def test_another_batch_size_goes_on_behind_the_same_samples() -> None:
    def make(size: int) -> DataLoader[Any]:
        return DataLoader(list(range(24)), batch_size=size, shuffle=True)

    def rest(stream: Stream) -> list[int]:
        return torch.cat(list(stream.loader)).tolist()

    save = steps(follow(make(4)), [], 3)
    same = rest(again(lambda: make(4), save))
    stream = follow(make(6))
    (change,) = stream.changes(save[0])
    assert (change.saved, change.now) == (4, 6)
    assert "behind batch 2" in change.effect
    assert rest(again(lambda: make(6), save)) == same


def test_other_data_begins_the_epoch_again() -> None:
    save = steps(follow(loader(list(range(9)))), [], 2)
    stream = follow(loader(list(range(12))))
    (change,) = stream.changes(save[0])
    assert change.effect == "the epoch under way begins again"
    assert "begins again" in stream.load(save[0], save[1], then=rng.capture())[0][1]
    assert [values(batch) for batch in stream.loader] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
