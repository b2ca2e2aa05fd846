"""One writer per run: a lock that the kernel releases when its holder dies, and the name of the holder beside it.

A takeover can't interrupt the holder, which may be stopped between a look and an act. So the holder acts through its
*fence*, a directory that the path of every change leads through (`layout.through`); a takeover removes it first.
"""

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
from lastgood.repo import reserve
from lastgood.repo.layout import boot, fence, hidden, is_fence, own, through
from lastgood.repo.run import check_format
from lastgood.store import fs, local

FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE = 15.0
"""Seconds to wait for a holder that is dead: its data workers live on for a few seconds and may hold the lock."""


class RunLock:
    """Not reentrant. `still_held` is asked before every commit, and whatever changes the run goes through `door`.

    door: the run's directory as this writer may name it; after a takeover no call with such a path gets anywhere.
    Where no fence can be made (a full disk), it is the plain path.
    """

    def __init__(self, root: Path) -> None:
        self.door = root
        self._file = hidden(root, "lock")
        self._card = hidden(root, "lock.json")
        self._root = root
        self._nonce = fs.system.token(8)
        self._fence = fence(root, self._nonce)
        self._owner = os.getpid()
        self._lock = _file_lock(self._file)

    def acquire(self, *, takeover: bool = False, anonymous: bool = False) -> None:
        """Raises RunLocked at once if a living process holds the run, Refused where links lead out of it, NewerFormat.

        takeover: fence that process off instead.

        anonymous: go on without the card that names the holder where a full disk has no room for it, so that space
        can be freed there.
        """
        own(self._root)
        check_format(self._root)
        try:
            local.make_dirs(self._file.parent)
        except OSError as error:
            if not anonymous or error.errno not in FULL or local.size(self._file) is not None:
                raise
            return  # nobody has ever written here, and nobody can
        if takeover:
            # A new file: the old holder keeps its lock on one that no longer has a name.
            local.unlink(self._file)
            self._lock = _file_lock(self._file)
        deadline = time.monotonic() + PATIENCE
        while not self._tried():
            holder = self.holder()
            if time.monotonic() > deadline or not _dead(holder):
                raise RunLocked(
                    f"{self._root} is being written by {described(holder)}",
                    hint="wait for it or stop it; lastgood.manage(trainer, takeover=True) fences it off",
                )
            time.sleep(0.1)
        try:
            self._fence_off_others()
            self._write_card(anonymous)
        except BaseException:
            self._lower_fence()
            self._lock.release(force=True)
            raise

    def _tried(self) -> bool:
        """Whether the lock could be had. The fence first: who is stopped right behind the lock has one to lose."""
        self._owner = os.getpid()
        if not self._fence.parent.is_symlink():  # behind a link the way back leads elsewhere
            with suppress(OSError):
                fs.system.mkdir(self._fence)
                self.door = through(self._fence)
        try:
            self._lock.acquire()
        except BaseException as error:
            self._lower_fence()
            if isinstance(error, Timeout):
                return False
            raise
        return True

    def _fence_off_others(self) -> None:
        """Through our own: of two who take over at once, at most one keeps its fence."""
        for name in local.names(hidden(self.door)):
            if is_fence(name) and name != self._fence.name:
                with suppress(FileNotFoundError, NotADirectoryError):
                    fs.system.rmdir(hidden(self.door, name))
        self._check_fence()

    def _check_fence(self) -> None:
        if not self._fence_stands():
            raise RunLocked(f"another process took over {self._root} at the same moment", hint="launch it once")

    def _fence_stands(self) -> bool:
        return self.door == self._root or self._fence.is_dir()

    def _lower_fence(self) -> None:
        with suppress(OSError):
            fs.system.rmdir(self._fence)
        self.door = self._root

    def _write_card(self, anonymous: bool) -> None:
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
            content, path = f"{json.dumps(card)}\n".encode(), hidden(self.door, self._card.name)
            if anonymous:  # whoever frees space needs the reserve more than this card
                local.replace(path, content)
            else:
                reserve.spend(self.door, lambda: local.replace(path, content))
        except OSError as error:
            self._check_fence()
            if not anonymous or error.errno not in FULL:
                raise

    def release(self) -> None:
        """Let the next one in. In a forked process nothing happens: the lock is its parent's."""
        if os.getpid() != self._owner:
            return
        with suppress(OSError):  # a disk that broke: the card of a dead process keeps nobody out
            if self.still_held():
                local.unlink(hidden(self.door, self._card.name))
        self._lower_fence()
        self._lock.release(force=True)

    def still_held(self) -> bool:
        """False after another process took over, and in a forked process.

        Raises OSError where the card can't be read just now: then nobody knows.
        """
        if os.getpid() != self._owner or not self._fence_stands():
            return False
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
