"""One writer per run: a lock that the kernel releases when its holder dies, and the name of the holder beside it."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from lastgood.errors import RunLocked
from lastgood.repo import leases
from lastgood.repo.layout import boot, hidden
from lastgood.store import fs, local

CARD = "lock.json"
"""What the holder says of itself."""
FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE = 15.0
"""Seconds to wait for a holder that is dead: its data workers live on for a few seconds and may hold the lock."""


class RunLock:
    """Not reentrant. `still_held` is asked before every commit, because a takeover doesn't interrupt the holder."""

    def __init__(self, root: Path) -> None:
        self._file = hidden(root, "lock")
        self._card = hidden(root, CARD)
        self._root = root
        self._nonce = fs.system.token(8)
        self._lock = _file_lock(self._file)

    def acquire(self, *, takeover: bool = False, anonymous: bool = False) -> None:
        """Raises RunLocked at once if a living process holds the run. takeover: fence that process off instead.

        anonymous: go on without the card that names the holder where a full disk has no room for it, so that space
        can be freed there.
        """
        try:
            local.make_dirs(self._file.parent)
        except OSError as error:
            if not anonymous or error.errno not in FULL or local.size(self._file) is not None:
                raise
            return  # nobody has ever written here, and nobody can
        deadline = time.monotonic() + PATIENCE
        while not self._take(takeover, anonymous):
            holder = self.holder()
            if time.monotonic() > deadline or not _dead(holder):
                raise RunLocked(
                    f"{self._root} is being written by {described(holder)}",
                    hint="wait for it or stop it; lastgood.manage(trainer, takeover=True) fences it off",
                )
            time.sleep(0.1)

    def _take(self, takeover: bool, anonymous: bool) -> bool:
        """False if somebody has it. The lock and the card as one: who has one of them without the other has nothing."""
        with leases.alone(self._root):
            if takeover:
                # A new file: the old holder keeps its lock on one that no longer has a name.
                local.unlink(self._file)
                self._lock = _file_lock(self._file)
            try:
                self._lock.acquire()
            except Timeout:
                return False
            try:
                self._sign(anonymous)
            except BaseException:
                self._lock.release(force=True)
                raise
        return True

    def _sign(self, anonymous: bool) -> None:
        card = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": _start_time(os.getpid()),
            "boot": boot(),
            "since": time.time(),
            "command": os.path.basename(sys.argv[0]) if sys.argv else "",
            "nonce": self._nonce,
        }
        try:
            local.replace(self._card, f"{json.dumps(card)}\n".encode())
        except OSError as error:
            if not anonymous or error.errno not in FULL:
                raise

    def release(self) -> None:
        """Let the next one in. A card that can't be removed stays: without the lock it means nothing."""
        if not self._lock.is_locked:
            return
        try:
            # Alone, else the card of one that takes over just now could go.
            with suppress(OSError), leases.alone(self._root):
                if self.still_held():
                    local.unlink(self._card)
        finally:
            self._lock.release(force=True)

    def still_held(self) -> bool:
        """False after another process took over. Raises OSError where the card can't be read: then nobody knows."""
        return self._lock.is_locked and self._read().get("nonce") == self._nonce

    def holder(self) -> dict[str, Any]:
        """What the holder wrote about itself; {} if that can't be read."""
        try:
            return self._read()
        except OSError:
            return {}

    def _read(self) -> dict[str, Any]:
        try:
            card = json.loads(local.read(self._card, 1 << 16))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return card if isinstance(card, dict) else {}

    def held_by_another(self) -> bool:
        """Whether somebody says so who isn't provably dead. Changes nothing."""
        holder = self.holder()
        return bool(holder) and not _dead(holder)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def at_work(root: Path) -> dict[str, Any]:
    """What the process that holds the run wrote about itself; {} if nobody does, as far as that can be told.

    Looks without taking the lock for a moment: a training that starts just then would find it taken, and give up.
    """
    holder = RunLock(root).holder()
    return {} if not holder or _dead(holder) else holder


def described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder.get("since", 0))))
    except (TypeError, ValueError, OverflowError, OSError):  # written by somebody else
        since = "an unknown time"
    return f"process {holder.get('pid')} ({holder.get('command')}) on {holder.get('host')} since {since}"


def _dead(holder: dict[str, Any]) -> bool:
    """Whether the holder provably ended: same machine, and nobody with its number and start time."""
    if not holder or holder.get("host") != socket.gethostname():
        return False
    if holder.get("boot") != boot():
        return True
    pid = holder.get("pid")
    if not isinstance(pid, int) or os.name == "nt":  # asking with signal 0 would interrupt it there
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return holder.get("start") != _start_time(pid)


def _start_time(pid: int) -> str | None:
    """Clock ticks since boot (field 22 of /proc/PID/stat); None for a zombie, and where there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _file_lock(path: Path) -> BaseFileLock:
    """Of the whole process: a loop may restore in one thread and step in another."""
    return FileLock(path, timeout=0, thread_local=False)
