"""What goes for a save before it is there: nothing that the policy wouldn't let go behind it, nor the last good one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lastgood.manager import Manager
from lastgood.model import FileEntry, Manifest, Record
from lastgood.policy import Decision, Keep, decide, latest
from lastgood.ranking import best
from lastgood.repo import gc, verify
from lastgood.repo.read import records
from lastgood.repo.staging import Staging
from lastgood.room import Amount, in_advance, needed

from faults import space


def big(root: Path, keep: Keep, steps: range, size: int, **options: Any) -> Manager:
    made = Manager(root=root, keep=keep, **options)
    made.open()
    found = [record for record in records(root) if record.ours]
    made.begin_from(found[-1]) if found else made.begin_fresh()

    def write(staging: Staging) -> None:
        staging.data("model.bin", "model", b"weights")
        staging.data("optimizer.safetensors", "optimizer", os.urandom(size))
        staging.data("resume.json", "progress", b"{}")

    for step in steps:
        made.save(step, write, estimate=size, environment={}, arguments={}, facts={})
        made.retain()
    return made


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(), [1, 2, 3]),  # keep everything: nothing is ever deleted for space
        (Keep(last=3), [4, 5, 6]),
        (Keep(last=2, monitor="loss"), [1, 5, 6]),  # the best stays
        (Keep(last=5, full=2), [2, 3, 4, 5, 6]),  # weights of old ones
    ],
)
def test_I10_a_save_takes_the_room_of_what_goes_anyway(keep: Keep, left: list[int], small: Path) -> None:
    """47 MiB beside the reserve: three checkpoints of 15 MiB and no fourth."""
    root = small / "run"
    made = big(root, keep, range(1, 2), 15 << 20)
    if keep.monitor:
        made.record(1, {"loss": 0.1})
    made.close()
    if keep.full:
        big(root, keep, range(2, 4), 15 << 20).close()
        states = {record.step: record.state for record in records(root)}
        assert states == {1: "weights", 2: "full", 3: "full"}
    made = big(root, keep, range(4 if keep.full else 2, 7), 15 << 20)
    made.close()
    there = [record for record in records(root) if record.ours]
    assert [record.step for record in there] == left
    assert verify.problems(root, there[-1], full=True) == ()


def test_I10_a_damaged_newest_one_does_not_count_as_the_last_good_one(small: Path, caplog: Any) -> None:
    root = small / "run"
    made = big(root, Keep(last=2), range(1, 3), 15 << 20)
    path = root / "checkpoint-2" / "optimizer.safetensors"
    with open(path, "r+b") as file:
        file.write(b"damaged")
    made.close()
    space.leave(small, pages=(25 << 20) // space.PAGE)
    made = big(root, Keep(last=2), range(3, 4), 15 << 20)
    assert [record.step for record in made.records()] == [1, 2], "the only whole one stays, and the save is left out"
    assert "NO CHECKPOINT at step 3" in caplog.text
    made.close()


def record(seq: int, *, state: Any = "full", pinned: bool = False, loss: float | None = None) -> Record:
    parts = {"model": ("w",), **({"progress": ("o",)} if state == "full" else {})}
    files = {"w": FileEntry(10, ""), **({"o": FileEntry(20, "")} if state == "full" else {})}
    manifest = Manifest(
        format=1, id=f"{seq:016x}", run="r", step=seq, seq=seq, lineage=((1, seq),), parts=parts, files=files
    )
    return Record(
        name=f"checkpoint-{seq}", step=seq, state=state, manifest=manifest, metrics={} if loss is None else {"l": loss},
        pinned=("mine",) if pinned else (),
    )  # fmt: skip


@st.composite
def runs(draw: Any) -> tuple[list[Record], Keep, int, set[str]]:
    count = draw(st.integers(1, 7))
    found = [
        record(
            seq,
            state=draw(st.sampled_from(["full", "full", "weights"])),
            pinned=draw(st.booleans()) and draw(st.booleans()),
            loss=draw(st.none() | st.floats(0, 1)),
        )
        for seq in range(1, count + 1)
    ]
    number = st.none() | st.integers(1, 4)
    keep = Keep(last=draw(number), full=draw(number), every=draw(number), monitor="l", mode="min")
    return found, keep, draw(st.integers(0, 120)), {r.id for r in found if draw(st.integers(0, 3)) == 0}


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(runs())
def test_I10_only_what_goes_anyway_goes_first_and_never_what_is_held(case: tuple[Any, ...]) -> None:
    found, keep, short, protect = case
    proven = latest(found)
    if proven is None:
        return
    coming = record(len(found) + 1)

    def gain(decision: Decision) -> Amount:
        return Amount(gc.gain(decision), 1)

    def ahead(wanted: int) -> tuple[Decision, ...]:
        amount = Amount(wanted, 0)
        return in_advance(found, keep, coming, proven, short=amount, gain=gain, protect=protect)

    todo = ahead(short)
    behind = {d.record.name: d.action for d in decide([*found, coming], keep, protect=protect)}
    winner = best(found, "l", "min")
    for decision in todo:
        one = decision.record
        assert behind[one.name] == decision.action != "keep" and len(decision.reasons) >= 2
        assert one not in (proven, winner) and not one.pinned and one.id not in protect and one.seq < proven.seq
    order = [(d.action != "strip", d.record.seq) for d in todo]
    assert order == sorted(order), "weights of old ones first"
    assert sum(gc.gain(d) for d in todo) >= short or not todo
    assert sum(gc.gain(d) for d in todo[:-1]) < short or not todo, "no more than needed"
    if keep.unlimited and keep.full is None:
        assert not todo
    if not todo and short:  # in vain nothing goes: but then there really wasn't enough
        free = [r for r in found if r.seq < proven.seq and r != winner]
        assert sum(gc.gain(Decision(r, behind[r.name], ())) for r in free) < short  # type: ignore[arg-type]


@given(st.integers(0, 1000), st.integers(0, 1000), st.booleans())
def test_I14_a_save_needs_at_least_what_the_last_one_took(estimate: int, last: int, own: bool) -> None:
    need = needed(estimate, Amount(last, 7), own=own)
    assert need.bytes >= estimate
    assert need.bytes >= last if own else need.bytes == max(estimate, last if estimate * 2 >= last else 0)
