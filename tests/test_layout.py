"""Copies whose places are remembered: they hold what the tensors hold, whatever becomes of those between two saves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood.errors import NotSupported, UsageError
from lastgood.format.tensors import Tensor
from lastgood.state.layout import Layout
from lastgood.state.lazy import SMALL, Lazy, Pace
from lastgood.state.tensors import ROW, Named, named, to_bytes
from lastgood.store.memory import Arena

Tensors = dict[str, torch.Tensor]
LARGE = SMALL // 4 + 3
"""Numbers of a tensor that is none of the small ones."""


def some() -> Tensors:
    torch.manual_seed(0)
    return {
        "row": torch.randn(5), "matrix": torch.randn(3, 4), "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3),
        "turned": torch.randn(6, 4).t(), "halves": torch.randn(7).to(torch.bfloat16), "flags": torch.tensor([True]),
        "count": torch.tensor(3), "waves": torch.view_as_complex(torch.randn(3, 2)), "eight": torch.randn(9).to(
            torch.float8_e4m3fn
        ), "trained": torch.nn.Parameter(torch.randn(2, 2)), "large": torch.randn(LARGE),
        "wide": torch.randn(2, LARGE).t(), "last": torch.randn(17),
    }  # fmt: skip


def add(tensors: Tensors) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.dtype.is_floating_point and tensor.dtype != torch.float8_e4m3fn:
                tensor.add_(1)


def elsewhere(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.data = tensor.data.clone()


def another_object(tensors: Tensors, name: str = "row") -> None:
    """Of the same memory."""
    if name in tensors:
        tensors[name] = tensors[name].detach()


def another_large_object(tensors: Tensors) -> None:
    another_object(tensors, "large")


def negated(tensors: Tensors, name: str = "row") -> None:
    """The same memory, address, shape and dtype, and other values: torch notes the sign beside them."""
    if name in tensors:
        tensors[name] = torch._neg_view(tensors[name])


def negated_large(tensors: Tensors) -> None:
    negated(tensors, "large")


def turned(tensors: Tensors) -> None:
    if "matrix" in tensors:
        tensors["matrix"].data = tensors["matrix"].data.t()


def turned_in_place(tensors: Tensors) -> None:
    if "matrix" in tensors:
        tensors["matrix"].t_()


def as_whole_numbers(tensors: Tensors) -> None:
    """The same object, address and shape."""
    if "row" in tensors and not tensors["row"].is_neg():
        now = tensors["row"].data
        tensors["row"].data = now.view(torch.int32 if now.dtype == torch.float32 else torch.float32)


def other_strides(tensors: Tensors) -> None:
    """The same address and shape, and another order in memory."""
    tensors["square"] = tensors.get("square", torch.randn(4, 4))
    tensors["square"].data = tensors["square"].data.t()


def smaller(tensors: Tensors) -> None:
    if "last" in tensors:
        tensors["last"].data = tensors["last"].data[: max(1, len(tensors["last"]) - 1)]


def grown(tensors: Tensors) -> None:
    tensors["large"] = torch.randn(LARGE + len(tensors))


def gone(tensors: Tensors) -> None:
    tensors.pop(next(iter(tensors)))


def new(tensors: Tensors) -> None:
    tensors[f"new{len(tensors)}"] = torch.randn(len(tensors))


def other_order(tensors: Tensors) -> None:
    first = next(iter(tensors))
    tensors[first] = tensors.pop(first)


def other_name(tensors: Tensors) -> None:
    first = next(iter(tensors))
    tensors[f"{first}_"] = tensors.pop(first)


CHANGES = (
    add, elsewhere, another_object, another_large_object, negated, negated_large,
    turned, turned_in_place, as_whole_numbers, other_strides, smaller, grown,
    gone, new, other_order, other_name,
)  # fmt: skip


def held(entries: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    return [(name, dtype, shape, bytes(data)) for name, dtype, shape, data in entries]


def expected(tensors: Tensors) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    return held(to_bytes(name, tensor) for name, tensor in tensors.items())


def saved(files: list[Tensors], arena: Arena, pace: Pace, known: set[Any]) -> list[tuple[Tensor, ...]]:
    """As a save stages several files, and the writer fills in what is copied later."""
    arena.reset()
    window = Lazy(known, (), pace)
    staged = [window.stage(named(dict(tensors)), arena) for tensors in files]
    window.begin()
    window.fill()
    window.prove()
    return [tuple(source.tensors()) for source in staged]


@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 1)), max_size=6), st.sampled_from([1, 40, SMALL]))
@settings(deadline=None, max_examples=150)
def test_I9_a_copy_is_what_the_tensors_are(changes: list[tuple[Callable[[Tensors], None], int]], small: int) -> None:
    files, arena, pace = [some(), some()], Arena(budget=1 << 28), Pace(small=small)
    for change, which in ((add, 0), *changes):
        change(files[which])
        for _ in range(2):
            every = [tensor for tensors in files for tensor in tensors.values() if tensor.is_contiguous()]
            known = {(one.data_ptr(), one.nbytes) for one in every}
            copies = saved(files, arena, pace, known)
            assert [held(copy) for copy in copies] == [expected(tensors) for tensors in files]
            add(files[0])  # a copy isn't the live memory
            add(files[1])


def test_the_same_tensors_are_copied_to_where_they_were() -> None:
    tensors, arena = some(), Arena(budget=1 << 28)
    arena.ready(1)
    copies = []
    for _ in range(3):
        add(tensors)
        copies += saved([tensors], arena, Pace(), set())
        assert arena.used == sum(len(entry.data) for entry in copies[-1])
    assert copies[0] is copies[1] is copies[2]  # the very entries: nothing was asked anew
    tensors["row"] = tensors["row"].clone()
    assert saved([tensors], arena, Pace(), set())[0] is not copies[0]


def test_rows_are_no_longer_than_one_call_copies_fast() -> None:
    """And so another thread needn't wait for one for long."""
    tensors = {f"{n}": torch.full((SMALL // 8 - n % 3,), float(n)) for n in range(50)}
    arena = Arena(budget=1 << 28)
    layout = Layout.of(tensors, arena, SMALL)
    counts = [len(row.target) for row in layout._rows]
    assert max(counts) <= ROW and sum(counts) == sum(map(len, tensors.values()))
    assert all(now + after > ROW - SMALL // 8 for now, after in pairwise(counts))
    layout.copy()
    assert held(layout.entries) == expected(tensors)


def test_large_tensors_are_not_kept_and_small_ones_go_with_the_memory() -> None:
    tensors, arena = some(), Arena(budget=1 << 28)
    saved([tensors], arena, Pace(), set())
    large, small = weakref.ref(tensors["large"]), weakref.ref(tensors["row"])
    tensors.clear()
    gc.collect()
    assert large() is None
    assert small() is not None
    arena.release()
    gc.collect()
    assert small() is None


def test_what_is_guarded_again_is_still_an_optimizers() -> None:
    """A tensor of its state that isn't there any more may be changed by anybody; so may all where none is known."""
    state, weight = torch.ones(LARGE), torch.ones(LARGE)
    arena, where = Arena(budget=1 << 28), [{(one.data_ptr(), one.nbytes)} for one in (weight, state)]

    def guarded(places: list[set[Any]], own: set[int] | None) -> list[str]:
        arena.reset()
        window = Lazy(*places, own=own)
        window.stage(named({"state": state, "weight": weight}), arena)
        found = [one.name for one in window._guarded]
        window.begin()
        for tensor in (state, weight):
            if ("state" if tensor is state else "weight") not in found:
                tensor.zero_()
        window.fill()
        window.prove()
        return found

    arena.ready(1)
    both, none = {id(state), id(weight)}, [set[Any](), set[Any]()]
    assert guarded(where, both) == guarded(none, both) == ["state", "weight"]
    assert guarded(none, {id(weight)}) == ["weight"]
    assert guarded(where, both) == ["state", "weight"]
    assert guarded(none, None) == []


@pytest.mark.parametrize("kept", [True, False])
def test_the_memory_of_large_tensors_is_kept_for_the_next_save_where_it_is_little(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lastgood.state.layout.KEPT", LARGE * 4 - 1 + kept)
    tensor, window = torch.ones(LARGE), Lazy((), ())
    window.weights = {(tensor.data_ptr(), tensor.nbytes)}
    window.stage(named({"one": tensor}), Arena(budget=1 << 28))
    (guard,) = window._guarded
    window.begin()
    window.fill()
    assert (guard.tensor is not None) == (guard.source is not None) == kept


def test_who_knows_that_a_file_is_the_same_is_believed_of_that_very_file_alone() -> None:
    arena, first, later = Arena(budget=1 << 28), object(), object()
    arena.ready(1)
    one, two, three = ({name: torch.randn(3) for name in "ab"} for _ in range(3))

    def copied(tensors: Tensors, since: object) -> Any:
        arena.reset()
        return held(Lazy((), ()).stage(Named(tensors, since), arena).tensors())

    for _ in range(3):
        assert copied(one, first) == expected(one)
    assert copied(two, first) == expected(two)
    for _ in range(3):
        assert copied(one, first) == expected(one)
    one |= three
    assert copied(one, later) == expected(three)
    assert copied(two, None) == expected(two)
    assert copied(three, None) == expected(three)


@pytest.mark.parametrize(
    ("tensor", "error"),
    [(torch.eye(2).to_sparse(), NotSupported), (torch.empty(2, device="meta"), NotSupported)],
    ids=["sparse", "meta"],
)
def test_what_cannot_be_stored_is_told(tensor: torch.Tensor, error: type[Exception]) -> None:
    arena = Arena(budget=1 << 28)
    with pytest.raises(error, match="odd"):
        Lazy((), ()).stage(named({"fine": torch.ones(2), "odd": tensor}), arena)
    with pytest.raises(UsageError, match="__metadata__"):
        Lazy((), ()).stage(named({"__metadata__": torch.ones(2)}), arena)


# ---- the memory --------------------------------------------------------------------------


def test_what_was_laid_out_is_recalled_at_the_same_spot_alone() -> None:
    arena = Arena(budget=1 << 28)

    def lay(what: str, count: int) -> None:
        begin, used = arena.spot, arena.used
        arena.take(count)
        arena.remember(what, begin, used)

    arena.ready(1)
    lay("first", 100)
    lay("second", 50)
    assert arena.recall() is None  # of this save
    arena.reset()
    assert arena.recall() == "first"
    arena.again()
    assert arena.used == 100
    assert arena.recall() == "second"
    lay("another second", 60)
    arena.reset()
    arena.again()
    assert arena.recall() == "another second"
    arena.again()
    assert arena.used == 160
    arena.reset()
    arena.take(10)
    assert arena.recall() is None  # it begins elsewhere
    arena.reset()
    assert arena.recall() is None  # and what a save didn't ask for is forgotten
    lay("third", 20)
    arena.release()
    arena.ready(1)
    assert arena.recall() is None


def test_a_block_that_is_given_back_is_no_other_one() -> None:
    """A layout of memory that is gone isn't taken for one of what came in its place, and doesn't keep it."""
    arena = Arena(budget=40 << 20)
    arena.ready(16 << 20)
    begin, used = arena.spot, arena.used
    old = Layout.of({"one": torch.ones(3)}, arena, SMALL)
    arena.remember(old, begin, used)
    arena.reset()
    assert arena.recall() is old
    arena.take(30 << 20)  # the first block goes: there is no room for both
    gone = weakref.ref(old._rows[0].target)
    del old
    gc.collect()
    assert gone() is None
    arena.reset()
    assert arena.recall() is None
    assert len(arena.spot) == 1
