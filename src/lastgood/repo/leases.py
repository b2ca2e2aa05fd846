"""Leases: a checkpoint that is being evaluated stays as it is until the evaluation is done, or its process is dead.

A lease is a small file that its holder renews. It is never ended by comparing the clocks of two machines, and never by
one clock that was set: on the machine of its holder the time since boot counts, elsewhere how long a process that goes
on watching sees no renewal. Only a process that looks once and goes has nothing but the time of day; it gives an hour.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lastgood.errors import UsageError
from lastgood.repo.layout import boot, hidden
from lastgood.repo.read import id_at
from lastgood.store import fs, local

if TYPE_CHECKING:
    import threading

FOLDER = "leases"
GRACE = 3600.0
"""Seconds (1 h) that the clocks of two machines may differ by where nothing but the time of day is known."""
SHORTEST, LONGEST = 1.0, 7 * 86400.0

_NAME = re.compile(r"([0-9a-f]{16})\.[0-9a-f]{8}")


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """One file. until: seconds since 1970 on its holder's clock; uptime: the same as seconds since that machine's boot.

    seconds: its length. beat: how often it was renewed.
    """

    host: str
    pid: int
    until: float
    seconds: float
    boot: str | None = None
    uptime: float = 0.0
    beat: int = 0

    @property
    def reason(self) -> str:
        """Why its checkpoint stays."""
        try:
            end = time.strftime("%H:%M", time.localtime(self.until))
        except (ValueError, OverflowError, OSError):  # unreadable, or written by somebody else
            end = "an unknown time"
        return f"being evaluated by {self.host[:100]!r}:{self.pid} until {end}".replace("'", "")


UNREADABLE = Lease(host="unknown", pid=0, until=math.inf, seconds=LONGEST)
"""What stands for a lease that is there and can't be read: better too much on disk than too little."""


@dataclass(slots=True)
class Sightings:
    """What a process that goes on saw of the leases, by its own monotonic clock."""

    seen: dict[str, tuple[Lease, float]] = field(default_factory=dict)

    def unchanged(self, name: str, lease: Lease) -> float:
        """Seconds since when it looks like this."""
        before = self.seen.get(name)
        if before is None or before[0] != lease:
            before = self.seen[name] = (lease, time.monotonic())
        return time.monotonic() - before[1]


@dataclass(slots=True)
class Held:
    """A lease of ours, renewed in the background until it is dropped."""

    path: Path
    lease: Lease
    done: threading.Event
    turn: threading.RLock
    """Whoever renews and whoever drops, one after the other: what was dropped doesn't come back, not even half."""

    def drop(self) -> None:
        """The checkpoint is let go of. What can't be removed now expires. In a forked process nothing happens."""
        if os.getpid() != self.lease.pid:
            return
        self.done.set()
        with self.turn, suppress(OSError):
            local.unlink(self.path)

    def renew(self) -> None:
        """Raises OSError."""
        with self.turn:
            if not self.done.is_set():
                self.lease = _from_now(self.lease.seconds, self.lease.beat + 1)
                local.replace(self.path, _content(self.lease))

    def go_on(self) -> None:
        """Renew it three times in its length; where that fails, the next time is soon enough."""
        while not self.done.wait(self.lease.seconds / 3):
            with suppress(OSError):
                self.renew()


def take(root: Path, id: str, name: str, seconds: float) -> Held | None:
    """Hold a checkpoint (its id and its directory's name); None if it is gone. Raises OSError, UsageError."""
    import threading  # what only looks starts faster without

    check(seconds)
    local.make_dirs(hidden(root, FOLDER))
    path = hidden(root, FOLDER, f"{id}.{fs.system.token(4)}")
    held = Held(path, _from_now(float(seconds), 0), threading.Event(), threading.RLock())
    with alone(root):  # nobody is between "nobody holds it" and its deletion
        local.replace(held.path, _content(held.lease))
        if id_at(root / name) != id:
            held.drop()
            return None
    threading.Thread(target=held.go_on, name=f"lease {name}", daemon=True).start()
    return held


def check(seconds: object) -> None:
    """Raises UsageError for what can't be the length of a lease."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not SHORTEST <= seconds <= LONGEST:
        raise UsageError(f"a lease is {SHORTEST:g} to {LONGEST:g} seconds long, not {seconds!r}")


def in_force(root: Path, sightings: Sightings | None = None) -> dict[str, str]:
    """checkpoint id -> who holds it. sightings: of a process that goes on; without, the time of day has to do."""
    found: dict[str, str] = {}
    for name, lease in _leases(root):
        if lease is not None and not expired(name, lease, sightings):
            found.setdefault(name[:16], lease.reason)
    return found


def expired(name: str, lease: Lease, sightings: Sightings | None = None) -> bool:
    """Whether its holder failed to renew it; rather too late than too early."""
    if lease.boot is not None and lease.boot == boot():
        return time.monotonic() > lease.uptime
    if sightings is not None:
        return sightings.unchanged(name, lease) > lease.seconds
    return time.time() > lease.until + max(GRACE, lease.seconds)


def sweep(root: Path, sightings: Sightings | None = None) -> None:
    """Remove the expired ones, and what killed holders left half-written. What can't be removed harms nobody."""
    folder, known = hidden(root, FOLDER), set()
    if folder.is_symlink():  # what is behind a link isn't ours to delete
        return
    for name, lease in _leases(root):
        if lease is None or expired(name, lease, sightings):
            with suppress(OSError):
                local.unlink(folder / name)
        else:
            known.add(name)
    for name in local.names(folder):
        if name.startswith(".") and not local.torn(name, known):
            with suppress(OSError):
                local.unlink(folder / name)


@contextmanager
def alone(root: Path, patience: float = 10.0) -> Iterator[bool]:
    """Whoever takes a lease and whoever deletes, publishes or takes the run over, one after the other.

    Gives whether the lock could be had. It is held for moments, never while data is written.

    patience: seconds to wait for it. Where no lock can be made (a full disk: what is deleted makes the room), or
    somebody was stopped while holding it, it goes on without: who takes a lease looks whether the checkpoint is there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(hidden(root, f"{FOLDER}.lock"), timeout=patience)
    try:
        lock.acquire()
    except (OSError, Timeout):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _leases(root: Path) -> list[tuple[str, Lease | None]]:
    """(name of its file, what it says); None for what isn't a lease, which is never half of one: it appears whole."""
    found: list[tuple[str, Lease | None]] = []
    for name in local.names(hidden(root, FOLDER)):
        if _NAME.fullmatch(name):
            try:
                data = local.read(hidden(root, FOLDER, name), 1 << 16)
                lease = msgspec.json.decode(data, type=Lease)
                found.append((name, lease if SHORTEST <= lease.seconds <= LONGEST else None))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):  # else it was dropped meanwhile
                    found.append((name, UNREADABLE))
            except (msgspec.MsgspecError, RecursionError):
                found.append((name, None))
    return found


def _from_now(seconds: float, beat: int) -> Lease:
    import socket

    return Lease(
        host=socket.gethostname(), pid=os.getpid(), until=round(time.time() + seconds, 3), seconds=seconds,
        boot=boot(), uptime=round(time.monotonic() + seconds, 3), beat=beat,
    )  # fmt: skip


def _content(lease: Lease) -> bytes:
    return f"{json.dumps(msgspec.to_builtins(lease))}\n".encode()
