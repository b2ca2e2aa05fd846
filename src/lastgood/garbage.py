"""Python's search for garbage, put off while thousands of small objects are made that are all needed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No search inside. One of them walks through everything that the program has imported: beside transformers 0.4 s,
    which is half of a restore, or ten times what training waits for a save.

    Also as a decorator. Nothing is lost: what has no name any more goes at once, as ever, and rings of objects later.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
