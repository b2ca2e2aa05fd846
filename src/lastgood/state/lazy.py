"""A state that is copied while training goes on, as long as nothing changes it; and the proof that nothing did.

Weights and the state of optimizers change in an optimizer's step and nowhere else, in most programs. So their copy can
be made during the next forward and backward pass: by the thread that writes, and by the one that trains when it comes
to its next step. What changes them elsewhere is found out before anything is committed: a weight's bytes are hashed
when they are staged, and the copy has to have that hash. See docs/decisions/023.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

import torch

from lastgood.format.tensors import Tensor
from lastgood.repo.draft import Changed, Copied, Eager, Source
from lastgood.state.guarded import Guarded
from lastgood.state.layout import Large, Layout
from lastgood.state.match import some
from lastgood.state.tensors import Named, to_bytes
from lastgood.store.memory import Arena
from lastgood.store.together import together

SMALL = 1 << 15
"""Bytes (32 KiB) below which a tensor is copied at once: to guard it takes as long."""
PIECE = 1 << 20
"""Bytes (1 MiB) that are copied in one go: a step waits for no more than that of what another thread has begun."""

APART = 1 << 24
"""Bytes (16 MiB) from which on it is worth its while to start threads that note or copy them."""
HANDS = 8
"""Threads that note what the tensors are, or copy them; as many as there are cores, if those are fewer."""


@dataclass(frozen=True, slots=True)
class Pace:
    """small: bytes below which a tensor is copied at once; piece: that are copied in one go. wait: called by whoever
    writes before each piece, with the number of pieces that are left.
    """

    small: int = SMALL
    piece: int = PIECE
    wait: Callable[[int], object] | None = None


Place = tuple[int, int]
"""Address and number of bytes of a tensor that lies in the host's memory."""


@dataclass(slots=True, eq=False)
class Lazy:
    """The window of one save, see `lastgood.repo.draft.Window`.

    weights, state: where the tensors lie that only an optimizer changes: what it trains, and what it keeps of it. own:
    those tensors by `id`; None if nothing of the last save is to be guarded again.
    """

    weights: Container[Place]
    state: Container[Place]
    own: Container[int] | None = field(default=None, kw_only=True)
    pace: Pace = field(default_factory=Pace)
    waited: float = 0.0
    _guarded: list[Guarded] = field(default_factory=list)
    _todo: deque[tuple[int, Guarded, int, int]] = field(default_factory=deque)  # pieces, with their numbers
    _copied: set[int] = field(default_factory=set)
    _pieces: int = -1
    _done: threading.Event = field(default_factory=threading.Event)
    _closing: threading.Lock = field(default_factory=threading.Lock)
    _owner: int = field(default_factory=os.getpid)

    def stage(self, tensors: Iterable[Tensor], arena: Arena) -> Source:
        """Those that are in `weights` or `state` later, all others now. Raises Short, NotSupported, UsageError."""
        if not isinstance(tensors, Named):
            return Eager().stage(tensors, arena)
        layout, before = self._laid_out(tensors, arena), len(self._guarded)
        layout.copy()
        for name, large in layout.large.items():
            self._take(tensors.tensors[name], large, layout.keeps)
        # Training waits, so every core is free; the large ones first, for the last one alone keeps all waiting.
        weights = [one for one in self._guarded[before:] if one.weight]
        if sum(len(one.target) for one in weights) >= APART:
            weights.sort(key=lambda one: -len(one.target))
            together([one.note for one in weights], limit=min(HANDS, os.cpu_count() or 1))
        for one in self._guarded[before:]:
            if one.noted is None:
                one.note()
        return Copied(layout.entries)

    def _laid_out(self, named: Named, arena: Arena) -> Layout:
        """As at the last save, if these are the same tensors."""
        begin, used, layout = arena.spot, arena.used, arena.recall()
        if isinstance(layout, Layout) and layout.still(named):
            arena.again()
        else:
            layout = Layout.of(named.tensors, arena, self.pace.small - 1)
            arena.remember(layout, begin, used)
        return layout

    def _take(self, tensor: torch.Tensor, large: Large, stays: bool) -> None:
        """Note what it is and copy it later, or copy it now."""
        guard = large.guard
        if guard is not None and self._still_own(guard, tensor):
            guard.again()
            self._guarded.append(guard)
            return
        large.guard = None
        where = (tensor.data_ptr(), len(large.target)) if large.plain and len(large.target) >= self.pace.small else None
        weight = where in self.weights
        if where is None or not (weight or where in self.state):
            large.entry.data[:] = to_bytes(large.entry.name, tensor).data
            return
        guard = Guarded.of(large.entry.name, tensor, large.target, weight=weight, stays=stays)
        self._guarded.append(guard)
        if stays:
            large.guard = guard

    def _still_own(self, guard: Guarded, tensor: torch.Tensor) -> bool:
        """Of a weight nobody needs to ask, for all of it is proven, and it may be another name of what is trained."""
        return self.own is not None and (guard.weight or id(tensor) in self.own)

    def begin(self) -> None:
        size = self.pace.piece
        pieces = [(one, at) for one in self._guarded for at in range(0, len(one.target), size)]
        self._todo += [(n, one, at, min(at + size, len(one.target))) for n, (one, at) in enumerate(pieces)]
        self._pieces = len(pieces)
        if not self._pieces:
            self._close()

    @property
    def open(self) -> bool:
        """Whether the live state is still needed. False in a forked child, which has no copy of the copy."""
        return self._pieces >= 0 and os.getpid() == self._owner and not self._done.is_set()

    def finish(self) -> None:
        if not self.open:
            return
        started = time.perf_counter()
        while not self._done.is_set():
            self._copy_one()
        self.waited += time.perf_counter() - started

    def fill(self) -> None:
        # As for the notes, and beside a training that uses every core: it is as slow as the core that is held up most.
        many = sum(len(one.target) for one in self._guarded) >= APART
        hands = min(HANDS, os.cpu_count() or 1) if many else 1
        together([self._fill] * hands, limit=hands)

    def _fill(self) -> None:
        while not self._done.is_set():
            if self.pace.wait is not None:
                self.pace.wait(len(self._todo))
            self._copy_one()

    def _copy_one(self) -> None:
        """Or wait for those that other threads have begun. What is interrupted is left to whoever comes next."""
        try:
            piece = self._todo.popleft()
        except IndexError:
            if not self._all_copied():
                self._done.wait(0.05)
            return
        number, one, begin, end = piece
        try:
            one.copy(begin, end)
            self._copied.add(number)
        except BaseException:
            if number not in self._copied:
                self._todo.append(piece)
            raise
        self._all_copied()

    def _all_copied(self) -> bool:
        """Whether that is so; then the window is closed."""
        if len(self._copied) < self._pieces:
            return False
        self._close()
        return True

    def _close(self) -> None:
        """Once: of two threads that see the last pieces through, the slower one comes when training has gone on."""
        with self._closing:
            if not self._done.is_set():
                for one in self._guarded:
                    one.close()
                self._done.set()

    def prove(self) -> None:
        names = [one.name for one in self._guarded if not one.proven()]
        self._guarded = []  # nothing here keeps the memory of a copy that is over
        if names:
            raise Changed(f"something outside of any optimizer's step changed {some(names)} while it was being copied")
