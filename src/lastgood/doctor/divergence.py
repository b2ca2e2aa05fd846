"""Where two recordings of the same steps part, and what that says about the resume between them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from lastgood.repo.trail import Entry, Life

What = Literal["batch", "loss", "grad_norm", "lr"]
ORDER: tuple[What, ...] = ("batch", "loss", "grad_norm", "lr")
"""The order in which a step makes them: what differs first is the cause, what follows is its effect."""
WORDS: dict[What, str] = {"batch": "batch", "loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}


class Divergence(msgspec.Struct, frozen=True):
    """The first difference. agreed: how many recorded steps before it are equal; means: what is likely wrong."""

    step: int
    what: What
    was: float | str
    now: float | str
    agreed: int
    means: str

    def __str__(self) -> str:
        return (
            f"first differs at step {self.step}: {WORDS[self.what]} {shown(self.was)} recorded, {shown(self.now)} now"
        )


class Relived(msgspec.Struct, frozen=True):
    """A life that trained steps again which were recorded before: how many, and where it left them, if it did."""

    life: int
    start: int
    compared: int
    divergence: Divergence | None


def first_divergence(
    reference: Sequence[Entry], other: Sequence[Entry], *, rtol: float = 0.0, after: int | None = None
) -> Divergence | None:
    """The first step that both recorded and that isn't the same in both; None if there is none.

    rtol: numbers count as equal if they differ by at most this share of the larger one. after: the step of the
    checkpoint between them; without it the first step in common counts as the first after the resume.
    """
    now = {entry.step: entry for entry in other}
    last, agreed = after, 0
    for old in sorted(reference, key=lambda entry: entry.step):
        new = now.get(old.step)
        if new is None:
            continue
        for what in ORDER:
            if not equal(getattr(old, what), getattr(new, what), rtol):
                means = _means(what, old, new, agreed, gap=last is not None and old.step > last + 1)
                return Divergence(old.step, what, getattr(old, what), getattr(new, what), agreed, means)
        agreed, last = agreed + 1, old.step
    return None


def in_common(reference: Iterable[Entry], other: Iterable[Entry]) -> int:
    """How many steps both recorded."""
    return len({entry.step for entry in reference} & {entry.step for entry in other})


def equal(was: float | str | None, now: float | str | None, rtol: float = 0.0) -> bool:
    """Whether nothing speaks against it: what one of them doesn't know is not a difference, and NaN equals NaN."""
    if was in (None, "", now) or now in (None, ""):
        return True
    if not isinstance(was, float) or not isinstance(now, float):
        return False
    return (math.isnan(was) and math.isnan(now)) or math.isclose(was, now, rel_tol=rtol)


def following(lives: Sequence[Life], checkpoint: str, before: int | None = None) -> tuple[Entry, ...]:
    """What was recorded for the steps after a checkpoint (its id, or its name): by the life that wrote it, then by
    those that resumed from it or from what came after it. What was recorded first counts.

    before: leave out the lives from this number on.
    """
    lives = [life for life in lives if before is None or life.number < before]
    home = next((life for life in lives if checkpoint in life.saves), None)
    step = home.saves[checkpoint] if home is not None else None
    known, found = {checkpoint}, dict[int, Entry]()
    for life in lives:
        if life is home:
            start = step or 0
        elif life.checkpoint in known and (home is None or life.number > home.number):
            start = life.start
        else:
            continue
        end = max(found, default=start)
        found |= {entry.step: entry for entry in life.entries if entry.step > max(start, end)}
        known |= {id for id, at in life.saves.items() if at >= start}
    return tuple(found[step] for step in sorted(found))


def relived(lives: Sequence[Life], *, rtol: float = 0.0) -> tuple[Relived, ...]:
    """Every resume whose first steps had been recorded before it, compared with that."""
    found = []
    for life in lives:
        before = following(lives, life.checkpoint, before=life.number) if life.checkpoint else ()
        compared = in_common(before, life.entries)
        if compared:
            divergence = first_divergence(before, life.entries, rtol=rtol, after=life.start)
            found.append(Relived(life.number, life.start, compared, divergence))
    return tuple(found)


def shown(value: float | str | None) -> str:
    """Every digit: bit for bit the same means the same text."""
    return "-" if value is None or value == "" else value if isinstance(value, str) else f"{value:.9g}"


def _means(what: What, old: Entry, new: Entry, agreed: int, *, gap: bool) -> str:
    if what == "batch":
        return (
            "other data in this step: the data itself, its order (seed, sampler, shuffling) or the place in it"
            " isn't what it was"
        )
    if what == "lr":
        return (
            "the same loss and gradient, another learning rate: the scheduler's state, or settings that shape it"
            " (max_steps, warm-up, learning_rate)"
        )
    known = bool(old.batch and new.batch)
    data = "the batch is the same, so " if known else "whether the batch is the same isn't recorded: "
    order = "" if known else "the order of the data, "
    if gap:
        rest = "" if agreed else "the weights, the random state (dropout), "
        return f"{data}{order}{rest}or the optimizer's state; logged too seldom to tell (logging_steps=1 would)"
    if what == "grad_norm":
        return (
            "the same loss, another gradient: the backward pass differs (accumulation, gradient scaling, kernels that"
            " are not deterministic)"
        )
    if agreed == 0:
        return f"{data}{order}the weights are not those that were saved, or dropout drew other random numbers"
    if agreed == 1:
        return (
            f"{data}{order}the update before it was another one: the optimizer's state (momentum, variance) or its"
            " settings"
        )
    return (
        f"{data}{order}after {agreed} equal steps: the random state from here on, settings that act later, or kernels"
        " that are not deterministic"
    )
