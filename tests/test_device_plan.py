"""What a copy from an accelerator is planned by: needs none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood.state.device import batches
from lastgood.store.memory import BLOCK, Arena, Short, powers

SIZES = st.lists(st.integers(0, 300), max_size=40)


@given(SIZES, st.integers(1, 200))
def test_every_copy_is_in_one_batch_in_its_turn(sizes: list[int], most: int) -> None:
    found = batches(sizes, most)
    assert [n for batch in found for n in batch] == list(range(len(sizes)))
    for batch in found:
        total = sum(sizes[n] for n in batch)
        assert total - sizes[batch[-1]] < most, "an event comes as soon as there is enough to write"
        assert total >= most or batch is found[-1]


@given(st.integers(1, 1 << 44))
def test_memory_in_powers_of_two_holds_what_is_wanted_and_little_more(count: int) -> None:
    found = powers(count)
    assert all(size & (size - 1) == 0 and size >= BLOCK for size in found)
    assert list(found) == sorted(found, reverse=True) or len(found) == 4
    assert count <= sum(found) < max(count * 9 / 8 + 1, count + BLOCK)


class Given:
    """Gives memory until so many bytes are out."""

    def __init__(self, most: int) -> None:
        self.left, self.asked = most, list[int]()

    def __call__(self, count: int) -> memoryview | None:
        self.asked.append(count)
        if count > self.left:
            return None
        self.left -= count
        return memoryview(bytearray(count))


@settings(max_examples=25, deadline=None)  # memory is faulted in
@given(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=6), st.integers(0, 5))
def test_an_arena_takes_pinned_memory_as_long_as_there_is_any(wanted: list[int], blocks: int) -> None:
    pin = Given(blocks * BLOCK)
    arena = Arena(pin=pin, budget=64 * BLOCK)
    held: list[int] = []
    for _ in range(2):
        arena.reset()
        views = [arena.take(count) for count in wanted]
        for n, (view, count) in enumerate(zip(views, wanted, strict=True)):
            assert len(view) == count
            view[:1] = view[-1:] = bytes([n])
        assert [view[0] for view in views] == list(range(len(wanted))), "no two copies share memory"
        held.append(arena.held)
    assert held[0] == held[1], "the next save takes the same memory again"
    assert all(size & (size - 1) == 0 for size in pin.asked)
    refused = [size for size in pin.asked if size > blocks * BLOCK]
    assert len(refused) <= 1, "memory that was refused isn't asked for again"


def test_pinned_memory_stays_in_the_budget() -> None:
    pin = Given(100 * BLOCK)
    arena = Arena(pin=pin, budget=3 * BLOCK)
    arena.ready(3 * BLOCK)
    assert arena.held <= 3 * BLOCK
    with pytest.raises(Short):
        arena.take(4 * BLOCK)
    assert sum(pin.asked) <= 3 * BLOCK, "what is rounded up to a power of two must fit as well"


def test_memory_that_is_still_being_written_to_is_handed_out_by_nobody() -> None:
    arena, order = Arena(), list[str]()
    arena.take(10)
    arena.landing(lambda: order.append("landed"))
    arena.reset()
    order.append("reset")
    arena.landing(lambda: order.append("landed"))
    arena.release()
    order.append("released")
    arena.reset()
    assert order == ["landed", "reset", "landed", "released"]
