"""Python's search for garbage is put off, and taken up again whatever happens."""

from __future__ import annotations

import gc
import threading

import pytest

from lastgood.garbage import uncollected


def test_it_is_as_before_behind_it() -> None:
    @uncollected()
    def fails() -> None:
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert gc.isenabled()


def test_who_has_turned_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_threads_leave_it_on(order: tuple[int, int]) -> None:
    inside, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def work(number: int) -> None:
        with uncollected():
            inside[number].set()
            leave[number].wait(60)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for number in (0, 1):
        threads[number].start()
        assert inside[number].wait(60)
    for number in order:
        leave[number].set()
        threads[number].join()
    assert gc.isenabled()
