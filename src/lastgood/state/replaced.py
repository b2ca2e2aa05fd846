"""Functions of libraries, replaced for as long as one of their calls lasts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Change = tuple[str, str, Callable[[Any], Any]]
"""Module, name of the function in it (or of a class and its method), and what makes another one of it."""


@contextmanager
def replaced(changes: Iterable[Change]) -> Iterator[None]:
    """While active. What isn't imported, or isn't there in this version, is left out.

    All threads see it: each replacement has to pass on the calls that it isn't meant for.
    """
    originals = []
    try:
        for module_name, path, wrap in changes:
            *kind, attribute = path.split(".")
            owner: Any = sys.modules.get(module_name)
            for name in kind:
                owner = getattr(owner, name, None)
            original = getattr(owner, attribute, None)
            if owner is not None and original is not None:
                originals.append((owner, attribute, original))
                setattr(owner, attribute, wrap(original))
        yield
    finally:
        for owner, attribute, original in reversed(originals):
            setattr(owner, attribute, original)
