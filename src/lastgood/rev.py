"""Revisions: the words that name a checkpoint, as git has them for commits. Pure.

latest  best  best:eval_f1  1200  step:1200  checkpoint-1200  latest~1  TAG  3f9a (the beginning of an id)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lastgood import policy, ranking
from lastgood.errors import NoCheckpoint, UsageError
from lastgood.model import Record, on_lineage
from lastgood.policy import Monitors
from lastgood.ranking import Mode

_BACK = re.compile(r"(.+?)~(\d{0,6})")


def resolve(
    text: str,
    records: Sequence[Record],
    *,
    monitor: str | None = None,
    mode: Mode | None = None,
    others: Monitors = (),
) -> Record:
    """The checkpoint that `text` names. Raises NoCheckpoint, with what is near, or UsageError if several match.

    monitor, mode: the metric that `best` alone means. others: further ones whose direction is known.
    """
    back = _BACK.fullmatch(text)
    if back and text.count("~") > 50:
        raise UsageError(f"{text[:40]!r}... goes back too often", hint="latest~60 is one step of sixty")
    if back:
        start = resolve(back[1], records, monitor=monitor, mode=mode, others=others)
        return _before(start, int(back[2] or 1), records)
    if text in ("latest", "last", "HEAD"):
        return _latest(records)
    if text == "best" or text.startswith("best:"):
        return _best(records, *metric_named(text, records, monitor, mode, others))
    found = _matches(text, records)
    if not found:
        raise NoCheckpoint(f"no checkpoint is called {_short(text)}", hint=_near(text, records))
    if len(found) > 1:
        listing = ", ".join(f"{record.name} ({record.id or record.layout})" for record in found[:6])
        raise UsageError(f"{_short(text)} may be any of {len(found)} checkpoints: {listing}", hint="name one by its id")
    return found[0]


def words(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(revision, help) for completion."""
    found = [("latest", "what a recovery resumes from"), ("best", "what to deploy")]
    for record in reversed(records):
        found += [(name, record.name) for name in record.pinned]
        found.append((str(record.step) if record.step >= 0 else record.name, record.state))
    metrics = sorted({name for record in records for name in record.metrics})
    return found + [(f"best:{name}", "best by this metric") for name in metrics]


def _latest(records: Sequence[Record]) -> Record:
    record = policy.latest(records)
    if record is None:
        raise NoCheckpoint("there is no full checkpoint to resume from", hint="`lastgood log` shows what there is")
    return record


def metric_named(
    text: str, records: Sequence[Record], monitor: str | None, mode: Mode | None, others: Monitors = ()
) -> tuple[str, Mode]:
    """The metric that best or best:METRIC[:min|max] means, and its direction."""
    name, _, direction = text.removeprefix("best").removeprefix(":").partition(":")
    if direction not in ("", "min", "max"):
        raise UsageError(f"{_short(text)}: after the metric comes min or max", hint="best:METRIC:min")
    wanted = name or monitor
    if wanted is None:
        known = ", ".join(sorted({name for record in records for name in record.metrics})) or "none"
        raise UsageError("best by which metric?", hint=f"best:METRIC; recorded are: {known}")
    own = mode if wanted == monitor else dict(others).get(wanted)
    found: Mode | None = (
        "min" if direction == "min" else "max" if direction == "max" else own or ranking.known_mode(wanted)
    )
    if found is None:
        short = wanted[:100]
        raise UsageError(f"is a lower or a higher {short} better?", hint=f"best:{short}:min or best:{short}:max")
    return wanted, found


def _best(records: Sequence[Record], monitor: str, mode: Mode) -> Record:
    record = ranking.best(records, monitor, mode)
    if record is None:
        known = ", ".join(sorted({name for r in records for name in r.metrics})) or "none"
        raise NoCheckpoint(f"no checkpoint has a {monitor[:100]}", hint=f"recorded metrics: {known}")
    return record


def _before(record: Record, count: int, records: Sequence[Record]) -> Record:
    lineage = record.manifest.lineage if record.manifest is not None else ()
    older = [r for r in records if r.ours and r.seq < record.seq and on_lineage(r.seq, lineage)]
    older.sort(key=lambda r: -r.seq)
    if count == 0:
        return record
    if len(older) < count:
        raise NoCheckpoint(f"{record.name} has {len(older)} checkpoints before it on its branch, not {count}")
    return older[count - 1]


def _matches(text: str, records: Sequence[Record]) -> list[Record]:
    for match in (
        [r for r in records if text in r.pinned],
        [r for r in records if r.name == text],
        _of_step(text, records),
        [r for r in records if len(text) >= 4 and r.id.startswith(text.lower())],
    ):
        if match:
            return match
    return []


def _of_step(text: str, records: Sequence[Record]) -> list[Record]:
    number = re.fullmatch(r"(?:step:|checkpoint-)?(\d{1,18})", text)
    if number is None:
        return []
    found = [r for r in records if r.step == int(number[1])]
    # The same step may lie there twice: saved again after a resume, or on a branch that was left.
    for better in (
        [r for r in found if r.ours and r.current],
        [r for r in found if r.ours],
        [r for r in found if r.state != "incomplete"],
    ):
        plain = [r for r in better if r.name == f"checkpoint-{r.step}"] if len(better) > 1 else better
        if better:
            return plain or better
    return found


def _short(text: str) -> str:
    """As it is quoted in messages."""
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}..."


def _near(text: str, records: Sequence[Record]) -> str:
    known = [word for word, _ in words(records)]
    import difflib

    near = difflib.get_close_matches(text, known, n=3)
    if re.fullmatch(r"[0-9]{1,18}", text):
        steps = sorted({r.step for r in records if r.step >= 0}, key=lambda step: abs(step - int(text)))
        near = [str(step) for step in steps[:3]]
    return f"did you mean {', '.join(near)}?" if near else "`lastgood log` shows what there is"
