"""What a run directory has to hold, in memory: plain values, and for each operation what is there after it.

Written from what lastgood promises, without its code: no disk, no clock, no numbers of saves. The order is the one in
which things happened, and where a checkpoint stands is the set of those that led to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lastgood.policy import Keep


@dataclass(frozen=True)
class Kept:
    """A checkpoint. way: ids of those that led to it, its own included. damage: what was done to its weights."""

    id: str
    run: str
    step: int
    order: int
    way: frozenset[str]
    full: bool = True
    poisoned: str = ""
    names: frozenset[str] = frozenset()
    loss: float | None = None
    damage: str = ""  # "flipped": the hashes tell; "cut": the sizes tell
    stock: bool = False


@dataclass
class Model:
    """there: all that carries a manifest, of this run and of those before. way: where the run stands.

    bin: per operation the checkpoints that were moved there, as they were, and the ids of those that were stripped.
    """

    run: str = ""
    there: dict[str, Kept] = field(default_factory=dict)
    way: frozenset[str] = frozenset()
    leased: frozenset[str] = frozenset()
    bin: tuple[tuple[Mapping[str, Kept], frozenset[str]], ...] = ()
    count: int = 0

    def copy(self) -> Model:
        return replace(self, there=dict(self.there))

    # ---- what is where -------------------------------------------------------------------

    def ours(self) -> list[Kept]:
        """Of this run and readable, oldest first."""
        return sorted((k for k in self.there.values() if k.run == self.run and k.damage != "cut"), key=_order)

    def mine(self) -> list[Kept]:
        """On the branch that the run is on and healthy, newest first."""
        return [k for k in reversed(self.ours()) if k.id in self.way and not k.poisoned]

    def last(self) -> Kept | None:
        return next((k for k in self.mine() if k.full and not k.damage), None)

    def ranked(self) -> list[Kept]:
        known = [k for k in self.mine() if k.loss is not None and math.isfinite(k.loss)]
        return sorted(known, key=lambda k: (k.loss, -k.order))

    def best(self) -> Kept | None:
        """With everything that a resume needs."""
        return next((k for k in self.ranked() if k.full and not k.damage), None)

    def at(self, step: int) -> Kept | None:
        here = [k for k in reversed(self.ours()) if k.step == step]
        full = [k for k in ([k for k in here if k.id in self.way] or here) if k.full]
        return full[0] if full and not full[0].damage else None

    def held(self, kept: Kept) -> bool:
        return bool(kept.names) or kept.id in self.leased

    def tip(self) -> str:
        """Where the next save goes on from; it may stay, whatever the policy says."""
        return max((k for k in self.ours() if k.id in self.way), key=_order, default=_NOBODY).id

    # ---- what happens --------------------------------------------------------------------

    def add(self, id: str, step: int, way: Iterable[str], **facts: object) -> Kept:
        self.count += 1
        kept = Kept(id, self.run, step, self.count, frozenset([*way, id]), **facts)  # type: ignore[arg-type]
        self.there[id] = kept
        return kept

    def save(self, id: str, step: int, **facts: object) -> None:
        self.way = self.add(id, step, self.way, **facts).way

    def change(self, id: str, **facts: object) -> None:
        self.there[id] = replace(self.there[id], **facts)  # type: ignore[arg-type]

    def name(self, id: str, name: str, *, moves: bool) -> None:
        for kept in list(self.there.values()):
            if kept.id == id or moves:
                self.change(kept.id, names=kept.names - {name} | ({name} if kept.id == id else set()))

    def fate(self, keep: Keep, damaged: frozenset[str] = frozenset()) -> tuple[set[str], set[str]]:
        """Ids that the policy deletes, and those that it strips. damaged: found out, they don't count."""
        mine = [k for k in self.mine() if k.id not in damaged]
        ranked = [k for k in self.ranked() if k.id not in damaged]
        latest = next((k for k in mine if k.full), None)
        wanted = {k.id for k in [latest, *ranked[: max(1, keep.best or 0)], *mine[: keep.last or 0]] if k}
        wanted |= {k.id for k in mine if keep.unlimited or (keep.every and k.step % keep.every == 0)}
        if keep.total and mine:
            others = [k for k in [*ranked, *(k for k in mine if k not in ranked)] if k is not mine[0]]
            wanted |= {k.id for k in [mine[0], *others][: keep.total]}
        stay = [k.id for k in mine if k.full and (k.id in wanted or self.held(k))][: keep.full]
        gone = {k.id for k in mine if k.id not in wanted and not self.held(k)}
        light = {k.id for k in mine if k.full and k.id not in gone and k.id not in stay and not self.held(k)}
        light -= {latest.id} if latest else set()
        sick = [k for k in self.ours() if k.poisoned and not self.held(k) and not keep.unlimited]
        newest = latest or next(iter(mine), None)
        last_sick = max((k.order for k in self.ours() if k.poisoned and k.id in self.way), default=0)
        for kept in sick:
            if (newest and newest.order > kept.order) or (kept.id in self.way and kept.order < last_sick):
                gone.add(kept.id)
        return gone, light

    def remove(self, gone: set[str], light: set[str], *, undoable: bool) -> None:
        moved = {id: self.there.pop(id) for id in sorted(gone)}
        for id in light:
            self.change(id, full=False)
        if undoable:
            self.bin = (*self.bin, (moved, frozenset(light)))

    def undo(self) -> None:
        *rest, (moved, light) = self.bin
        self.bin = tuple(rest)
        self.there |= moved
        for id in light & self.there.keys():
            if self.there[id].damage != "cut":
                self.change(id, full=True)

    def called(self, old: str, new: str) -> None:
        """What an operation brings gets its id when it is there."""

        def swap(ids: frozenset[str]) -> frozenset[str]:
            return frozenset(new if id == old else id for id in ids)

        self.way = swap(self.way)
        self.there = {
            (new if k.id == old else k.id): replace(k, id=new if k.id == old else k.id, way=swap(k.way))
            for k in self.there.values()
        }


def _order(kept: Kept) -> int:
    return kept.order


_NOBODY = Kept("", "", 0, 0, frozenset())
