"""What prune and strip put in the trash comes back as it was, also after a crash at any call."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lastgood import policy
from lastgood.cli import adopt as adopting
from lastgood.cli.held import held
from lastgood.errors import NoCheckpoint
from lastgood.format import guard
from lastgood.manager import Manager
from lastgood.model import Record, on_lineage
from lastgood.policy import Decision, Keep
from lastgood.repo import bin, gc, verify
from lastgood.repo.adopt import adopt
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from lastgood.view import look
from test_crash_points import THROUGH, die, manager, save, struck
from test_parity import memory

import forked
from faults.runs import stock


def tree(root: Path) -> dict[str, bytes]:
    """Everything outside of the hidden directory; empty directories too."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in root.rglob("*")
        if HIDDEN not in path.relative_to(root).parts
    }


def execute(root: Path, decisions: Sequence[Decision], what: str) -> bool:
    """As the verbs do; False if there was nothing to do."""
    with held(root, False):
        todo = gc.plan(records(root), decisions)
        if todo.items:
            gc.execute(root, todo, undoable=bin.begin(root, what))
        return bool(todo.items)


def prune(root: Path, **keep: Any) -> bool:
    return execute(root, policy.decide(look(root).records, Keep(**keep), protect=look(root).protect), "prune")


def strip(root: Path, steps: Sequence[int] = (1, 2)) -> bool:
    found = [r for r in records(root) if r.state == "full" and r.step in steps and r != policy.latest(records(root))]
    return execute(root, [Decision(r, "strip", ("asked for",)) for r in found], "strip")


def undo(root: Path) -> list[str]:
    with held(root, False):
        return bin.undo(root)


def go_back(root: Path) -> None:
    """Resume from the oldest full checkpoint and save the next step: a step that is there already is saved again."""
    made = Manager(root=root, on_error="raise")
    made.open()
    record = next(r for r in records(root) if r.state == "full")
    made.begin_from(record)
    save(made, record.step + 1)
    made.close()


def go_on(root: Path) -> None:
    made = manager(root)
    save(made, max(r.step for r in records(root)) + 1)
    made.close()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("prune"), st.fixed_dictionaries({"last": st.integers(1, 3), "full": st.integers(1, 2)})),
        st.tuples(st.just("strip"), st.lists(st.integers(1, 5), min_size=1, max_size=3)),
        st.tuples(st.sampled_from(["undo", "undo", "go_on", "go_back", "empty"]), st.none()),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS)
def test_undo_brings_everything_back(actions: list[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory(dir=memory()) as folder, mock.patch("os.fsync", return_value=None):
        root = Path(folder)
        made = manager(root)
        for step in (1, 2, 3, 4):
            save(made, step)
        made.close()
        before: list[dict[str, bytes] | None] = []  # one per operation in the trash; None: a save came after it
        there = {r.id: r.state for r in records(root)}
        for what, how in actions:
            now = tree(root)
            if what == "prune":
                before += [now] if prune(root, **how) else []
            elif what == "strip":
                before += [now] if strip(root, how) else []
            elif what == "undo" and before:
                assert undo(root)
                expected = before.pop()
                assert expected is None or tree(root) == expected
            elif what == "empty":
                bin.empty(root)
                before.clear()
                there = {r.id: r.state for r in records(root)}
            elif what == "go_on":
                go_on(root)
            elif what == "go_back":
                go_back(root)
            if what.startswith("go_"):
                before = [None for _ in before]
                there |= {r.id: r.state for r in records(root) if r.id not in there}
            intact(root)
        for expected in reversed(before):
            undo(root)
            assert expected is None or tree(root) == expected
        assert {r.id: r.state for r in records(root)} == there, "all that was ever saved is there, and as it was"
        with pytest.raises(NoCheckpoint, match="nothing to undo"):
            undo(root)
        intact(root)


def intact(root: Path) -> None:
    found = records(root)
    assert [r.name for r in found if not r.ours] == []
    for record in found:
        assert verify.problems(root, record, full=True) == (), record.name
    assert len({r.seq for r in found}) == len(found)


def test_undo_after_a_save_of_the_same_step_keeps_both(tmp_path: Path) -> None:
    three(tmp_path)
    old = {r.step: r.id for r in records(tmp_path)}
    prune(tmp_path, last=1)
    made = Manager(root=tmp_path, on_error="raise")
    made.open()
    made.begin_from(records(tmp_path)[-1])
    save(made, 2)
    made.close()
    assert undo(tmp_path) == ["checkpoint-1 is back", f"checkpoint-2.{old[2][:8]} is back"]
    assert [r.step for r in records(tmp_path)] == [1, 2, 2, 3]
    intact(tmp_path)


def test_undo_of_a_strip_finds_what_moved_aside(tmp_path: Path) -> None:
    three(tmp_path)
    old = records(tmp_path)[1]
    strip(tmp_path, [2])
    go_back(tmp_path)
    assert undo(tmp_path) == [f"checkpoint-2.{old.id[:8]} is full again"]
    assert [r.state for r in records(tmp_path)] == ["full"] * 4
    intact(tmp_path)


def test_undo_of_a_strip_leaves_alone_what_is_not_there_as_a_whole(tmp_path: Path) -> None:
    three(tmp_path)
    strip(tmp_path, [2])
    next((tmp_path / HIDDEN / "undo").rglob("optimizer.safetensors")).unlink()
    assert undo(tmp_path) == ["checkpoint-2 stays as it is: optimizer.safetensors can't be brought back"]
    assert [r.state for r in records(tmp_path)] == ["full", "weights", "full"]
    intact(tmp_path)


# ---- crashes ---------------------------------------------------------------------------------


def three(root: Path) -> None:
    made = manager(root)
    for step in (1, 2, 3):
        save(made, step)
    made.close()


def take_in(root: Path) -> None:
    with held(root, False):
        adopt(root, adopting.candidates(look(root))[0])


def adopted(root: Path) -> None:
    stock(root)
    take_in(root)


def prune_two(root: Path) -> None:
    prune(root, last=1)


def prune_mixed(root: Path) -> None:
    prune(root, last=2, full=1)


def strip_all(root: Path) -> None:
    strip(root, (1, 2, 10, 20))


def pruned(prepare: Callable[[Path], None], verb: Callable[[Path], None]) -> Callable[[Path], None]:
    def prepared(root: Path) -> None:
        prepare(root)
        verb(root)

    return prepared


def both_ways(root: Path, log: Path, verb: Callable[[Path], Any], point: int, when: str) -> int:
    """Run the verb in a child that is killed at its `point`-th call; its exit status."""

    def child() -> None:
        with struck(point, die(when)) as count:
            verb(root)
        if count[0] < point:
            raise SystemExit(THROUGH)

    status = forked.run(child, log=log)
    assert status in (-signal.SIGKILL, 0, THROUGH), log.read_text()
    return status


def killed_everywhere(
    tmp_path: Path, original: Path, verb: Callable[[Path], Any], when: str, look_at: Callable[[Path], None]
) -> None:
    # Every fifth call, the two kinds of kills in turns: EVERY_POINT=1 takes them all. test_faults.py crashes at others.
    every = int(os.environ.get("EVERY_POINT", "5"))
    point, status, kills = (0 if when == "torn" else 1 - every), 0, 0
    while status != THROUGH:
        point += every
        root = tmp_path / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original, root)
        status = both_ways(root, tmp_path / "log", verb, point, when)
        kills += status == -signal.SIGKILL
        look_at(root)
    assert kills > 8 // every, "the verb was hardly ever interrupted"


def unmanaged(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(root).items() if not name.endswith("lastgood.json")}


@pytest.mark.parametrize("when", ["before", "torn"])
@pytest.mark.parametrize("verb", [prune_two, prune_mixed, strip_all], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("prepare", [three, adopted], ids=lambda prepare: prepare.__name__)
def test_I1_I3_prune_and_strip_killed_at_every_call(
    prepare: Callable[[Path], None], verb: Callable[[Path], None], when: str, quick: Path
) -> None:
    original, finished = quick / "original", quick / "finished"
    original.mkdir()
    prepare(original)
    before, whole = states(original), tree(original)
    shutil.copytree(original, finished)
    verb(finished)

    def look_at(root: Path) -> None:
        sound(root, states(finished))
        twice = root.with_name("twice")
        shutil.rmtree(twice, ignore_errors=True)
        shutil.copytree(root, twice)
        verb(twice)
        assert tree(twice).keys() == tree(finished).keys(), "running it again completes it"
        assert states(twice) == states(finished)
        sound(twice, states(finished))
        for place in (root, twice):  # undo everything, whether it was completed or not
            while bin.operations(place):
                undo(place)
            assert tree(place) == whole
            assert states(place) == before
            sound(place, before)

    killed_everywhere(quick, original, verb, when, look_at)


@pytest.mark.parametrize("when", ["before", "torn"])
@pytest.mark.parametrize("verb", [prune_two, prune_mixed, strip_all], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("prepare", [three, adopted], ids=lambda prepare: prepare.__name__)
def test_I1_I3_undo_killed_at_every_call(
    prepare: Callable[[Path], None], verb: Callable[[Path], None], when: str, quick: Path
) -> None:
    original, whole = quick / "original", quick / "whole"
    whole.mkdir()
    prepare(whole)
    shutil.copytree(whole, original)
    verb(original)
    least = states(original)

    def look_at(root: Path) -> None:
        sound(root, least)
        if prepare is three:  # a training that begins in between takes nothing away
            between = manager(root)
            between.close()
            sound(root, least)
        if bin.operations(root):
            undo(root)
        assert tree(root) == tree(whole)
        assert states(root) == states(whole)

    killed_everywhere(quick, original, undo, when, look_at)


def states(root: Path) -> dict[str, str]:
    return {r.id: r.state for r in records(root)}


def sound(root: Path, least: dict[str, str]) -> None:
    """No husk, everything that is there is good, and what was to stay is there, as full as it was to be."""
    found: dict[str, Record] = {r.id: r for r in records(root)}
    assert all(r.ours for r in found.values()), "no husk"
    for record in found.values():
        assert verify.problems(root, record, full=True) == ()
    for id, state in least.items():
        assert id in found and (state == "weights" or found[id].state == "full")


def test_a_stripped_adopted_checkpoint_has_guards_until_undo(tmp_path: Path) -> None:
    adopted(tmp_path)
    before = tree(tmp_path)
    strip(tmp_path, (10,))
    place = tmp_path / "checkpoint-10"
    for name in guard.NAMES:
        assert (place / name).read_bytes() == guard.content(name)
    assert not (place / "rng_state.pth").exists() and (place / "trainer_state.json").exists()
    assert undo(tmp_path) == ["checkpoint-10 is full again"]
    assert tree(tmp_path) == before


def own_and_stock(root: Path) -> None:
    three(root)
    stock(root)


def two_chains(root: Path) -> None:
    stock(root)
    late = root / "later"
    stock(late, (15, 25))
    for path in late.iterdir():
        state = json.loads((path / "trainer_state.json").read_text())
        state["log_history"] = [{**row, "eval_loss": 7.0} for row in state["log_history"]]
        (path / "trainer_state.json").write_text(json.dumps(state))
        path.rename(root / path.name)
    late.rmdir()


@pytest.mark.parametrize("when", ["before", "torn"])
@pytest.mark.parametrize("prepare", [stock, own_and_stock, two_chains], ids=lambda prepare: prepare.__name__)
def test_adopt_killed_at_every_call(prepare: Callable[[Path], None], when: str, quick: Path) -> None:
    original, finished = quick / "original", quick / "finished"
    original.mkdir()
    prepare(original)
    shutil.copytree(original, finished)
    take_in(finished)
    theirs = unmanaged(original)
    newest = policy.latest(records(finished))
    assert newest is not None and newest.name == ("checkpoint-3" if prepare is own_and_stock else "checkpoint-30")

    def look_at(root: Path) -> None:
        left = {name for name in unmanaged(root) if name.rpartition("/")[2].startswith(".lastgood.json.")}
        assert {name: data for name, data in unmanaged(root).items() if name not in left} == theirs
        assert all(r.ours or r.state == "stock" for r in records(root))
        at_once = policy.latest(records(root))
        if prepare is own_and_stock:
            assert at_once is not None and at_once.name == "checkpoint-3", "the run's own stay current"
        take_in(root)
        assert shape(records(root)) == shape(records(finished)), "running it again goes on with the rest"
        sound(root, {})

    killed_everywhere(quick, original, take_in, when, look_at)


def shape(found: Sequence[Record]) -> Any:
    """Everything but the numbers and ids: a run that was cut short has used up some of them."""
    names = {record.id: record.name for record in found}
    way = {r.name: [o.name for o in found if r.manifest and on_lineage(o.seq, r.manifest.lineage)] for r in found}
    parents = {r.name: names.get(r.manifest.parent or "") if r.manifest else None for r in found}
    return [(r.name, r.state, r.current, r.metrics, way[r.name], parents[r.name]) for r in found]


@pytest.mark.parametrize("link", [".lastgood/trash", ".lastgood/tmp", ".lastgood"])
def test_I22_a_sweep_never_follows_a_link_out_of_the_run(link: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for place in ("", "tmp", "trash"):
        (outside / place / "precious").mkdir(parents=True)
        (outside / place / "precious" / "file").write_text("not ours")
    root = tmp_path / "run"
    three(root)
    shutil.rmtree(root / link, ignore_errors=True)
    (root / link).symlink_to(outside)
    gc.sweep(root)
    assert len(list(outside.rglob("file"))) == 3
