"""Sizes, durations and rates: as people read them, and as people write them. Nothing else formats or parses these."""

from __future__ import annotations

import functools

from lastgood.errors import UsageError

_IEC = ("KiB", "MiB", "GiB", "TiB", "PiB")
_SI = ("kB", "MB", "GB", "TB", "PB")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@functools.lru_cache(maxsize=1024)
def size(count: int, *, si: bool = False) -> str:
    """Bytes in their largest unit: 1.9 GiB; si: 2.0 GB."""
    base = 1000 if si else 1024
    if abs(count) < base:
        return f"{count} B"
    value = float(count)
    for unit in _SI if si else _IEC:
        value /= base
        if abs(value) < 999.95:  # more would be rounded to four digits before the point
            return f"{value:.1f} {unit}"
    return f"{value:.1f} {(_SI if si else _IEC)[-1]}"


def span(seconds: float) -> str:
    """A duration in its largest unit, whole: 45s, 3m, 36h, 5d, 2y."""
    seconds = max(0.0, seconds)
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "m"), (172800, 3600, "h"), (86400 * 1000, 86400, "d")):
        if seconds < limit:
            return f"{int(seconds / divisor)}{unit}"
    return f"{int(seconds / 31557600)}y"


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
    """Seconds of 300ms, 1.5s, 90m, 36h, 2d, 1w. Raises ValueError, also without a unit: 5 may be minutes or days."""
    word = text.strip().lower()
    if not word or word[-1] not in _SECONDS:
        raise ValueError(f"{text!r} has no unit")
    # Divided by a thousand, not multiplied by its inverse: 350ms are 0.35, without a tail of digits.
    value = float(word[:-2]) / 1000 if word.endswith("ms") else float(word[:-1]) * _SECONDS[word[-1]]
    if not 0 <= value < 1e12:
        raise ValueError(f"{text} is out of range")
    return value


def seconds(option: str, value: float | str | None) -> float | None:
    """A duration as a number ("30m", 1800) or None. Raises UsageError, also for a number in quotes: 30 of what?"""
    if not isinstance(value, str):
        return value
    total, pieces = 0.0, value.strip().lower()
    try:
        for piece in _split(pieces):
            total += parse_duration(piece)
    except ValueError:
        raise UsageError(f"{option}={value!r} is not a time", hint="30m, 3h30m, 90s, or a number of seconds") from None
    return total


def _split(text: str) -> list[str]:
    """3h30m -> 3h, 30m; anything else as it is."""
    pieces, begin = [], 0
    for place, letter in enumerate(text):
        if (letter in "hdw" and place + 1 < len(text)) or (letter == "m" and text[place + 1 : place + 2].isdigit()):
            pieces.append(text[begin : place + 1])
            begin = place + 1
    return [*pieces, text[begin:]]


def parse_rate(text: str) -> float:
    """Bytes per second of 1.2GB/s, 200 MiB/s, 10Gb/s or 10 Gbit/s (bits: an eighth), and of a size alone.

    Raises ValueError.
    """
    word = text.strip().removesuffix("/s").removesuffix("ps").rstrip()
    bits = word.removesuffix("it")
    if word.endswith("bit") or (bits.endswith("b") and bits[-2:-1].isupper()):  # a lower-case b behind K, M, G or T
        return parse_size(bits[:-1]) / 8
    return float(parse_size(word))
