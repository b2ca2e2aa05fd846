"""Listings of very long runs, remembered in the user's cache directory: nothing is ever written to the run.

A listing counts as unchanged while the run's own files (journal, pins, head, policy), its
directory and every checkpoint's directory have the times that they had. A file cut short
in place changes none of these; `verify` and every resume look at the files themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from lastgood.repo import journal
from lastgood.repo.layout import HIDDEN
from lastgood.store import local

FROM = 500
"""A run with fewer checkpoints is read anew every time."""
VERSION = 2

Listing = tuple[list[dict[str, Any]], dict[str, Any]]


def remembered(root: Path, key: str, read: Callable[[], Listing]) -> Listing:
    """What `read` gives, or gave when the run was as it is now."""
    names = os.listdir(root)
    home = None if len(names) < FROM else _home()
    if home is None:
        return read()
    import msgspec

    state = _state(root, names, key)
    path = home / f"{blake3(os.path.realpath(root).encode()).hexdigest(16)}.log"
    with suppress(OSError, msgspec.MsgspecError, TypeError, ValueError):
        known, rows, head = msgspec.msgpack.decode(path.read_bytes())
        if known == state:
            return rows, head
    rows, head = read()
    if _state(root, os.listdir(root), key) == state:  # nothing was saved in the meantime
        with suppress(OSError, TypeError, ValueError):
            home.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(msgspec.msgpack.encode((state, rows, head)))
            os.replace(temporary, path)
    return rows, head


def count_deleted(root: Path) -> int:
    """How many deletions the journal tells of."""
    try:
        return local.read(root / HIDDEN / journal.NAME, journal.LIMIT).count(b'"event": "deleted"')
    except OSError:
        return 0


def _home() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if os.environ.get("LASTGOOD_CACHE") == "0" or not os.path.isabs(base):
        return None
    return Path(base) / "lastgood"


def _state(root: Path, names: list[str], key: str) -> bytes:
    """A hash over the times of everything that a listing depends on."""
    from lastgood import __version__

    base = os.fspath(root)
    marks: list[Any] = [VERSION, __version__, key, base]
    # Whoever records a metric touches the directory of the metrics.
    for name in ("", "journal.jsonl", "pins.json", "notes.json", "head.json", "run.json", "policy.json", "metrics"):
        marks.append(_mark(os.path.join(base, HIDDEN, name)))
    lstat = os.lstat
    for name in sorted(names):
        try:
            status = lstat(f"{base}/{name}")
        except OSError:  # a run that goes on deletes meanwhile
            marks.append(name)
            continue
        marks += (name, status.st_mtime_ns, status.st_ino)
    return blake3(repr(marks).encode()).digest(16)


def _mark(path: str) -> tuple[int, ...]:
    try:
        status = os.lstat(path)
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_size, status.st_ino)
