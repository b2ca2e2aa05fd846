"""Every file of a checkpoint, every block, every kind of damage: found, named, passed over before anything changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lastgood
import loops
from lastgood.errors import CorruptCheckpoint, LastgoodError, NoCheckpoint
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.repo import pins, poison, verify
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from lastgood.repo.run import lost_head
from test_crash_points import manager, save

import realruns
from cli import call
from faults import corruption
from faults.corruption import Point

EVERY = bool(os.environ.get("EVERY_POINT"))
WIDTH = 400
"""Of the net: 1.2 MiB of weights and moments, so that most blocks are those of tensors."""


def sampled(points: list[Point]) -> list[Point]:
    """Every seventh; of one file with one block that would leave out whole kinds."""
    return [point for point in points if EVERY or point.number % 7 == 0]


def linked(source: Path, target: Path, own: tuple[str, ...]) -> None:
    """A copy that shares its files but those in `own`, which are to be damaged."""
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_dir():
            (target / name).mkdir(parents=True, exist_ok=True)
        elif HIDDEN in name.parts or name.as_posix() in own:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target / name)


def partner(directory: Path, other: Path, name: str) -> str:
    """What a file is swapped with: its namesake of the checkpoint before, or the next file of its own."""
    if (other / name).read_bytes() != (directory / name).read_bytes():
        return f"../{other.name}/{name}"
    names = sorted(corruption.sizes(directory))
    return names[(names.index(name) + 1) % len(names)]


def loop() -> loops.Recipe:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return loops.simple(loops.Net(WIDTH))


def state(recipe: loops.Recipe) -> dict[str, bytes]:
    """The bytes of every tensor that training goes on with, and the generators."""
    found = {f"model.{k}": v for k, v in recipe.parts["model"].state_dict().items()}
    for number, entry in recipe.parts["optimizer"].state_dict()["state"].items():
        found |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    plain = {name: bytes(memoryview(np.ascontiguousarray(t.detach().numpy()))) for name, t in found.items()}
    return {**plain, "rng": bytes(memoryview(torch.get_rng_state().numpy()))}


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> tuple[Path, loops.Recipe, dict[int, dict[str, bytes]]]:
    """Checkpoints of steps 1 and 2, what trained them, and its state at each."""
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    root = tmp_path_factory.mktemp("loop") if memory is None else memory / f"corruption-{os.getpid()}"
    recipe, states = loop(), {}
    with lastgood.CheckpointManager(root / "run", save_steps=1, **recipe.parts) as ckpt:
        for step in range(ckpt.restore(), 2):
            ckpt.step(step + 1, loss=recipe.step(step))
            states[step + 1] = state(recipe)
    yield root / "run", recipe, states
    shutil.rmtree(root)


def spoil(recipe: loops.Recipe) -> dict[str, bytes]:
    """Another state than that of any checkpoint."""
    with torch.no_grad():
        for parameter in recipe.parts["model"].parameters():
            parameter.fill_(0.25)
    for entry in recipe.parts["optimizer"].state.values():
        entry["exp_avg"].fill_(7.0)
    torch.manual_seed(99)
    return state(recipe)


def restored(root: Path, recipe: loops.Recipe, start: Any) -> tuple[int, lastgood.CheckpointManager]:
    ckpt = lastgood.CheckpointManager(root, trail=False, guard="off", **recipe.parts)
    step = ckpt.restore(start)
    ckpt._run.close()
    ckpt._stack.close()
    return step, ckpt


def told(point: Point, other: str, text: str) -> bool:
    """Whether the file is named, or the one that it was swapped with.

    A checkpoint without a manifest is a stock one, with that of another it is another one, whose files are damaged.
    """
    if point.file == "lastgood.json" and (point.kind == "swap" or "written without lastgood" in text):
        return True
    return point.file in text or (point.kind == "swap" and Path(other).name in text)


def test_I7_I8_each_damage_is_found_before_a_tensor_changes(run: Any, tmp_path: Path) -> None:
    original, recipe, states = run
    directory = original / "checkpoint-2"
    points = corruption.points(corruption.sizes(directory))
    assert len(points) > 1800, "the kinds and the blocks that there are"
    chosen, same = sampled(points), 0
    for place, point in enumerate(chosen):
        root = original.parent / "damaged"
        other = partner(directory, original / "checkpoint-1", point.file)
        linked(original, root, (f"checkpoint-2/{point.file}", f"checkpoint-2/{other}"))
        changed = corruption.damage(root / "checkpoint-2", point, other)
        before = spoil(recipe)
        if not changed:
            same += 1
            assert restored(root, recipe, 2)[0] == 2 and state(recipe) == states[2], point
            shutil.rmtree(root)
            continue
        with pytest.raises((CorruptCheckpoint, NoCheckpoint)) as caught:
            restored(root, recipe, 2)
        assert told(point, other, str(caught.value)), (point, str(caught.value))
        assert state(recipe) == before, (point, "changed by a restore that was refused")
        choice = Manager(root=root).find("last")
        assert choice.record.step == 1, point
        if place % 5 == 0:  # what takes longest
            step, ckpt = restored(root, recipe, "auto")
            assert step == 1 and state(recipe) == states[1], point
            assert ckpt.report is not None and ckpt.report.skipped == choice.skipped, point
        why = "; ".join(why for name, why in choice.skipped if name == "checkpoint-2")
        assert told(point, other, why), (point, why)
        shutil.rmtree(root)
    assert same < len(chosen) // 10, "mostly the bytes did change"
    assert EVERY or len(chosen) >= 250


def test_I7_an_adopted_checkpoint_too(realruns_cache: Path, quick: Path) -> None:
    original = realruns.make("trainer_full", quick / "run", realruns_cache)
    assert call("-C", original, "adopt", "-y")[0] == 0
    last, before = [r for r in records(original) if r.ours and r.state == "full"][:-3:-1]
    directory = original / last.name
    points = corruption.points(corruption.sizes(directory))
    for point in sampled(points):
        root = quick / "damaged"
        other = partner(directory, original / before.name, point.file)
        linked(original, root, (f"{last.name}/{point.file}", f"{last.name}/{other}"))
        found = Manager(root=root)
        if corruption.damage(root / last.name, point, other):
            choice = found.find("last")
            assert choice.record.name == before.name, point
            why = "; ".join(why for name, why in choice.skipped if name == last.name)
            assert told(point, other, why), (point, why)
            with pytest.raises(NoCheckpoint):
                found.find(last.step)
        else:
            assert found.find("last").record.name == last.name, point
        shutil.rmtree(root)


# ---- the run's own small files -------------------------------------------------------------


def gone_back(root: Path) -> None:
    """Saves 1 to 4; 4 is poisoned, 2 is pinned; then back to 2, so that 3 and 4 are on a branch that was left."""
    made = manager(root)
    for step in (1, 2, 3, 4):
        save(made, step)
        made.record(step, {"loss": 1 / step})
    made.close()
    found = records(root)
    pins.add(root, found[0].id, "mine")
    pins.write_note(root, found[1].id, "a note")
    poison.mark(root, {found[3].id: "NaN", found[0].id: ""})
    made = Manager(root=root)
    made.open()
    made.begin_from(found[1])
    made.close()


def looked(root: Path) -> tuple[Record, ...]:
    """Everything that only looks."""
    shown = lastgood.open(root)
    assert isinstance(shown.history, (list, tuple))
    for argument in (("log",), ("log", "--json"), ("df",), ("prune", "-n", "--keep-last", "1")):
        status, out, err = call("-C", root, *argument)
        assert "Traceback" not in out + err and status in (0, 1, 3, 4, 5), (argument, status, err)
    return records(root)


CONTROL = ("run.json", "head.json", "policy.json", "journal.jsonl", "pins.json", "notes.json", "poisoned.json", "lock")


def test_I7_damage_to_the_small_files_never_makes_a_wrong_checkpoint_right(quick: Path) -> None:
    original = quick / "original"
    gone_back(original)
    there = {name: size for name, size in corruption.sizes(original / HIDDEN).items() if name in CONTROL}
    assert set(there) == set(CONTROL)
    for point in corruption.points(there):
        root = quick / "run"
        shutil.copytree(original, root)
        corruption.damage(root / HIDDEN, point, "policy.json" if point.file == "run.json" else "run.json")
        found = looked(root)
        assert [record.step for record in found] == [1, 2, 3, 4], point
        # A file that isn't there is one that was never written: nobody can tell. Everything else can be told.
        gone = point.kind == "delete"
        try:
            choice: Any = Manager(root=root).find("last").record
        except LastgoodError:
            choice = None
        if choice is not None:
            assert verify.problems(root, choice, full=True) == () and not choice.poisoned, point
            assert choice.step == 2 or (gone and point.file == "head.json"), (point, choice.name)
        if not gone or point.file != "pins.json":
            assert found[0].pinned, (point, "what may be pinned counts as pinned")
        shutil.rmtree(root)


@pytest.mark.parametrize("name", ["pins.json", "poisoned.json"])
def test_I10_every_flipped_bit_of_what_holds_checkpoints_keeps_them(name: str, quick: Path) -> None:
    """Each byte in turn: retention with Keep(last=1) deletes neither what is pinned nor what may be."""
    original = quick / "original"
    gone_back(original)
    size = (original / HIDDEN / name).stat().st_size
    for at in range(0, size, 1 if EVERY else 3):
        root = quick / "run"
        shutil.copytree(original, root)
        data = bytearray((root / HIDDEN / name).read_bytes())
        data[at] ^= 1 << at % 8
        (root / HIDDEN / name).write_bytes(data)
        found = records(root)
        assert found[0].pinned, (at, bytes(data))
        assert found[3].poisoned or found[3].pinned, (at, bytes(data))
        made = manager(root, last=1)
        made.retain()
        made.close()
        assert (root / found[0].name).is_dir(), at
        shutil.rmtree(root)


@pytest.mark.parametrize("name", ["run.json", "head.json"])
def test_I7_every_flipped_bit_of_who_and_where_a_run_is(name: str, quick: Path) -> None:
    original = quick / "original"
    gone_back(original)
    size = (original / HIDDEN / name).stat().st_size
    root = quick / "run"
    shutil.copytree(original, root)
    for at in range(0, size, 1 if EVERY else 2):
        data = bytearray((original / HIDDEN / name).read_bytes())
        data[at] ^= 1 << at % 8
        (root / HIDDEN / name).write_bytes(data)
        if name == "head.json" and lost_head(root):
            with pytest.raises(NoCheckpoint, match=r"head\.json can't be read"):
                Manager(root=root).find("last")
            assert Manager(root=root).find(2).record.step == 2
        else:
            assert Manager(root=root).find("last").record.step == 2, (at, bytes(data))
