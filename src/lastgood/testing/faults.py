"""A file system that fails, or stops, at one call that was chosen."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from lastgood.errors import UsageError
from lastgood.store.fs import AnyPath, FileSystem

STOPS = ("crash-before", "crash-after", "crash-torn", "kill-before", "kill-after", "kill-torn")
"""A crash ends the operation inside this process, which is quick; a kill is SIGKILL to the process itself.

before: the call isn't made any more; after: it was, and nothing after it; torn: half of what is written is.
"""
LIES = ("short", "lost-sync")
"""short: half of what is written is, and the call says so. lost-sync: it says that it is done, and nothing is."""

BLOCK = 4096
"""Bytes that a disk writes all or none of."""

_TEXT = re.compile(r"(\d+):([A-Za-z-]+)(:sticky)?")


class Crash(BaseException):
    """The process is dead from here on: whatever it still tries reaches no disk. Not an Exception, as a kill isn't."""


@dataclass(frozen=True, slots=True)
class Fault:
    """At the `point`-th call (from 1), this happens; sticky: and at all after it. Its text is "17:EIO:sticky".

    what: one of STOPS or LIES, or the name of an errno. Raises UsageError for anything else.
    """

    point: int
    what: str
    sticky: bool = False

    def __post_init__(self) -> None:
        if self.what not in (*STOPS, *LIES) and not isinstance(getattr(errno, self.what, None), int):
            raise UsageError(f"{self.what!r} is neither an errno nor one of {', '.join((*STOPS, *LIES))}")

    def __str__(self) -> str:
        return f"{self.point}:{self.what}{':sticky' if self.sticky else ''}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault with this text. Raises UsageError."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} isn't a fault", hint="it looks like 17:EIO or 17:crash-torn or 3:ENOSPC:sticky")
        return cls(int(match[1]), match[2], bool(match[3]))

    def hits(self, point: int) -> bool:
        """Whether it happens at this call."""
        return point == self.point or (self.sticky and point > self.point)


@dataclass
class Faulty(FileSystem):
    """Counts the calls that change the disk and lets `fault` happen; without one, it only counts.

    reads: count what looks at the disk as well. calls: the names of those counted, in their order. Calls are made one
    at a time and names are drawn from `seed`, so that the same operation makes the same calls again.
    """

    fault: Fault | None = None
    reads: bool = False
    seed: str = ""
    calls: list[str] = field(default_factory=list)
    dead: bool = False
    _writing: set[int] = field(default_factory=set)
    struck: bool = False
    """Whether the fault happened."""
    workers = 1

    def open(self, path: AnyPath, flags: int, mode: int = 0o666) -> int:
        """See FileSystem, as for all of these."""
        handle = int(self._call("open", bool(flags & os.O_CREAT), super().open, path, flags, mode))
        if flags & (os.O_WRONLY | os.O_RDWR):
            self._writing.add(handle)
        return handle

    def write(self, handle: int, data: bytes | memoryview) -> int:
        return int(self._call("write", True, super().write, handle, data))

    def sync(self, handle: int) -> None:
        self._call("sync", True, super().sync, handle)

    def close(self, handle: int) -> None:
        if self.dead:
            os.close(handle)  # the kernel does it for a process that died
            return
        changes = handle in self._writing  # only there it may be told that a write failed
        self._writing.discard(handle)
        try:
            self._call("close", changes, lambda handle: None, handle)
        finally:
            os.close(handle)  # also where it reports an error: the descriptor is gone

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        self._call("rename", True, super().rename, source, target)

    def replace(self, source: AnyPath, target: AnyPath) -> None:
        self._call("replace", True, super().replace, source, target)

    def unlink(self, path: AnyPath) -> None:
        self._call("unlink", True, super().unlink, path)

    def mkdir(self, path: AnyPath) -> None:
        self._call("mkdir", True, super().mkdir, path)

    def rmdir(self, path: AnyPath) -> None:
        self._call("rmdir", True, super().rmdir, path)

    def chmod(self, path: AnyPath, mode: int) -> None:
        self._call("chmod", True, super().chmod, path, mode)

    def touch(self, path: AnyPath) -> None:
        self._call("touch", True, super().touch, path)

    def clone(self, source: int, target: int) -> None:
        self._call("clone", True, super().clone, source, target)

    def unbuffered(self, handle: int, on: bool) -> None:
        self._call("unbuffered", True, super().unbuffered, handle, on)

    def allocate(self, handle: int, size: int) -> None:
        self._call("allocate", True, super().allocate, handle, size)

    def truncate(self, handle: int, size: int) -> None:
        self._call("truncate", True, super().truncate, handle, size)

    def read(self, handle: int, count: int) -> bytes:
        return bytes(self._call("read", False, super().read, handle, count))

    def read_into(self, handle: int, buffer: memoryview) -> int:
        return int(self._call("read_into", False, super().read_into, handle, buffer))

    def read_at(self, handle: int, buffer: memoryview, at: int) -> int:
        return int(self._call("read_at", False, super().read_at, handle, buffer, at))

    def status(self, path: AnyPath) -> os.stat_result:
        found: os.stat_result = self._call("status", False, super().status, path)
        return found

    def names(self, path: AnyPath) -> list[str]:
        return list(self._call("names", False, super().names, path))

    def token(self, count: int) -> str:
        self._tokens = getattr(self, "_tokens", 0) + 1
        return blake2b(f"{self.seed}:{self._tokens}".encode(), digest_size=count).hexdigest()

    def _call(self, name: str, changes: bool, make: Callable[..., Any], *args: Any) -> Any:
        if self.dead:
            raise Crash
        if not changes and not self.reads:
            return make(*args)
        self.calls.append(name)
        if self.fault is None or not self.fault.hits(len(self.calls)):
            return make(*args)
        self.struck = True
        return self._strike(self.fault.what, name, make, args)

    def _strike(self, what: str, name: str, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if what in STOPS:
            if what.endswith("after"):
                make(*args)
            elif what.endswith("torn") and name == "write":
                make(args[0], _half(args[1]))
            if what.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            self.dead = True
            raise Crash(f"at call {len(self.calls)}, {name}")
        if what == "short":
            return make(args[0], _half(args[1])) if name == "write" else make(*args)
        if what == "lost-sync":
            return None if name == "sync" else make(*args)
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number), None if isinstance(args[0], int) else os.fspath(args[0]))


def _half(data: bytes | memoryview) -> bytes | memoryview:
    """At least one byte, or a caller that writes until all is written would never end.

    Whole blocks of the very same memory, if it has some: nothing else may be written past the page cache.
    """
    count = len(data) // 2
    return memoryview(data)[: max(1, count - count % BLOCK if count > BLOCK else count)]
