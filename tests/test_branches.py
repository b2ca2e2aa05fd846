"""Branches of a loop's run, against a model in memory.

Whatever is saved, restored, measured and deleted, in whatever order: `latest` and `best` are those of the branch that
the run is on, and what is restored is what was saved.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import lastgood
from lastgood.errors import NoCheckpoint
from lastgood.repo import metrics


@dataclass
class Saved:
    """One checkpoint as it should be. way: the saves that led to it, this one included, by their order."""

    step: int
    weights: tuple[float, float]
    way: tuple[int, ...]
    loss: float | None = None


@dataclass
class World:
    """What the run should look like. here: the saves on the way to where it is now."""

    saves: list[Saved] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    here: tuple[int, ...] = ()

    @property
    def branch(self) -> list[int]:
        return [number for number in self.here if number not in self.gone]

    def latest(self) -> int | None:
        return max(self.branch, default=None)

    def best(self) -> int | None:
        measured = [n for n in self.branch if self.saves[n].loss is not None]
        return min(measured, key=lambda n: (self.saves[n].loss, -n), default=None)

    def at(self, step: int) -> int | None:
        """What a step names: the newest on this branch, else the first on one that was left."""
        there = [n for n in range(len(self.saves)) if self.saves[n].step == step and n not in self.gone]
        return max(set(there) & set(self.branch), default=min(there, default=None))


class Branches(RuleBasedStateMachine):
    """A process restores, trains and saves, ends or is killed; another one follows."""

    @initialize(last=st.sampled_from([None, 2]))
    def begin(self, last: int | None) -> None:
        self.root = Path(tempfile.mkdtemp(dir=os.environ.get("BRANCHES_IN")))
        self.keep = lastgood.Keep(last=last, monitor="loss", mode="min")
        self.world = World()
        self.ckpt: lastgood.CheckpointManager | None = None
        self.launch()

    def launch(self, start: object = "auto") -> int:
        self.model = nn.Linear(1, 1)
        self.ckpt = lastgood.CheckpointManager(
            self.root, model=self.model, keep=self.keep, trail=False, guard="off", verify="quick"
        )
        self.step = self.ckpt.restore(start)
        return self.step

    def weights(self) -> tuple[float, float]:
        return self.model.weight.item(), self.model.bias.item()

    def end(self, killed: bool) -> None:
        """A killed process leaves its lock to the system and does nothing more."""
        assert self.ckpt is not None
        if killed:
            self.ckpt._run._lock.release()  # type: ignore[union-attr]  # as the system does
            self.ckpt._stack.pop_all()
        else:
            self.ckpt.close()
        self.ckpt = None

    def goes_on(self, number: int | None, step: int) -> None:
        """The run stands at this save now, and the model holds what it held."""
        if number is None:
            assert step == 0
            self.world = World()
            return
        saved = self.world.saves[number]
        assert (step, self.weights()) == (saved.step, saved.weights)
        self.world.here = saved.way

    # ---- what may happen -----------------------------------------------------------------

    @rule(steps=st.integers(1, 2), value=st.floats(-1, 1, width=32), loss=st.none() | st.integers(0, 3))
    def train(self, steps: int, value: float, loss: int | None) -> None:
        assert self.ckpt is not None
        with torch.no_grad():
            self.model.weight.fill_(value)
            self.model.bias.add_(1.0)
        self.step += steps
        self.ckpt.step(self.step)
        assert self.ckpt.save() is not None
        number = len(self.world.saves)
        self.world.here = (*self.world.here, number)
        self.world.saves.append(Saved(self.step, self.weights(), self.world.here))
        self.forget()
        if loss is not None:
            self.ckpt.record(self.step, loss=float(loss))
            self.world.saves[number].loss = float(loss)

    def forget(self) -> None:
        """What the policy deletes behind a save: on this branch all but the newest and the best."""
        if self.keep.last is not None:
            kept = {*self.world.branch[-self.keep.last :], self.world.best()}
            self.world.gone |= set(self.world.branch) - kept

    @rule(killed=st.booleans())
    def again(self, killed: bool) -> None:
        latest = self.world.latest()
        self.end(killed)
        self.goes_on(latest, self.launch("auto"))

    @precondition(lambda self: self.world.best() is not None)
    @rule()
    def back_to_the_best(self) -> None:
        best = self.world.best()
        self.end(killed=False)
        self.goes_on(best, self.launch("best"))

    @precondition(lambda self: self.world.saves)
    @rule(data=st.data())
    def back_to_a_step(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted({saved.step for saved in self.world.saves})))
        number = self.world.at(step)
        self.end(killed=True)
        if number is not None:
            self.goes_on(number, self.launch(step))
            return
        try:
            self.launch(step)
        except NoCheckpoint:
            self.goes_on(self.world.latest(), self.launch("auto"))
        else:
            raise AssertionError(f"step {step} was deleted, and was restored")

    @precondition(lambda self: self.world.saves)
    @rule(data=st.data())
    def to_a_path_on_any_branch(self, data: st.DataObject) -> None:
        there = [n for n in range(len(self.world.saves)) if n not in self.world.gone]
        number = data.draw(st.sampled_from(there))
        path = next(path for path, found in self.on_disk().items() if found == number)
        self.end(killed=True)
        self.goes_on(number, self.launch(self.root / path))

    @precondition(lambda self: self.world.branch)
    @rule(data=st.data(), loss=st.integers(-2, 3))
    def measure_late(self, data: st.DataObject, loss: int) -> None:
        """A step that both branches have means the checkpoint of this one."""
        assert self.ckpt is not None
        number = data.draw(st.sampled_from(self.world.branch))
        step = self.world.saves[number].step
        self.ckpt.record(step, loss=float(loss))
        self.world.saves[self.world.at(step)].loss = float(loss)  # type: ignore[index]

    @precondition(lambda self: any(n not in self.world.gone for n in range(len(self.world.saves))))
    @rule(data=st.data(), loss=st.integers(-4, -2))
    def measure_on_any_branch(self, data: st.DataObject, loss: int) -> None:
        """From outside, as an evaluation does; better than anything on the branch that the run is on, often."""
        number = data.draw(st.sampled_from([n for n in range(len(self.world.saves)) if n not in self.world.gone]))
        path = next(path for path, found in self.on_disk().items() if found == number)
        record = next(r for r in lastgood.open(self.root).checkpoints if r.name == path)
        metrics.record(self.root, record.id, record.step, {"loss": float(loss)})
        self.world.saves[number].loss = float(loss)

    # ---- what must be so -----------------------------------------------------------------

    def on_disk(self) -> dict[str, int]:
        """name -> number of the save, by what the manifests say of their order."""
        records = [r for r in lastgood.open(self.root).checkpoints if r.ours]
        return {record.name: record.seq - 1 for record in records}

    @invariant()
    def latest_and_best_are_of_this_branch(self) -> None:
        run = lastgood.open(self.root)
        found = self.on_disk()
        assert sorted(found.values()) == [n for n in range(len(self.world.saves)) if n not in self.world.gone]
        assert {found[r.name] for r in run.checkpoints if r.current} == set(self.world.branch)
        for ask, answer in (
            (run.latest, self.world.latest()),
            (lambda: run.best("loss", "min"), self.world.best()),
        ):
            try:
                number = found[ask().name]
            except NoCheckpoint:
                number = None
            assert number == answer
        for record in run.checkpoints:
            assert (record.step, record.metrics.get("loss")) == (
                self.world.saves[found[record.name]].step,
                self.world.saves[found[record.name]].loss,
            )

    def teardown(self) -> None:
        if getattr(self, "ckpt", None) is not None:
            self.end(killed=True)
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


TestBranches = Branches.TestCase
TestBranches.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    deadline=None,
    phases=(Phase.generate,),  # to make a failure smaller would take minutes: each step is real files
    suppress_health_check=list(HealthCheck),
)
