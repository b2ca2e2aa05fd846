"""`lastgood bisect`: by losses, by the tensors, by a command."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood.format.tensors import Tensor
from lastgood.halves import Verdict, search
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import trail
from lastgood.repo.read import records
from lastgood.repo.staging import Staging
from lastgood.repo.trail import Entry

import cli


@given(st.integers(0, 40), st.integers(0, 40), st.sets(st.integers(0, 39)))
def test_the_search_finds_the_border_and_asks_little(count: int, border: int, untold: set[int]) -> None:
    """Good before `border`, bad from there on; of some nobody can tell."""
    asked: list[int] = []

    def test(place: int) -> Verdict:
        asked.append(place)
        return "skipped" if place in untold else "good" if place < border else "bad"

    good, bad = search(range(count), test)
    told = [place for place in range(count) if place not in untold]
    assert good == max((place for place in told if place < border), default=-1)
    assert bad == min((place for place in told if place >= border), default=count)
    assert len(asked) == len(set(asked)), "none twice"
    if not untold:
        assert len(asked) <= 2 + count.bit_length()


NAN, ONE = struct.pack("<f", float("nan")), struct.pack("<f", 1.0)


def made(root: Path, sick: Sequence[int] = (), *, where: str = "model", count: int = 8) -> Path:
    """Checkpoints of steps 1, 2, 3 ...; those in `sick` hold a NaN in their weights, or their optimizer."""
    root.mkdir(exist_ok=True)
    manager = Manager(root=root, keep=Keep(), on_error="raise")
    manager.open()
    manager.begin_fresh()

    def stage(step: int) -> Any:
        def write(staging: Staging) -> None:
            for part, name in (("model", "model.safetensors"), ("optimizer", "optimizer.safetensors")):
                bad = step in sick and where == part
                data = memoryview(ONE * 999 + (NAN if bad else ONE))
                staging.tensors(name, part, [Tensor("layer.w", "F32", (1000,), data)])
            staging.data("resume.json", "progress", b'{"step": %d}' % step)

        return write

    life = trail.begin(root, run=manager.run, start=0, checkpoint="")
    for step in range(1, count + 1):
        record = manager.save(step, stage(step), estimate=1, environment={}, arguments={}, facts={})
        assert record is not None
        trail.append(root, [Entry(step, life, 1.0, 1.0)])
        trail.saved(root, life, step, record.id)
    manager.close()
    return root


@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_a_nan_in_a_file_that_no_loss_told_of(where: str, tmp_path: Path) -> None:
    root = made(tmp_path / "run", (6, 7, 8), where=where)
    before = cli.checkpoints(root)
    found = cli.call("-C", root, "bisect")
    assert found.code == 0, found.err
    rows = found.out.splitlines()
    assert rows[0].split()[:2] == ["checkpoint-8", "BAD"] and f"layer.w in {where}.safetensors: 1 of 1000" in rows[0]
    assert rows[3].split()[:2] == ["checkpoint-5", "GOOD"]
    assert rows[4] == "checkpoint-5 is the last healthy one" and "bisect --mark" in rows[5]
    assert not any(r.poisoned for r in records(root)) and cli.checkpoints(root) == before, "looking changes nothing"

    marked = cli.call("-C", root, "bisect", "--mark")
    assert marked.out.splitlines()[-1] == "marked as poisoned: checkpoint-8, checkpoint-7, checkpoint-6"
    assert cli.call("-C", root, "resume", "--print-path").out.strip().endswith("checkpoint-5")
    assert cli.checkpoints(root) == before, "marks lie beside the checkpoints"
    again = cli.call("-C", root, "bisect", "--mark", "--json")
    content = json.loads(again.out)
    assert content["schema"] == "lastgood.bisect/1" and content["good"] == "checkpoint-5"
    assert content["first_bad"] == "checkpoint-6" and content["marked"] == []
    assert [row["verdict"] for row in content["tested"]] == ["bad", "bad", "bad", "good"]


def test_losses_tell_of_what_the_tensors_hide_over_a_resume(tmp_path: Path) -> None:
    root = made(tmp_path / "run", count=4)
    newest = records(root)[-1]
    life = trail.begin(root, run="r", start=4, checkpoint=newest.id)
    manager = Manager(root=root, keep=Keep(), on_error="raise")
    manager.open()
    manager.begin_from(newest)
    for step in (5, 6, 7):
        record = manager.save(step, cli.stage(step), estimate=1, environment={}, arguments={}, facts={})
        assert record is not None
        trail.append(root, [Entry(step, life, float("nan") if step > 5 else 1.0, float("nan") if step > 5 else 1.0)])
        trail.saved(root, life, step, record.id)
    manager.close()
    found = cli.call("-C", root, "bisect", "--mark")
    assert "checkpoint-7  BAD      loss is nan since step 6" in found.out
    assert "checkpoint-5 is the last healthy one" in found.out
    assert [r.step for r in records(root) if r.poisoned] == [6, 7]


def script(path: Path, body: str) -> str:
    """A command that is told a checkpoint and looks at its step."""
    path.write_text(f"import json, sys\nstep = json.load(open(sys.argv[1] + '/lastgood.json'))['step']\n{body}\n")
    return str(path)


def test_a_command_by_halves(tmp_path: Path) -> None:
    root = made(tmp_path / "run", count=16)
    tool = script(tmp_path / "t.py", "print(step); sys.exit(125 if step == 10 else 0 if step < 10 else 3)")
    found = cli.run("-C", root, "bisect", "--mark", "--json", "--", sys.executable, tool, "{checkpoint}")
    assert found.code == 0, found.err
    content = json.loads(found.out)
    assert content["good"] == "checkpoint-9" and content["first_bad"] == "checkpoint-11"
    assert len(content["tested"]) <= 7
    assert "16" in found.err.split(), "what the command prints is for the person"
    sick = {r.step: r.poisoned for r in records(root) if r.poisoned}
    assert sorted(sick) == [11, 12, 13, 14, 15, 16]
    assert all(reason.startswith("bisect: ") for reason in sick.values())
    assert any("after checkpoint-11" in reason for reason in sick.values())


def test_none_is_good_and_all_are(tmp_path: Path) -> None:
    root = made(tmp_path / "run", count=3)
    bad = cli.run("-C", root, "bisect", "--", sys.executable, "-c", "raise SystemExit(1)", "{checkpoint}")
    assert bad.code == 3 and "none of them is healthy" in bad.out
    good = cli.run("-C", root, "bisect", "--", sys.executable, "-c", "", "{checkpoint}")
    assert good.code == 0 and good.out.splitlines() == [
        "checkpoint-3  GOOD     status 0", "checkpoint-3 is the newest, and healthy",
    ]  # fmt: skip
    plain = cli.call("-C", root, "bisect")
    assert plain.code == 0 and plain.out.splitlines()[-1] == "checkpoint-3 is the newest, and healthy"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (("--", "true"), 2, "where the checkpoint goes"),
        (("--", "/no/such/tool", "{checkpoint}"), 2, "can't be run"),
        (("--", "sh", "-c", "kill -9 $$", "{checkpoint}"), 1, "neither good nor bad"),
        (("--mark", "--", "sh", "-c", "exit 200", "{checkpoint}"), 1, "nothing was marked"),
        (("--unmark", "3", "--mark"), 2, "searches nothing"),
        (("--unmark", "99"), 3, "no checkpoint is called"),
    ],
)
def test_wrong_ways_to_ask(line: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    root = made(tmp_path / "run", count=3)
    found = cli.run("-C", root, "bisect", *line)
    assert found.code == code and said in found.err, found
    assert not any(r.poisoned for r in records(root))


def test_a_damaged_file_is_neither(tmp_path: Path) -> None:
    root = made(tmp_path / "run", count=3)
    path = root / "checkpoint-3" / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    found = cli.call("-C", root, "bisect", "--mark")
    assert found.code == 0 and "SKIPPED" in found.out and "checkpoint-2 is the last healthy one" in found.out
    assert not any(r.poisoned for r in records(root)), "damage is for `verify`, not a mark"
