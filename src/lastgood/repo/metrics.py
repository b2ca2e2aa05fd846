"""Values for a checkpoint. They may arrive long after the save and from another process, so they lie beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lastgood.errors import UsageError
from lastgood.model import finite
from lastgood.repo.journal import lines
from lastgood.repo.layout import HIDDEN, hidden, own, plain
from lastgood.store import local

LIMIT = 16 << 20
"""Largest file of metrics that is read (16 MiB)."""

_ID = re.compile(r"[0-9a-f]{16}")


def record(root: Path, id: str, step: int, values: Mapping[str, object]) -> None:
    """Add metrics to the checkpoint with this id, durably, from any process and host. Raises OSError.

    The line is one write at the end of the file, which no other process on this machine gets between. The lock is for
    two machines: over NFS a write "at the end" goes to where the end was when the file was last looked at.
    """
    plain = {name: _plain(value) for name, value in values.items()}
    own(root)
    local.make_dirs(hidden(root, "metrics"))
    line = json.dumps({"step": step, "metrics": plain}, allow_nan=False)
    with _alone(root):
        local.append(hidden(root, "metrics", f"{id}.jsonl"), f"{line}\n".encode(), sync=True)
    with suppress(OSError):  # a second value in a file that is there would go unseen by remembered listings
        local.touch(hidden(root, "metrics"))


def checked(name: str, value: object) -> float:
    """The value that somebody gives a metric by hand; NaN is one, and ranks nowhere. Raises UsageError."""
    if not name or not name.isprintable() or len(name) > 200 or any(c.isspace() for c in name):
        raise UsageError(f"{name[:100]!r} can't be the name of a metric", hint="no spaces: mmlu=0.61")
    if hasattr(value, "item"):  # numpy scalars and 0-dim tensors
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{name}={value!r} is not a number", hint=f"{name}=0.61")
    try:
        return float(value)
    except OverflowError:
        raise UsageError(f"{name} is a number beyond all floats") from None


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Nobody else adds metrics meanwhile. Where there are no locks, or one is stopped while it holds it: without."""
    from filelock import FileLock, Timeout  # reading needs none of it

    lock = FileLock(hidden(plain(root), "metrics.lock"), timeout=2)
    try:
        lock.acquire()
    except (OSError, Timeout):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def read(root: Path, id: str, *, sure: bool = False) -> dict[str, float]:
    """name -> value, the latest of each; NaN and infinity are kept as such (and rank nowhere). sure: see `records`."""
    if not _ID.fullmatch(id):
        return {}
    found: dict[str, float] = {}
    for line in lines(f"{root}/{HIDDEN}/metrics/{id}.jsonl", LIMIT, sure=sure):
        values = line.get("metrics")
        for name, value in values.items() if isinstance(values, dict) else ():
            if value in ("nan", "inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                found[name] = float(value)
    return found


def _plain(value: object) -> object:
    if hasattr(value, "item"):  # numpy scalars and 0-dim tensors
        value = value.item()
    if finite(value) is not None:
        return value
    return str(float(value)) if isinstance(value, float) else str(value)
