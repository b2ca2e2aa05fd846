"""The table of operations: what is done, to which run, and what may be gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lastgood.repo import bin, leases, pins
from lastgood.repo.read import records

from faults.acts import (
    answer,
    check_out,
    empty,
    evaluate,
    first_save,
    go_back,
    mark,
    move_tag,
    next_save,
    note,
    note_down,
    prune_mixed,
    prune_now,
    prune_two,
    record_metric,
    recover,
    save_again,
    save_and_prune,
    save_and_prune_behind,
    save_and_strip,
    save_behind,
    save_on_a_branch,
    set_aside,
    start_again,
    strip_two,
    tag,
    take_in,
    undo,
    untag,
)
from faults.later import save_and_free, save_lazily, save_spoilt
from faults.runs import (
    adopted,
    asked,
    branched,
    left_over,
    nameless,
    nothing,
    pruned,
    stock,
    stripped,
    tagged,
    three,
)
from faults.small import steps


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing to do to a run. may_go: steps that may be gone from the listing afterwards.

    floor: the step that a resume finds at least, whatever happens (0: there need be none). done: what holds once it
    has returned, by what is on disk. lasting: what of that a power cut can't take away, if not all
    of it: what was deleted may be back, as a whole.
    """

    act: Callable[[Path], None]
    before: Callable[[Path], None] = three
    may_go: frozenset[int] = frozenset()
    floor: int = 3
    done: Callable[[Path], bool] = lambda root: True
    lasting: Callable[[Path], bool] | None = None

    @property
    def by_hand(self) -> bool:
        """Whether the command line does it, which explains what the system says; a training has to do so itself."""
        return self.act not in LIVE

    @property
    def name(self) -> str:
        """Unique, for the text of a point."""
        return f"{self.act.__name__}({self.before.__name__})"


def _has(*wanted: int) -> Callable[[Path], bool]:
    return lambda root: steps(root) == sorted(wanted)


def _at(step: int) -> Callable[[Path], bool]:
    """Where the run stands: the newest on its branch."""
    return lambda root: max((r for r in records(root) if r.good), key=lambda r: r.seq).step == step


def _new(step: int) -> Callable[[Path], bool]:
    return lambda root: step in steps(root)


def _full(*wanted: int) -> Callable[[Path], bool]:
    return lambda root: [r.step for r in records(root) if r.ours and r.state == "full"] == sorted(wanted)


def _names(root: Path) -> dict[int, tuple[str, ...]]:
    found = pins.read(root)
    return {record.step: found[record.id] for record in records(root) if record.id in found}


LIVE = (
    first_save, next_save, save_and_prune, save_and_strip, save_again, save_on_a_branch, go_back, start_again,
    recover, note_down, answer, save_behind, save_and_prune_behind, save_lazily,
    save_spoilt, save_and_free,
)  # fmt: skip
"""What a training does."""

OPERATIONS: Sequence[Operation] = (
    Operation(first_save, nothing, floor=0, done=_has(1)),
    Operation(next_save, done=_has(1, 2, 3, 4)),
    Operation(next_save, tagged, done=_has(1, 2, 3, 4)),
    Operation(next_save, adopted, floor=4, done=_new(4)),
    Operation(save_and_prune, may_go=frozenset({1, 2}), done=_has(3, 4), lasting=_new(4)),
    Operation(save_behind, done=_has(1, 2, 3, 4)),
    Operation(save_and_prune_behind, may_go=frozenset({1, 2}), done=_has(3, 4), lasting=_new(4)),
    Operation(save_lazily, done=_has(1, 2, 3, 4)),
    Operation(save_spoilt, done=_has(1, 2, 3)),
    Operation(save_and_free, may_go=frozenset({1}), done=_full(4), lasting=_new(4)),
    Operation(save_and_prune, tagged, may_go=frozenset({2}), done=_has(1, 3, 4), lasting=_new(4)),
    Operation(save_and_strip, may_go=frozenset({1}), done=_full(4), lasting=_new(4)),
    Operation(save_again, done=_has(1, 2, 3, 3)),
    Operation(save_on_a_branch, floor=1, done=_has(1, 2, 2, 3)),
    Operation(next_save, branched, floor=1, done=_has(1, 2, 3, 4)),
    Operation(go_back, floor=1, done=_at(1)),
    Operation(start_again, may_go=frozenset({1, 2, 3}), floor=0, done=_has(5)),
    Operation(set_aside, may_go=frozenset({3}), floor=2, done=_has(1, 2)),
    Operation(recover, left_over, done=_has(2, 3)),
    Operation(recover, nameless, done=_has(1, 2, 3)),
    Operation(note_down, done=_has(1, 2, 3, 4)),
    Operation(tag, tagged, done=lambda root: _names(root) == {1: ("release", "paper"), 2: ("candidate",)}),
    Operation(move_tag, tagged, done=lambda root: _names(root) == {1: ("release",), 3: ("paper",)}),
    Operation(untag, tagged, done=lambda root: _names(root) == {1: ("release",)}),
    Operation(note, tagged, done=lambda root: list(pins.read_notes(root).values()) == ["after the spike"]),
    Operation(record_metric, tagged, done=lambda root: records(root)[1].metrics["mmlu"] == 0.6),
    Operation(mark, tagged, done=lambda root: bool(records(root)[1].poisoned)),
    Operation(take_in, stock, floor=0, done=_has(10, 20, 30)),
    Operation(prune_two, may_go=frozenset({1, 2}), done=_has(3)),
    Operation(prune_two, adopted, may_go=frozenset({10, 20}), floor=30, done=_has(30)),
    Operation(prune_mixed, may_go=frozenset({1}), done=_full(3)),
    Operation(prune_mixed, adopted, may_go=frozenset({10}), floor=30, done=_full(30)),
    Operation(prune_now, may_go=frozenset({1, 2}), done=_has(3), lasting=_new(3)),
    Operation(strip_two, done=_full(3)),
    Operation(strip_two, adopted, floor=30, done=_full(30)),
    Operation(undo, pruned, done=_has(1, 2, 3)),
    Operation(undo, stripped, done=_full(1, 2, 3)),
    Operation(empty, pruned, done=lambda root: bin.size(root) == 0, lasting=_new(3)),
    Operation(check_out, done=lambda root: (root / "copies" / "copy" / "model.safetensors").exists()),
    Operation(evaluate, done=lambda root: not leases.in_force(root)),
    Operation(answer, asked, done=_new(4)),
)
