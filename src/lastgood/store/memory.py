"""Memory that a copy of a state is kept in, used again by every save; and how much of it there is to have."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count as counted
from pathlib import Path

from lastgood.store import pages
from lastgood.store.together import together

BLOCK = 16 << 20
"""Bytes (16 MiB) taken from the system at least."""
ALIGN = 64
"""Every copy begins at a multiple of so many bytes."""
SLICE = 2 << 20
"""Bytes (2 MiB, a large page) faulted in by one call: nobody else gets memory from the system meanwhile."""
FAULTING = 2
"""Threads that do so. A training that uses every core is as slow as the core that is held up most: what two of them
share costs it half of the time."""


class Short(Exception):
    """There isn't so much memory to have."""


@dataclass(slots=True)
class _Block:
    memory: mmap.mmap | memoryview
    used: int = 0
    number: int = field(default_factory=counted().__next__)  # that no other block ever has


Spot = tuple[tuple[int, int], ...]
"""How much of which blocks is handed out."""

Pin = Callable[[int], "memoryview | None"]
"""Gives so many bytes of memory of a better kind; None where there is none to be had."""


@dataclass(slots=True)
class Arena:
    """budget: bytes that it may hold; None: three quarters of what is free when it grows.

    used: bytes handed out since `reset`. pin: where its blocks come from, as long as it gives any; it is asked for
    powers of two alone, which is what such memory is rounded up to. Not for several threads at once.
    """

    budget: int | None = None
    used: int = 0
    pin: Pin | None = None
    _blocks: list[_Block] = field(default_factory=list)
    _under_way: list[Callable[[], object]] = field(default_factory=list)
    _laid: dict[Spot, tuple[object, Spot, int]] = field(default_factory=dict)  # since the last reset
    _before: dict[Spot, tuple[object, Spot, int]] = field(default_factory=dict)  # between the two last ones

    @property
    def held(self) -> int:
        """Bytes taken from the system."""
        return sum(len(block.memory) for block in self._blocks)

    def ready(self, count: int, *, until: Callable[[], object] = bool) -> None:
        """Hold at least `count` bytes, faulted in: the first copy into fresh memory is four times as slow.

        until: asked whether somebody waits for it, who then gets it as far as it is. Raises Short.
        """
        missing = count - self.held
        if missing > 0:
            for size in (missing,) if self.pin is None else powers(missing):
                self._grow(size, until)

    def landing(self, landed: Callable[[], object]) -> None:
        """Somebody else is still writing to what was taken: nothing is handed out anew before `landed` returns."""
        self._under_way.append(landed)

    def take(self, count: int) -> memoryview:
        """So many bytes, writable, until the next `reset`. Raises Short."""
        size = -(-max(count, 1) // ALIGN) * ALIGN
        block = next((b for b in self._blocks if len(b.memory) - b.used >= size), None) or self._grow(size)
        begin = block.used
        block.used += size
        self.used += count
        return memoryview(block.memory)[begin : begin + count]

    def keep(self, data: memoryview) -> memoryview:
        """A copy. Raises Short."""
        copy = self.take(len(data))
        copy[:] = data
        return copy

    @property
    def spot(self) -> Spot:
        """Where the next bytes come from."""
        return tuple((block.number, block.used) for block in self._blocks)

    def recall(self) -> object:
        """What was laid out from here on, in the same memory, before the last `reset`; None: nothing."""
        return self._before.get(self.spot, (None,))[0]

    def again(self) -> None:
        """Take what was taken then for what `recall` returns."""
        begin = self.spot
        known = self._laid[begin] = self._before[begin]
        self.used += known[2]
        for block, (_, used) in zip(self._blocks, known[1], strict=True):
            block.used = used

    def remember(self, what: object, begin: Spot, used: int) -> None:
        """It lies in what was handed out since `spot` was `begin`, and `used` what it was then."""
        self._laid[begin] = what, self.spot, self.used - used

    def reset(self) -> None:
        """All that was handed out may be handed out again."""
        self._landed()
        self.used = 0
        self._before, self._laid = self._laid, {}
        for block in self._blocks:
            block.used = 0

    def release(self) -> None:
        """Give everything back to the system, as soon as nobody looks at it any more."""
        self._landed()
        self.used, self._blocks = 0, []
        self._before, self._laid = {}, {}

    def _landed(self) -> None:
        while self._under_way:
            self._under_way.pop()()

    def _grow(self, count: int, until: Callable[[], object] = bool) -> _Block:
        least, room = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE, self._room()
        if room is not None and least > room:  # what is held in pieces that are too small goes first
            self._blocks, self._before = [block for block in self._blocks if block.used], {}
            room = self._room()
        size = max(least, -(-count // BLOCK) * BLOCK)
        if room is not None and size > room:
            size = max(least, int(room) // mmap.PAGESIZE * mmap.PAGESIZE)
        if room is not None and size > room:
            raise Short
        block = _Block(self._pinned(least, room) or _mapped(size, until))
        self._blocks.append(block)
        return block

    def _pinned(self, least: int, room: float | None) -> memoryview | None:
        size = max(BLOCK, 1 << (least - 1).bit_length())
        if self.pin is None or (room is not None and size > room):
            return None
        memory = self.pin(size)
        if memory is None:  # it isn't asked again: each refusal may take its time
            self.pin = None
        return memory

    def _room(self) -> float | None:
        """Bytes that may still be taken; None: nobody knows."""
        if self.budget is not None:
            return self.budget - self.held
        free = available()
        return None if free is None else free * 3 / 4


def powers(count: int) -> tuple[int, ...]:
    """Powers of two, the largest first, that are `count` together, or up to an eighth more; none under BLOCK."""
    found: list[int] = []
    while count > 0:
        last = len(found) == 3 or count <= BLOCK
        found.append(max(BLOCK, 1 << ((count - 1).bit_length() if last else count.bit_length() - 1)))
        count -= found[-1]
    return tuple(found)


def _mapped(size: int, until: Callable[[], object]) -> mmap.mmap:
    """Raises Short."""
    try:
        memory = pages.mapped(size, large=True)
    except (OSError, ValueError, OverflowError, MemoryError):
        raise Short from None
    # Not in data workers that are forked later: a page that the next save writes to would be copied for each of them.
    pages.advise(memory, "MADV_DONTFORK")
    waiting = deque(range(0, size, SLICE))

    def fault_in() -> None:
        while not until():
            try:
                begin = waiting.popleft()
            except IndexError:
                return
            if not pages.fault_in(memory, begin, min(SLICE, size - begin)):
                waiting.clear()

    together([fault_in] * FAULTING, limit=FAULTING)
    return memory


def available() -> int | None:
    """Bytes that can still be had without pushing anything out: of the machine, and of this process's control group.

    None where the system doesn't say.
    """
    known = [size for size in (_machine(), _group()) if size is not None]
    return min(known, default=None)


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _group() -> int | None:
    """What the limits of control groups, of either version, leave. A page cache that can go counts as free."""
    left = []
    for folder, names in _groups():
        try:
            limit, used = (int((folder / name).read_text()) for name in names)
            lines = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # "max": no limit
            continue
        stat = dict(line.split()[:2] for line in lines if len(line.split()) >= 2)
        cache = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
        left.append(max(0, limit - used + (int(cache) if cache.isdigit() else 0)))
    return min(left, default=None)


def _groups() -> list[tuple[Path, tuple[str, str]]]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if number == "0" and not kinds:
            top, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            top, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = top / path.lstrip("/")
        # In a container the path is the machine's, and its own group is at the top.
        found += [(folder, names) for folder in (*([inner, *inner.parents] if inner.is_dir() else []), top)]
    return [(folder, names) for folder, names in found if folder.is_relative_to("/sys/fs/cgroup")]
