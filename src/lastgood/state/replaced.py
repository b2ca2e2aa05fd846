"""Functions of libraries, replaced for as long as one of their calls lasts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Change = tuple[str, str, Callable[[Any], Any]]
"""Module, name of the function in it, and what makes another one of it."""


@contextmanager
def replaced(changes: Iterable[Change]) -> Iterator[None]:
    """While active. What isn't imported, or isn't there in this version, is left out.

    All threads see it: each replacement has to pass on the calls that it isn't meant for.
    """
    originals = []
    try:
        for module_name, attribute, wrap in changes:
            module = sys.modules.get(module_name)
            original = getattr(module, attribute, None)
            if module is not None and original is not None:
                originals.append((module, attribute, original))
                setattr(module, attribute, wrap(original))
        yield
    finally:
        for module, attribute, original in reversed(originals):
            setattr(module, attribute, original)
