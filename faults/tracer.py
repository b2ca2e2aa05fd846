"""A child process whose calls that change files under one directory are seen by ptrace(2), and stopped there.

strace can kill at the n-th call as well, but it counts for each thread and each kind of call by itself, so that a call
of a second thread can't be aimed at. Here calls are counted for all threads together, and only those under `root`.
What a process does through mmap or io_uring isn't seen.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PATH, FD, AT = "path", "fd", "at"
# Number on x86-64 -> name, and where its paths are among the arguments: (kind, index).
CALLS: dict[int, tuple[str, tuple[tuple[str, int], ...]]] = {
    1: ("write", ((FD, 0),)),
    2: ("open", ((PATH, 0),)),
    18: ("pwrite64", ((FD, 0),)),
    20: ("writev", ((FD, 0),)),
    40: ("sendfile", ((FD, 0),)),
    74: ("fsync", ((FD, 0),)),
    75: ("fdatasync", ((FD, 0),)),
    76: ("truncate", ((PATH, 0),)),
    77: ("ftruncate", ((FD, 0),)),
    82: ("rename", ((PATH, 0), (PATH, 1))),
    83: ("mkdir", ((PATH, 0),)),
    84: ("rmdir", ((PATH, 0),)),
    85: ("creat", ((PATH, 0),)),
    86: ("link", ((PATH, 0), (PATH, 1))),
    87: ("unlink", ((PATH, 0),)),
    88: ("symlink", ((PATH, 1),)),
    90: ("chmod", ((PATH, 0),)),
    91: ("fchmod", ((FD, 0),)),
    257: ("openat", ((AT, 0),)),
    258: ("mkdirat", ((AT, 0),)),
    263: ("unlinkat", ((AT, 0),)),
    264: ("renameat", ((AT, 0), (AT, 2))),
    265: ("linkat", ((AT, 0), (AT, 2))),
    266: ("symlinkat", ((AT, 1),)),
    268: ("fchmodat", ((AT, 0),)),
    277: ("sync_file_range", ((FD, 0),)),
    280: ("utimensat", ((AT, 0),)),
    285: ("fallocate", ((FD, 0),)),
    296: ("pwritev", ((FD, 0),)),
    306: ("syncfs", ((FD, 0),)),
    316: ("renameat2", ((AT, 0), (AT, 2))),
    326: ("copy_file_range", ((FD, 2),)),
    328: ("pwritev2", ((FD, 0),)),
    437: ("openat2", ((AT, 0),)),
    452: ("fchmodat2", ((AT, 0),)),
}
_FLAGS = {"open": 1, "openat": 2}
"""Which argument says whether opening creates or empties the file; otherwise it changes nothing."""

_SEIZE, _INTERRUPT, _SYSCALL, _INFO = 0x4206, 0x4207, 24, 0x420E
# TRACESYSGOOD, TRACEFORK, TRACEVFORK, TRACECLONE, and EXITKILL: a tracer that dies leaves nobody behind.
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x100000
_WALL = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info of linux/ptrace.h; at the exit of a call the result has the place of its number."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("number", ctypes.c_int64),
        ("arguments", ctypes.c_uint64 * 6),
    )


@dataclass(slots=True)
class Call:
    """paths: below the root, what is random in them masked; thread: 0 is the first; result: negative is -errno."""

    name: str
    paths: tuple[str, ...]
    thread: int
    result: int | None = None

    def __str__(self) -> str:
        return f"{self.name} {' -> '.join(self.paths)}"


@dataclass(slots=True)
class Trace:
    """calls: in order; the last one was not carried out if the child was killed. status: -SIGKILL if it was."""

    calls: list[Call] = field(default_factory=list)
    status: int = 0


STAGED = re.compile(r"(open|openat|write|pwrite64|writev|fallocate|ftruncate|fsync|fdatasync) \.lastgood/tmp/")
"""Calls on the files of a save that isn't committed yet: those are written side by side."""


def aimed(hit: Call, meant: str) -> bool:
    """Whether a call may be in the place of another one, in the same program run again.

    What threads do side by side comes in any order, also to the first thread, which takes what is next; all else that
    the first one does comes in one order.
    """
    both = STAGED.match(str(hit)) and STAGED.match(meant)
    return bool(hit.thread or str(hit) == meant or "fsync" in meant or both)


Look = Callable[[int, Call], bool]
"""(number of the call, from 1; the call, which waits meanwhile) -> whether to kill the process instead of it."""


def missing() -> str:
    """Why there can be no tracing here; "" if there can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return "calls are traced on Linux on x86-64 alone"
    try:
        done = trace(lambda: None, Path("/nowhere"), Path(os.devnull)).status == 0
    except OSError as error:
        return f"processes can't be traced here: {error}"
    return "" if done else "a traced process fails here"


def kill_at(point: int) -> Look:
    return lambda number, call: number == point


def trace(function: Callable[[], object], root: Path, log: Path, look: Look = lambda number, call: False) -> Trace:
    """Run `function` in a forked child whose output goes to `log`. Raises OSError where tracing isn't allowed."""
    hold, release = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        os.close(release)
        _child(function, hold, log)
    os.close(hold)
    os.setpgid(pid, pid)
    try:
        _ptrace(_SEIZE, pid, _OPTIONS)
        _ptrace(_INTERRUPT, pid, 0)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(release)
    return _follow(pid, os.path.realpath(root), look)


def run(function: Callable[[], object], log: Path) -> int:
    """The same in a child that nobody looks at; its exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _child(function, os.open(os.devnull, os.O_RDONLY), log)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(function: Callable[[], object], hold: int, log: Path) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        os.read(hold, 1)
        os.close(hold)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        function()
        status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 1
    except BaseException:  # CheckpointException of torch isn't an Exception
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _follow(main: int, root: str, look: Look) -> Trace:
    """Let it run from call to call until it and all of its threads have ended."""
    done, threads, inside = Trace(), [main], {}
    killed = False
    while True:
        try:
            task, status = os.waitpid(-main, _WALL)
        except ChildProcessError:
            return done
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if task == main:
                done.status = os.waitstatus_to_exitcode(status)
            continue
        deliver, signalled = 0, os.WSTOPSIG(status)
        if task not in threads:
            threads.append(task)
        if killed:
            pass
        elif signalled == signal.SIGTRAP | 0x80:
            info = _Info()
            _ptrace(_INFO, task, ctypes.sizeof(info), ctypes.addressof(info))
            if info.op == 1:
                call = _call(task, threads.index(task), info, root)
                if call is not None:
                    done.calls.append(call)
                    inside[task] = call
                    if look(len(done.calls), call):
                        os.kill(main, signal.SIGKILL)
                        killed = True
            elif info.op == 2 and task in inside:
                inside.pop(task).result = info.number
        elif status >> 16 == 0:
            deliver = signalled
        try:
            _ptrace(_SYSCALL, task, deliver)
        except ProcessLookupError:
            continue  # it has been killed; its end is still to be waited for


def _call(task: int, thread: int, info: _Info, root: str) -> Call | None:
    """The call if it changes something under `root`."""
    if info.number not in CALLS:
        return None
    name, places = CALLS[info.number]
    if name in _FLAGS and not info.arguments[_FLAGS[name]] & (os.O_CREAT | os.O_TRUNC):
        return None
    paths = tuple(_path(task, kind, info.arguments, index) for kind, index in places)
    below = [path[len(root) :].lstrip("/") for path in paths if path == root or path.startswith(f"{root}/")]
    return Call(name, tuple(masked(path) for path in below), thread) if below else None


def masked(path: str) -> str:
    """The ids that are new each time, away."""
    return re.sub(r"[0-9a-f]{8,}|(?<=\.tmp)[A-Za-z0-9]{6}\b", "*", path)


def _path(task: int, kind: str, arguments: ctypes.Array[ctypes.c_uint64], index: int) -> str:
    try:
        if kind == FD:
            return os.readlink(f"/proc/{task}/fd/{ctypes.c_int32(arguments[index]).value}")
        base, address = f"/proc/{task}/cwd", arguments[index]
        if kind == AT:
            directory, address = ctypes.c_int32(arguments[index]).value, arguments[index + 1]
            base = base if directory < 0 else f"/proc/{task}/fd/{directory}"
        with open(f"/proc/{task}/mem", "rb", buffering=0) as memory:
            text = os.pread(memory.fileno(), 4096, address).partition(b"\0")[0] if address else b""
        path = os.path.join(os.readlink(base), os.fsdecode(text))
        return os.path.normpath(path)
    except OSError:
        return ""


def _ptrace(request: int, task: int, data: int, extra: int | None = None) -> None:
    """extra: for the one request whose third argument is a size and whose fourth is an address."""
    third, fourth = (None, data) if extra is None else (data, extra)
    if _libc.ptrace(request, task, third, fourth) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
