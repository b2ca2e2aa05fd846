"""Memory that is there before it is needed, without anybody standing still for it."""

from __future__ import annotations

import mmap
import sys
import threading

import numpy as np
import pytest

from lastgood.store import memory, pages
from lastgood.store.memory import Arena

SIZE = 64 << 20


def resident(part: mmap.mmap | memoryview) -> int:
    """Bytes of it that are there, by what the system says of each page (proc(5), pagemap)."""
    view = np.frombuffer(part, np.uint8)
    first, last = view.ctypes.data // mmap.PAGESIZE, -(-(view.ctypes.data + len(view)) // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(first * 8)
        told = np.frombuffer(file.read((last - first) * 8), np.uint64)
    return int((told >> np.uint64(63)).sum()) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="madvise(2) of Linux")
def test_only_what_is_asked_for_is_faulted_in() -> None:
    part = pages.mapped(SIZE)
    part[:5] = b"first"
    begin = SIZE // 2
    if not pages.fault_in(part, begin, SIZE // 4):
        pytest.skip("a kernel from before 5.14")
    assert SIZE // 4 <= resident(part) <= SIZE // 2
    assert part[:5] == b"first"
    assert part[begin : begin + 5] == bytes(5)
    part.close()  # which is refused where somebody still holds on to it


@pytest.mark.skipif(sys.platform != "linux", reason="madvise(2) of Linux")
def test_an_arena_has_its_memory_until_somebody_waits_for_it() -> None:
    if not pages.fault_in(pages.mapped(1), 0, 1):
        pytest.skip("a kernel from before 5.14")
    whole, part, asked = Arena(budget=SIZE), Arena(budget=SIZE), list[int]()

    def waits() -> bool:
        asked.append(1)
        return len(asked) > 8

    whole.ready(SIZE)
    assert resident(whole.take(SIZE)) == SIZE
    part.ready(SIZE, until=waits)
    assert 0 < resident(part.take(SIZE)) < SIZE
    assert len(asked) < 8 + 2 * memory.FAULTING


@pytest.mark.skipif(sys.platform != "linux", reason="madvise(2) of Linux")
def test_the_interpreter_is_free_while_memory_is_faulted_in() -> None:
    """No thread is made to yield here, so another one only runs where the call itself lets it."""
    part, order, waiting = pages.mapped(16 * SIZE), list[str](), threading.Event()

    def fault() -> None:
        waiting.wait()
        there = pages.fault_in(part, 0, 16 * SIZE)
        order.append("there" if there else "never")

    thread = threading.Thread(target=fault)
    thread.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        waiting.set()
        thread.join(0.001)
        order.append("went on")
        thread.join()
    finally:
        sys.setswitchinterval(before)
    if order[-1] == "never":
        pytest.skip("a kernel from before 5.14")
    assert order == ["went on", "there"]
