"""What is done behind training's back while it goes on: a copy that is made meanwhile, and large files given back in
pieces. The order of the calls is the same each time: the writer stops where whoever trains has its turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lastgood.background import Background
from lastgood.manager import Manager
from lastgood.repo import gc
from lastgood.store import local
from lastgood.store.dissolve import dissolve

from faults.small import content, manager, save

PIECE = 500
"""Bytes that are copied in one go: a tensor of `faults.small` has several such pieces."""
CUT = 900
"""Bytes by which a file is cut shorter."""
THEIRS = 7
"""Pieces, of ten, that the writer leaves to whoever trains: some of the weights, and all of the other file."""


class Meeting:
    """The writer copies all but a few pieces, and waits until whoever trains has done something."""

    def __init__(self, root: Path) -> None:
        self.root, self._held, self._go = root, threading.Event(), threading.Event()

    def wait(self, left: int) -> None:
        """See Pace."""
        if self._go.is_set():
            return
        local.touch(self.root)  # harmless: a call at which the process can be killed, or the copying fail
        if left <= THEIRS:
            self._held.set()
            assert self._go.wait(300), "nobody trains"

    def then(self, made: Manager, act: Callable[[], object]) -> None:
        """Do it when the writer waits, or has failed before; and let it go on."""
        while not self._held.wait(0.01) and not made._writer.wait(0):
            pass
        try:
            act()
        finally:
            self._go.set()


def changed(made: Manager, parts: Collection[Any]) -> None:
    """Training does that."""
    for tensor in parts:
        tensor.fill_(9)


def save_lazily(root: Path) -> None:
    """Copied by the writer, and the rest by whoever trains, who changes all of it then."""

    def step(made: Manager, parts: Collection[Any]) -> None:
        made._window.finish()
        changed(made, parts)

    _save(root, step)


def save_spoilt(root: Path) -> None:
    """Changed before it is copied: there is no checkpoint of it, and another save is due."""
    assert _save(root, changed).owed


def save_and_free(root: Path) -> None:
    """One is deleted and others are stripped, all of it in pieces."""
    with _pieces():
        made = manager(root, last=3, full=1)
        save(made, 4)
        made.close()


def _save(root: Path, step: Callable[[Manager, Collection[Any]], object]) -> Manager:
    import torch

    from lastgood.state.lazy import Lazy, Pace
    from lastgood.state.tensors import named

    meeting, made = Meeting(root), manager(root)
    parts = {name: torch.frombuffer(bytearray(content(4)), dtype=torch.uint8) for name in ("model", "optimizer")}
    places = {name: {(tensor.data_ptr(), tensor.nbytes)} for name, tensor in parts.items()}
    made.background = Background()
    made.stages = lambda: Lazy(places["model"], places["optimizer"], Pace(small=1, piece=PIECE, wait=meeting.wait))
    try:
        save(made, 4, lambda _, part: named({"w": parts[part]}))
        meeting.then(made, lambda: step(made, parts.values()))
        made.settle()
        return made
    finally:
        made.close()


@contextmanager
def _pieces() -> Iterator[None]:
    """Files of a few kilobytes are large."""
    with patch.object(gc, "STEP", CUT), patch.dict(dissolve.__kwdefaults__, step=CUT):
        yield
