"""A training log or a traceback, taken apart: the exceptions in it, the last one first."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

LIMIT = 8 << 20
"""Bytes of a log that are looked at: its end, where the trouble is."""
LINE = 20_000
"""Characters of a line that are looked at: what a pattern takes for a line may grow with its square."""

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_PREFIX = re.compile(
    r"^(?:\[?(?:rank|default|worker)_?\d+\]?:?\s?|\(\w+ pid=\d+[^)]*\)\s?|\d+:\s(?=\s|Traceback|File))"
)
_FRAME = re.compile(r'^\s*(?:\|\s*)*File "([^"\n]+)", line (\d+)(?:, in (\S+))?')
_BEGIN = "Traceback (most recent call last)"
_AFTER_BAR = re.compile(r"(?<=\])(?=Traceback \(most recent call last\))")
"""A progress bar stays on its line, so what comes next stands behind it: 0/8 [00:00<?, ?it/s]Traceback ..."""
_JOINED = ("During handling of the above exception", "The above exception was the direct cause")
_RAISED = re.compile(r"^(?:\+ Exception Group )?((?:[A-Za-z_]\w*\.)*[A-Z]\w*)(?::\s?(.*)|$)")
_LAUNCHERS = ("ChildFailedError", "CalledProcessError", "ProcessRaisedException", "ProcessExitedException")
"""What a launcher raises about a process whose own traceback stands before."""


class Frame(msgspec.Struct, frozen=True):
    file: str
    line: int
    function: str


class Raised(msgspec.Struct, frozen=True):
    """One chain of exceptions. text: what they say, one after the other. kind: class name of the last."""

    kind: str
    text: str
    frames: tuple[Frame, ...] = ()

    def passed(self, *functions: str) -> bool:
        """Whether the traceback goes through a function of one of these names."""
        return any(frame.function in functions for frame in self.frames)


class Log(msgspec.Struct, frozen=True):
    """text: all of it, without colours, progress bars and rank prefixes. raised: the exceptions, the last first."""

    text: str
    raised: tuple[Raised, ...] = ()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def line_of(self, match: re.Match[str]) -> str:
        """The line of the text that a match begins in, at most 300 characters."""
        string = match.string
        begin = string.rfind("\n", 0, match.start()) + 1
        end = string.find("\n", match.start())
        return string[begin : end if end >= 0 else len(string)].strip()[:300]


def read(text: str | bytes) -> Log:
    """Take a log apart. Without any traceback all of it counts as what an exception said: people paste one line."""
    if isinstance(text, bytes):
        text = text[-LIMIT:].decode("utf-8", "replace")
    text = _AFTER_BAR.sub("\n", text[-LIMIT:].replace("\r\n", "\n"))
    lines = [_plain(line) for line in text.split("\n")]
    found = [chain for chain in _chains(lines) if chain.kind not in _LAUNCHERS]
    whole = "\n".join(lines)
    if not found and _BEGIN not in whole:
        kind = next((m.group(1) for line in reversed(lines) if (m := _RAISED.match(line))), "")
        found = [Raised(kind.rpartition(".")[2], whole)]
    return Log(whole, tuple(reversed(found)))


def _plain(line: str) -> str:
    """Without colours, with what a progress bar left visible, and without the launcher's prefix."""
    return _PREFIX.sub("", _ESCAPE.sub("", line[-LINE:]).rstrip("\r").rpartition("\r")[2])


def _chains(lines: Sequence[str]) -> list[Raised]:
    """The tracebacks in order; those that Python joins by "During handling ..." are one."""
    found: list[Raised] = []
    at, joined = 0, False
    while at < len(lines):
        if lines[at].lstrip(" |+").startswith(_BEGIN):
            raised, at = _one(lines, at + 1)
            if joined and found:
                before = found.pop()
                raised = Raised(raised.kind, f"{before.text}\n{raised.text}", before.frames + raised.frames)
            found.append(raised)
            joined = False
            continue
        joined = joined or lines[at].lstrip(" |+").startswith(_JOINED)
        at += 1
    return found


def _one(lines: Sequence[str], at: int) -> tuple[Raised, int]:
    """(the exception whose traceback begins at this line, the line after it)."""
    frames = []
    while at < len(lines) and (not lines[at].strip() or lines[at][0] in " |+"):
        if found := _FRAME.match(lines[at]):
            frames.append(Frame(found.group(1), int(found.group(2)), found.group(3) or ""))
        at += 1
    said: list[str] = []
    while at < len(lines) and len(said) < 400:
        inner = lines[at].lstrip(" |+")
        if inner.startswith((_BEGIN, *_JOINED)):
            break
        said.append(lines[at])
        at += 1
    kind = _RAISED.match(said[0]) if said else None
    return Raised(kind.group(1).rpartition(".")[2] if kind else "", "\n".join(said).rstrip(), tuple(frames)), at
