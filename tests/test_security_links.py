"""Links, FIFOs and names that lead out of a run: no verb reads, changes or deletes anything outside of it."""

from __future__ import annotations

import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import lastgood
from lastgood.errors import LastgoodError
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import leases, metrics, poison, request
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from test_cli_hostile import sealed

import cli
from cli import call, snapshot

SECRET = b"what only the outside says"


def everything(root: Path) -> Path:
    """A run with one of each thing that may lie in it."""
    cli.managed(root, dict.fromkeys((100, 200, 300, 400, 500, 600), 1.0), last=9)
    for words in (
        ("tag", "good", "400"), ("note", "400", "text"), ("strip", "100", "--yes"),
        ("prune", "--keep-last", "4", "--yes"),
    ):  # fmt: skip
        assert call("-C", root, *words)[0] == 0, words
    first = records(root)[-1]
    poison.mark(root, {records(root)[0].id: "NaN"})
    leases.take(root, first.id, first.name, 600.0)
    shutil.copytree(root / "checkpoint-600", root / HIDDEN / "quarantine" / "checkpoint-600.00000000")
    shutil.copytree(root / "checkpoint-600", root / HIDDEN / "tmp" / ("0" * 16))
    (root / HIDDEN / "trash" / ("0" * 16)).mkdir(parents=True)
    (root / HIDDEN / "trash" / ("0" * 16) / "file").write_bytes(b"x")
    (root / "checkpoint-600" / "folder").mkdir()
    (root / "checkpoint-600" / "folder" / "file").write_bytes(b"x")
    request.ask(root, stop=False)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return everything(tmp_path_factory.mktemp("links") / "run")


def trains(root: Path) -> None:
    """Open, save over an old step and a new one, delete by policy, close."""
    made = Manager(root=root, keep=Keep(last=2), on_error="raise")
    made.open()
    try:
        found = made.find("last", full=True).record
        made.begin_from(found)
        for step in (600, 700):
            saved = made.save(step, cli.stage(step), estimate=1, environment={}, arguments={}, facts={})
            assert saved is not None
            metrics.record(root, saved.id, step, {"eval_loss": 1.0})
            made.retain()
    finally:
        made.close()


def looks(root: Path) -> None:
    run = lastgood.open(root)
    for checkpoint in run.checkpoints:
        run.problems(checkpoint)


def asks(root: Path) -> None:
    request.ask(root, stop=True)
    request.drop_stale(root)


def holds(root: Path) -> None:
    for record in records(root):
        held = leases.take(root, record.id, record.name, 5.0)
        if held is not None:
            held.drop()


IN_PROCESS: tuple[Callable[[Path], None], ...] = (looks, asks, holds, trains)
VERBS: tuple[tuple[str, ...], ...] = (
    ("log", "--all"), ("verify", "--all"), ("resume", "--check"), ("tag", "new", "500"), ("untag", "good"),
    ("pin", "500"), ("unpin", "500"), ("note", "500", "new"), ("record", "500", "mmlu=0.5"), ("adopt", "--yes"),
    ("strip", "500", "--yes"), ("undo",), ("prune", "--keep-last", "2", "--yes"), ("undo",),
    ("prune", "--empty-trash", "--yes"), ("prune", "--keep-last", "1", "--stock", "--incomplete", "--now", "--yes"),
    ("doctor", "--fix", "--yes"),
)  # fmt: skip


def act(root: Path, copies: Path) -> Iterator[str]:
    """Every verb after the other; each says no, or does what it says."""
    for words in (*VERBS, ("checkout", "600", str(copies))):
        code, out, err = call("-C", root, *words)
        assert "Traceback" not in err, (words, err)
        assert code in (0, 1, 2, 3, 4, 5, 6, 10, 11), (words, code, out, err)
        yield " ".join(words)
    for function in IN_PROCESS:
        with suppress(LastgoodError, OSError):
            function(root)
        yield function.__name__


def linked(path: Path, target: Path) -> None:
    """The thing lies outside from now on, and a link leads to it."""
    path.rename(target)
    if target.is_dir():
        (target / "canary").write_bytes(SECRET)
        (target / "canaries").mkdir()
        (target / "canaries" / "canary").write_bytes(SECRET)
    else:
        target.write_bytes(target.read_bytes() + SECRET)
    path.symlink_to(target)


def places(root: Path) -> list[str]:
    """Everything in the run but the files of checkpoints that are treated as those of another one are."""
    every = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    whole = [f"{place}/" for place in ("checkpoint-100", "checkpoint-600", f"{HIDDEN}/undo/00000002/checkpoint-200")]
    return [p for p in every if "checkpoint-" not in p.rpartition("/")[0] or p.startswith(tuple(whole))]


def test_I22_no_verb_follows_a_link_out_of_a_run(made: Path, quick: Path) -> None:
    chosen = places(made)
    assert len(chosen) > 40
    for number, place in enumerate(chosen):
        base = quick / str(number)
        shutil.copytree(made, base / "run")
        outside = base / "outside"
        outside.mkdir()
        linked(base / "run" / place, outside / "target")
        before = snapshot(outside)
        for verb in act(base / "run", base / "copy"):
            assert snapshot(outside) == before, f"{verb} followed the link at {place}"
        copied = [p for p in base.rglob("*") if p.is_file() and not p.is_symlink() and outside not in p.parents]
        assert not [p for p in copied if SECRET in p.read_bytes()], place
        shutil.rmtree(base)


def in_time(number: int, frame: object) -> None:
    raise AssertionError("it waits for something that never comes")


@pytest.fixture
def alarm() -> Iterator[None]:
    """A FIFO that nobody writes to blocks whoever opens it, for good."""
    before = signal.signal(signal.SIGALRM, in_time)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_I22_no_verb_waits_for_a_fifo(made: Path, quick: Path, alarm: None) -> None:
    """Nor for a terminal, a socket or what else can be opened and gives nothing: they are told by the same test."""
    for number, place in enumerate(place for place in places(made) if (made / place).is_file()):
        base = quick / str(number)
        shutil.copytree(made, base / "run")
        (base / "run" / place).unlink()
        os.mkfifo(base / "run" / place)
        for _ in act(base / "run", base / "copy"):
            pass
        if (base / "copy").exists():
            assert all(stat.S_ISREG(path.lstat().st_mode) for path in (base / "copy").iterdir())
        shutil.rmtree(base)


@pytest.mark.parametrize("name", ["../../../outside/canary", "../" * 9 + "t", "a" * 15 + "/", "", "A" * 16, "x" * 300])
def test_I22_an_id_never_leads_out_of_the_run(name: str, made: Path, quick: Path) -> None:
    """Files beside the checkpoints are called by their ids."""
    shutil.copytree(made, quick / "run")
    outside = quick / "outside"
    outside.mkdir()
    for suffix in ("jsonl", "after.json"):
        (outside / f"canary.{suffix}").write_bytes(b"")
    (quick / "run" / HIDDEN / "metrics").rename(quick / "metrics")
    (quick / "run" / HIDDEN / "metrics").mkdir()
    for checkpoint in sorted((quick / "run").glob("checkpoint-*")):
        sealed(checkpoint, lambda fields: fields.update(id=name))
    before = snapshot(quick, times=False)
    for verb in act(quick / "run", quick / "copy"):
        after = snapshot(quick, times=False)
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        assert all(path.startswith(("run", "copy")) for path in changed), (verb, changed)
