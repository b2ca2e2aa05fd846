"""Which of a run's own checkpoints a recovery takes: the order, the first good one, and why not the others. Pure.

Whoever asks does the verifying: the live run (`Manager.find`) and those who only look (`resumption.choose`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from lastgood import policy
from lastgood.errors import NoCheckpoint
from lastgood.model import Record
from lastgood.ranking import Mode, ranking

UNADOPTED = "written without lastgood: `lastgood adopt` takes it into the run"
"""Why a stock Trainer's checkpoint is passed over in a managed run, however far it is."""

LOST_HEAD = "resume from a step or a path, or delete the file to go on from the newest save; nothing was changed"
"""What there is to do where nobody knows on which branch the run is."""


class Found(msgspec.Struct, frozen=True):
    """The checkpoint to use; those passed over on the way, each with its reason; which of these are damaged."""

    record: Record
    skipped: tuple[tuple[str, str], ...] = ()
    damaged: tuple[str, ...] = ()


class Choice(msgspec.Struct, frozen=True):
    """record: the one to take; None if none is good. skipped: (name, reason) of those tried before it, in order.

    damaged: names of those among them that failed verification.
    """

    record: Record | None
    skipped: tuple[tuple[str, str], ...] = ()
    damaged: tuple[str, ...] = ()


def in_order(
    found: Sequence[Record],
    what: Literal["last", "best"] | int,
    *,
    monitor: str | None = None,
    mode: Mode | None = None,
) -> tuple[Record, ...]:
    """Those that may be meant, in the order in which they are tried: by their numbers, never by clock or name.

    Raises NoCheckpoint for "best" without a metric.
    """
    if what == "last":  # poisoned ones among them: `first_good` says why it passes them over
        return tuple(sorted((r for r in found if r.ours and r.current), key=lambda r: -r.seq))
    if what == "best":
        if monitor is None or mode is None:
            raise NoCheckpoint(
                "which checkpoint is the best is not defined: there is no metric",
                hint="set metric_for_best_model and greater_is_better",
            )
        return ranking(found, monitor, mode)
    return policy.at_step(found, what)


def first_good(
    candidates: Iterable[Record],
    problems: Callable[[Record], Sequence[str]],
    *,
    weights: str = "",
    fall_back: bool = True,
) -> Choice:
    """The first candidate without problems; those behind it aren't read.

    problems: verifies one. weights: why one that holds the weights alone won't do; "" if it will. fall_back: go on to
    the next where one is damaged or poisoned; not where a step was named, for another state than that must not be
    handed out, and who names a poisoned one gets it.
    """
    skipped: list[tuple[str, str]] = []
    damaged: list[str] = []
    for record in candidates:
        if weights and record.state == "weights":
            skipped.append((record.name, weights))
            continue
        if record.poisoned and fall_back:
            skipped.append((record.name, f"poisoned: {record.poisoned}"))
            continue
        faults = problems(record)
        if not faults:
            return Choice(record, tuple(skipped), tuple(damaged))
        skipped.append((record.name, "; ".join(faults[:3])))
        damaged.append(record.name)
        if not fall_back:
            break
    return Choice(None, tuple(skipped), tuple(damaged))
