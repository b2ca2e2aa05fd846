"""Memory that is there before it is needed, without anybody standing still for it."""

from __future__ import annotations

import mmap
import sys
import threading

import pytest

from lastgood.store import pages

SIZE = 64 << 20


def resident(memory: mmap.mmap) -> int:
    """Bytes of it that are there, by the system's own account of the process (proc(5), smaps)."""
    import numpy as np

    address, inside, count = np.frombuffer(memory, np.uint8).ctypes.data, False, 0
    with open("/proc/self/smaps", encoding="ascii") as lines:
        for line in lines:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(part, 16) for part in first.split("-"))
                inside = begin <= address < end
            elif inside and first == "Rss:":
                count = int(line.split()[1]) << 10
    return count


@pytest.mark.skipif(sys.platform != "linux", reason="madvise(2) of Linux")
def test_only_what_is_asked_for_is_faulted_in() -> None:
    memory = pages.mapped(SIZE)
    memory[:5] = b"first"
    begin = SIZE // 2
    if not pages.fault_in(memory, begin, SIZE // 4):
        pytest.skip("a kernel from before 5.14")
    assert SIZE // 4 <= resident(memory) <= SIZE // 2
    assert memory[:5] == b"first"
    assert memory[begin : begin + 5] == bytes(5)
    memory.close()  # which is refused where somebody still holds on to it


@pytest.mark.skipif(sys.platform != "linux", reason="madvise(2) of Linux")
def test_the_interpreter_is_free_while_memory_is_faulted_in() -> None:
    """No thread is made to yield here, so another one only runs where the call itself lets it."""
    memory, order, waiting = pages.mapped(16 * SIZE), list[str](), threading.Event()

    def fault() -> None:
        waiting.wait()
        there = pages.fault_in(memory, 0, 16 * SIZE)
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
