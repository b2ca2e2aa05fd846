"""Leases: what is being evaluated stays as it is; a dead evaluator holds nothing for long; no clock ends one early."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lastgood import pruning
from lastgood.cli.prune import prune
from lastgood.cli.strip import strip
from lastgood.errors import Refused, UsageError
from lastgood.format.tensors import Tensor
from lastgood.manager import Manager
from lastgood.policy import OPTIONS, Keep
from lastgood.repo import gc, journal, leases
from lastgood.repo.layout import boot
from lastgood.repo.read import records
from lastgood.repo.staging import Staging
from lastgood.view import look

import forked


def stage(staging: Staging) -> None:
    staging.tensors("model.safetensors", "model", [Tensor("w", "U8", (64,), memoryview(bytes(64)))])
    staging.data("resume.json", "progress", b"{}")


def saved(
    root: Path, losses: dict[int, float | None], keep: Keep | None = None, *, go_on: bool = False, close: bool = True
) -> Manager:
    """A run with a checkpoint per step, each with its loss."""
    made = Manager(root=root, keep=keep or Keep(), on_error="raise")
    made.open()
    if go_on:
        made.begin_from(made.find("last").record)
    else:
        made.begin_fresh()
    for step, loss in losses.items():
        made.save(step, stage, estimate=1, environment={}, arguments={}, facts={})
        if loss is not None:
            made.record(step, {"eval_loss": loss})
    if close:
        made.close("finished")
    return made


def hold(root: Path, step: int, seconds: float = 600.0) -> leases.Held:
    record = next(r for r in records(root) if r.step == step)
    held = leases.take(root, record.id, record.name, seconds)
    assert held is not None
    return held


def steps(root: Path) -> list[int]:
    return [record.step for record in records(root)]


def test_I10_what_is_being_evaluated_is_neither_deleted_nor_stripped(tmp_path: Path) -> None:
    keep = Keep(last=1, full=1)
    made = saved(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, keep, close=False)
    held = hold(tmp_path, 2)
    expected = [(d.record.step, d.action, d.reasons) for d in pruning.plan(look(tmp_path), dict.fromkeys(OPTIONS))]
    decisions = made.retain()
    assert [(d.record.step, d.action, d.reasons) for d in decisions] == expected, "prune says what the run does"
    assert steps(tmp_path) == [2, 4] and [r.state for r in records(tmp_path)] == ["full", "full"]
    (why,) = decisions[1].reasons
    host, pid = os.uname().nodename, os.getpid()
    assert why.startswith(f"being evaluated by {host}:{pid} until ") and why[-3] == ":"
    held.drop()
    made.retain()
    assert steps(tmp_path) == [4]
    made.close()
    assert os.listdir(tmp_path / ".lastgood" / "leases") == []


def test_I10_no_verb_takes_away_what_is_being_evaluated(tmp_path: Path) -> None:
    saved(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})
    held = hold(tmp_path, 2)
    for options in (["--keep-last", "1"], ["--keep-last", "1", "--full", "1"], ["--to-free", "1"]):
        done = CliRunner().invoke(prune, [str(tmp_path), "--json", "-n", *options])
        rows = {row["step"]: row["action"] for row in json.loads(done.stdout)["decisions"]}
        assert rows[2] == "keep", options
        assert done.exit_code == 0 and (rows[1] != "keep" or rows[3] != "keep")
    done = CliRunner().invoke(strip, ["2", "-C", str(tmp_path), "--yes"])
    assert isinstance(done.exception, Refused) and "being evaluated by" in done.exception.message
    held.drop()
    assert CliRunner().invoke(strip, ["2", "-C", str(tmp_path), "--yes"]).exit_code == 0
    assert [r.state for r in records(tmp_path)] == ["full", "weights", "full", "full"]


def test_I10_nor_on_a_branch_that_was_left(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    made.open()
    made.begin_from(records(tmp_path)[0])
    made.close()
    saved(tmp_path, {4: 1.0}, go_on=True)
    held = hold(tmp_path, 3)
    scope = pruning.Scope(abandoned=True)
    actions = {
        d.record.step: d.action
        for d in pruning.plan(look(tmp_path), {**dict.fromkeys(OPTIONS), "last": 5}, scope=scope)
    }
    assert actions == {1: "keep", 2: "delete", 3: "keep", 4: "keep"}
    held.drop()


def test_a_lease_that_was_taken_after_the_plan_was_made_counts(tmp_path: Path) -> None:
    saved(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    decisions = pruning.plan(look(tmp_path), {**dict.fromkeys(OPTIONS), "last": 1})
    todo = gc.plan([d.record for d in decisions], decisions)
    assert {item.record.step for item in todo.items} == {2}, "3 is the newest and 1 the best"
    held = hold(tmp_path, 2)
    gc.execute(tmp_path, todo)
    assert steps(tmp_path) == [1, 2, 3]
    spared = [event for event in journal.read(tmp_path) if event["event"] == "spared"]
    assert len(spared) == 1 and "being evaluated" in spared[0]["reasons"][0]
    held.drop()


def test_nothing_that_is_gone_can_be_held(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: 1.0, 2: 2.0}, Keep(last=1), close=False)
    first = records(tmp_path)[0]
    made.retain()
    assert leases.take(tmp_path, first.id, first.name, 60) is None
    assert os.listdir(tmp_path / ".lastgood" / "leases") == []
    made.close()


def test_the_place_of_what_is_being_evaluated_is_not_given_to_another(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: 1.0, 2: 2.0})
    held = hold(tmp_path, 2)
    before = (tmp_path / "checkpoint-2" / "lastgood.json").read_bytes()
    made.open()
    made.begin_from(records(tmp_path)[0])
    made.close()
    saved(tmp_path, {2: 5.0}, go_on=True)
    assert (tmp_path / "checkpoint-2" / "lastgood.json").read_bytes() == before
    assert [(r.step, r.current, "." in r.name) for r in records(tmp_path)] == [
        (1, True, False), (2, False, False), (2, True, True),
    ]  # fmt: skip
    held.drop()


def test_a_lease_is_renewed_as_long_as_its_holder_lives(tmp_path: Path) -> None:
    saved(tmp_path, {1: 1.0, 2: 2.0})
    held = hold(tmp_path, 1, leases.SHORTEST)
    first, deadline = held.lease, time.monotonic() + 60
    while held.lease.beat < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held.lease.beat >= 4 and held.lease.uptime > first.uptime + leases.SHORTEST
    assert held.path.exists()
    held.drop()
    held.renew()
    assert os.listdir(tmp_path / ".lastgood" / "leases") == [], "what was dropped doesn't come back"


def killed(root: Path, seconds: float) -> None:
    hold(root, 1, seconds)
    os.kill(os.getpid(), 9)


def test_I10_a_killed_evaluators_lease_counts_until_it_expires(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: 1.0, 2: 2.0}, Keep(last=1), close=False)
    assert forked.run(killed, tmp_path, 600.0, log=tmp_path / "log") == -9
    made.retain()
    assert steps(tmp_path) == [1, 2]
    (name,) = os.listdir(tmp_path / ".lastgood" / "leases")
    (tmp_path / ".lastgood" / "leases" / name).unlink()
    assert forked.run(killed, tmp_path, leases.SHORTEST, log=tmp_path / "log") == -9
    name, *_ = sorted(
        os.listdir(tmp_path / ".lastgood" / "leases"), key=lambda name: name.startswith(".")
    )  # if renewing
    left = json.loads((tmp_path / ".lastgood" / "leases" / name).read_text())["uptime"]
    while time.monotonic() <= left:  # as the machine counts
        time.sleep(0.02)
    made.retain()
    assert steps(tmp_path) == [2] and os.listdir(tmp_path / ".lastgood" / "leases") == [], "and is swept"
    made.close()


def forker(root: Path) -> None:
    held = hold(root, 1)
    pid = os.fork()
    if pid == 0:
        held.drop()  # as the end of an iteration that was copied into a worker would
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(os.listdir(root / ".lastgood" / "leases")) == 1
    held.drop()
    assert os.listdir(root / ".lastgood" / "leases") == []


def test_a_forked_worker_does_not_drop_its_parents_lease(tmp_path: Path) -> None:
    saved(tmp_path, {1: 1.0})
    assert forked.run(forker, tmp_path, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()


LEASE = leases.Lease(host="elsewhere", pid=1, until=0.0, seconds=600.0, boot="another", uptime=0.0)
NAME = f"{'0' * 16}.{'0' * 8}"


@given(st.floats(-1e10, 1e10), st.floats(60, 1e6) | st.floats(-1e6, -60))
def test_on_the_machine_of_its_holder_only_the_time_since_boot_counts(until: float, left: float) -> None:
    lease = msgspec.structs.replace(LEASE, boot=boot(), until=until, uptime=time.monotonic() + left)
    assert leases.expired(NAME, lease, leases.Sightings()) == leases.expired(NAME, lease) == (left < 0)


@given(st.floats(-1e10, 1e10), st.lists(st.booleans(), max_size=5))
def test_a_process_that_goes_on_never_ends_another_machines_lease_by_its_clock(until: float, looks: list[bool]) -> None:
    sightings, lease = leases.Sightings(), msgspec.structs.replace(LEASE, until=until)
    for renewed in looks:
        lease = msgspec.structs.replace(lease, beat=lease.beat + renewed)
        assert not leases.expired(NAME, lease, sightings)
    lease = msgspec.structs.replace(lease, beat=99)
    assert not leases.expired(NAME, lease, sightings), "just renewed"
    before, seen = sightings.seen[NAME]
    sightings.seen[NAME] = (before, seen - 601)  # ten minutes ago
    assert leases.expired(NAME, lease, sightings)
    assert not leases.expired(NAME, msgspec.structs.replace(lease, beat=100), sightings)


@given(st.floats(-leases.GRACE + 60, 1e6))
def test_who_looks_once_gives_an_hour(ahead: float) -> None:
    lease = msgspec.structs.replace(LEASE, until=time.time() + ahead)
    assert not leases.expired(NAME, lease)
    assert leases.expired(NAME, msgspec.structs.replace(lease, until=time.time() - leases.GRACE - 1))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"null", b"\xff" * 50, b'{"host": 1}', b"[" * 100000,
     json.dumps({**msgspec.to_builtins(LEASE), "seconds": 1e18}).encode(),
     json.dumps({**msgspec.to_builtins(LEASE), "until": 1e300, "seconds": 60}).encode()],
)  # fmt: skip
def test_no_content_of_a_lease_stops_a_run(tmp_path: Path, content: bytes) -> None:
    made = saved(tmp_path, {1: 1.0, 2: 2.0}, Keep(last=1), close=False)
    folder = tmp_path / ".lastgood" / "leases"
    folder.mkdir()
    record = records(tmp_path)[0]
    for name in (f"{record.id}.00000000", "nonsense", f".{record.id}.00000000.12345678"):
        (folder / name).write_bytes(content)
    look(tmp_path).decisions()
    made.retain()
    made.close()
    saved(tmp_path, {3: 1.0}, Keep(last=1), go_on=True)


def test_a_lease_that_is_there_and_cannot_be_read_counts(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: 1.0, 2: 2.0}, Keep(last=1), close=False)
    # Not by its mode: root reads everything.
    (tmp_path / ".lastgood" / "leases" / f"{records(tmp_path)[0].id}.00000000").mkdir(parents=True)
    made.retain()
    assert steps(tmp_path) == [1, 2]
    made.close()


@pytest.mark.parametrize("seconds", [0, -1, 0.5, True, "60", None, float("nan"), float("inf"), 1e9])
def test_what_is_no_length_of_a_lease(tmp_path: Path, seconds: Any) -> None:
    saved(tmp_path, {1: 1.0})
    with pytest.raises(UsageError, match="seconds long"):
        leases.take(tmp_path, records(tmp_path)[0].id, "checkpoint-1", seconds)
