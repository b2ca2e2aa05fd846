"""Values as people read them: ages, numbers, and names that may be hostile."""

from __future__ import annotations

import time
import unicodedata

from lastgood.units import span


def files(count: int) -> str:
    """1 file, 2 files."""
    return f"{count} file" if count == 1 else f"{count} files"


def is_timing(metric: str) -> bool:
    """Whether a metric tells of the evaluation's speed, which differs every time and ranks nothing."""
    return metric.endswith(("_runtime", "_per_second", "_preparation_time"))


def age(then: float, now: float | None = None) -> str:
    """How long ago, in at most five characters: 3m, 2h, 5d; `-` if nobody knows, `0s` for the future."""
    if then <= 0:
        return "-"
    return span((time.time() if now is None else now) - then)


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
