"""trainer_state.json: the step, and the log of the whole run so far, which each checkpoint of a long run repeats."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from lastgood.store import local

STATE = "trainer_state.json"
TAIL = 8 << 10
"""Bytes of a log in which the rows of its last step are looked for."""


def state_of(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(its content, what is wrong with it): ({}, ...) where there is something."""
    try:
        value = json.loads(local.read(path, 1 << 30))
    except FileNotFoundError:
        return {}, [f"{STATE} is missing: the save was interrupted, or this is an exported model"]
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{STATE} can't be read: {error}"]
    if not isinstance(value, dict) or not isinstance(value.get("global_step"), int):
        return {}, [f"{STATE} has no global_step"]
    return value, []


class _Outline(msgspec.Struct):
    """trainer_state.json with its log unread: of a long run that is most of it, in each of its checkpoints."""

    global_step: int
    log_history: bytes


class _Read(msgspec.Struct):
    global_step: int
    log_history: msgspec.Raw = msgspec.Raw(b"[]")


_STEP = re.compile(rb"(\d{1,18}),")
_AT_STEP, _AT_LOG, _END = b'\n  "global_step": ', b'\n  "log_history": ', b"\n  ],"


def _outline(path: Path) -> _Outline | None:
    try:
        data = local.read(path, 1 << 30)
        try:
            found = msgspec.json.decode(data, type=_Read)
            return _Outline(found.global_step, bytes(found.log_history))
        except ValueError:  # NaN, which isn't JSON, though Python writes and reads it
            return _by_form(data)
    except (OSError, RecursionError):
        return None


def _by_form(data: bytes) -> _Outline | None:
    """The same by the form that the Trainer writes. A thousand logs of megabytes: found, and not matched."""
    step = _STEP.match(data, max(0, data.find(_AT_STEP)) + len(_AT_STEP))
    start = data.find(_AT_LOG) + len(_AT_LOG)
    end = data.find(_END, start)
    whole = data.rstrip().endswith(b"}") and b"NaN" in data and _AT_STEP in data and _AT_LOG in data
    if not whole or step is None or end < 0 or data[start : start + 1] != b"[":
        return None
    return _Outline(int(step[1]), data[start : end + len(_END) - 1])


def glance(path: Path) -> tuple[int | None, list[Any], list[str]]:
    """(step, the last rows of the log, problems): enough for what belongs to this very step."""
    outline = _outline(path)
    if outline is not None:
        log = outline.log_history
        start = log.find(b"{", max(0, len(log) - TAIL))
        with suppress(ValueError, RecursionError):  # a log that isn't flat
            rows = json.loads(b"[" + log[start:]) if start >= 0 else []
            if isinstance(rows, list) and (len(log) <= TAIL or any(isinstance(r, dict) and "loss" in r for r in rows)):
                return outline.global_step, rows, []
    state, problems = state_of(path)
    rows = state.get("log_history")
    return state.get("global_step"), rows if isinstance(rows, list) else [], problems


def one_run(newest: Path, others: Iterable[Path]) -> bool:
    """Whether the log of `newest` begins with the log of each other, byte by byte; False if that can't be told.

    All were written by the same library in the same form, so this needs no parsing: that would take the square of
    the number of checkpoints.
    """
    last = _outline(newest / STATE)
    if last is None:
        return False
    seen = {last.global_step}
    for other in others:
        earlier = _outline(other / STATE)
        # A copy of a checkpoint under another number is a run of its own, of which nobody knows what it is.
        if earlier is None or earlier.global_step in seen or earlier.global_step > last.global_step:
            return False
        if not last.log_history.startswith(earlier.log_history.rstrip(b" \n]")):
            return False
        seen.add(earlier.global_step)
    return True
