"""A place in the data, and its JSON (FORMAT.md, "Position of a loop")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lastgood.errors import CorruptCheckpoint
from lastgood.state import rng, tree
from lastgood.state.own import State
from lastgood.state.tree import JSON
from lastgood.state.walk import Moment, Past


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Where a loop stands: `consumed` batches into an iteration, after `epoch` whole ones.

    here: that iteration, None between two; ahead: batches fetched and not handed out yet -> the moment before each
    fetch; own: what the loader has of its own, now; state: what its state_dict() said; past: the iterations before,
    where worker processes live on; reused: this one, or the next, has worker processes that were there before; lost:
    generators whose states can't all be repeated (see `Draws`).
    """

    epoch: int
    consumed: int = 0
    here: Past | None = None
    ahead: dict[int, Moment] = field(default_factory=dict)
    own: State = field(default_factory=dict)
    state: Any = None
    past: tuple[Past, ...] = ()
    reused: bool = False
    lost: frozenset[str] = frozenset()


def encode(mark: Mark, tensors: dict[str, torch.Tensor], where: str = "data") -> JSON:
    """The JSON for `mark`; tensors in its state go to `tensors`, under names that begin with `where`.

    Raises NotSupported for what needs pickle.
    """
    return {
        "epoch": mark.epoch,
        "consumed": mark.consumed,
        "here": None if mark.here is None else _past(mark.here),
        "ahead": {str(ordinal): _moment(moment) for ordinal, moment in mark.ahead.items()},
        "own": tree.encode(mark.own, {}, "data.own"),
        "state": tree.encode(mark.state, tensors, f"{where}.state"),
        "past": [_past(past) for past in mark.past],
        "reused": mark.reused,
        "lost": sorted(mark.lost),
    }


def decode(value: JSON, tensors: Mapping[str, torch.Tensor]) -> Mark:
    """The inverse of `encode`. Raises CorruptCheckpoint for what isn't one."""
    try:
        return Mark(
            epoch=int(value["epoch"]),
            consumed=int(value["consumed"]),
            here=None if value["here"] is None else _past_of(value["here"]),
            ahead={int(ordinal): _moment_of(moment) for ordinal, moment in value["ahead"].items()},
            own=tree.decode(value["own"], {}),
            state=tree.decode(value["state"], tensors),
            past=tuple(_past_of(past) for past in value["past"]),
            reused=bool(value["reused"]),
            lost=frozenset(value["lost"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpoint(f"the position in the data can't be read: {type(error).__name__} {error}") from error


def _moment(moment: Moment) -> JSON:
    return {"rng": rng.encode(moment.rng), "own": tree.encode(moment.own, {}, "data.own")}


def _moment_of(value: JSON) -> Moment:
    return Moment(rng.decode(value["rng"]), tree.decode(value["own"], {}))


def _past(past: Past) -> JSON:
    known = {str(ordinal): rng.encode(state) for ordinal, state in past.known.items()}
    return {"start": _moment(past.start), "consumed": past.consumed, "known": known, "ended": past.ended}


def _past_of(value: JSON) -> Past:
    known = {int(ordinal): rng.decode(state) for ordinal, state in value["known"].items()}
    return Past(_moment_of(value["start"]), int(value["consumed"]), known, bool(value["ended"]))
