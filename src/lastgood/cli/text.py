"""Values as people read them: sizes, ages, numbers, and names that may be hostile."""

from __future__ import annotations

import functools
import time
import unicodedata

_IEC = ("KiB", "MiB", "GiB", "TiB", "PiB")
_SI = ("kB", "MB", "GB", "TB", "PB")


@functools.lru_cache(maxsize=1024)
def size(count: int, *, si: bool = False) -> str:
    """1.9 GiB; si: 2.0 GB."""
    base = 1000 if si else 1024
    if abs(count) < base:
        return f"{count} B"
    value = float(count)
    for unit in _SI if si else _IEC:
        value /= base
        if abs(value) < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value:.1f} {(_SI if si else _IEC)[-1]}"


def files(count: int) -> str:
    """1 file, 2 files."""
    return f"{count} file" if count == 1 else f"{count} files"


def is_timing(metric: str) -> bool:
    """Whether a metric tells of the evaluation's speed, which differs every time and ranks nothing."""
    return metric.endswith(("_runtime", "_per_second", "_preparation_time"))


def parse_size(text: str) -> int:
    """Bytes of 200GB, 1.5 TiB, 4096. Raises ValueError."""
    word = text.strip().replace(" ", "").upper().removesuffix("B")
    for power, letter in enumerate("KMGTP", 1):
        for suffix, base in ((f"{letter}I", 1024), (letter, 1000)):
            if word.endswith(suffix):
                return _bytes(float(word.removesuffix(suffix)) * base**power, text)
    return _bytes(float(word), text)


def _bytes(value: float, text: str) -> int:
    if not 0 <= value < 1 << 62:
        raise ValueError(f"{text} is out of range")
    return int(value)


def parse_duration(text: str) -> float:
    """Seconds of 2d, 36h, 90m, 30s, 1w. Raises ValueError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    word = text.strip().lower()
    if not word or word[-1] not in units:
        raise ValueError(f"{text!r} has no unit")
    value = float(word[:-1]) * units[word[-1]]
    if not 0 <= value < 1e12:
        raise ValueError(f"{text} is out of range")
    return value


def age(then: float, now: float | None = None) -> str:
    """How long ago, in at most five characters: 3m, 2h, 5d; `-` if nobody knows, `0s` for the future."""
    if then <= 0:
        return "-"
    return span((time.time() if now is None else now) - then)


def span(seconds: float) -> str:
    """A duration in its largest unit."""
    seconds = max(0.0, seconds)
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "m"), (172800, 3600, "h"), (86400 * 1000, 86400, "d")):
        if seconds < limit:
            return f"{int(seconds / divisor)}{unit}"
    return f"{int(seconds / 31557600)}y"


def number(value: float | None) -> str:
    """A metric: up to six significant digits; `-` for none."""
    return "-" if value is None else f"{value:.6g}"


def plain(text: str, keep: str = "") -> str:
    """Without what could act on a terminal: control characters, ANSI escapes, reversed and invisible text.

    Names come from the disk and from other people's files.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or _harmless(c) else f"\\u{ord(c):04x}" for c in text)


def _harmless(character: str) -> bool:
    return character.isprintable() and unicodedata.category(character) not in ("Cf", "Cs", "Co", "Cn")


def width(text: str) -> int:
    """Columns on a terminal: East Asian wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(line: str, columns: int | None) -> list[str]:
    """A sentence in lines of at most this width; None: as it is."""
    if columns is None or width(line) <= columns:
        return [line]
    import textwrap

    return textwrap.wrap(line, columns) or [""]


def moment(then: object) -> str:
    """A time of day in a year; `?` for what no calendar has."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(then)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return "?"


def fit(text: str, columns: int) -> str:
    """Cut to a width, with an ellipsis."""
    if width(text) <= columns:
        return text
    cut, used = "", 0
    for character in text:
        used += width(character)
        if used > columns - 1:
            break
        cut += character
    return cut + "…" if columns > 0 else ""
