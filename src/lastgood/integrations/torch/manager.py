"""`lastgood.CheckpointManager`: checkpoints of a training loop that its user wrote."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lastgood import background
from lastgood.errors import LastgoodError, Preempted, UsageError
from lastgood.garbage import uncollected
from lastgood.guard import Guard
from lastgood.integrations.torch import restoring, writing
from lastgood.integrations.torch.boundary import MOST_STEPS, Boundary, counted
from lastgood.integrations.torch.exchange import Part
from lastgood.integrations.torch.loader import Data
from lastgood.integrations.torch.metrics import Metrics, number
from lastgood.integrations.torch.module import Model
from lastgood.integrations.torch.options import Options
from lastgood.integrations.torch.parts import Optimizer, accelerated, one_process, part, trains_what_is_saved
from lastgood.manager import Manager
from lastgood.model import Record, finite
from lastgood.occasions import Occasions
from lastgood.redact import masked
from lastgood.repo.held import Held
from lastgood.report import Report
from lastgood.state import facts, flying, rng, steps
from lastgood.state.conversions import tables
from lastgood.state.finite import not_finite
from lastgood.state.match import Match
from lastgood.state.recorder import Recorder
from lastgood.state.saved import Saved
from lastgood.state.stream import Once
from lastgood.talk import say, warn
from lastgood.target import Fresh, resolve


class CheckpointManager:
    """Saves, keeps and restores what a loop trains: `restore()` before it, `step()` in it, `close()` behind it.

    root: the run's directory. parts: what a checkpoint holds, by name: models, optimizers, schedules, scalers, data
    loaders, tokenizers, random generators, anything with state_dict() and load_state_dict(), or a dict, list, tensor
    or array that is changed in place. The global random generators are always part of it.
    accelerator: an accelerate.Accelerator; what it prepared and registered is part of it, as with its save_state.
    options: see `lastgood.integrations.torch.options.Options`.

    Raises UsageError for a wrong option or part, NotSupported for several processes.
    """

    def __init__(self, root: str | os.PathLike[str], *, accelerator: Any = None, **options_and_parts: Any) -> None:
        known = Options.__dataclass_fields__
        chosen = {name: value for name, value in options_and_parts.items() if name in known}
        given = {name: value for name, value in options_and_parts.items() if name not in known}
        self.options = Options(**chosen)
        more: list[Part] = []
        if accelerator is not None:
            from lastgood.integrations.accelerate import prepared, progress

            given = prepared.parts(accelerator, given)
            more = [progress.Progress(accelerator)]
        one_process()
        if not given:
            raise UsageError(
                "CheckpointManager was given nothing to save", hint="model=model, optimizer=optimizer, ..."
            )
        self.parts: list[Part] = [*(part(name, thing) for name, thing in given.items()), *more]
        trains_what_is_saved(self.parts)
        self.report: Report | None = None
        self._run = Manager(
            root=Path(root).absolute(), keep=self.options.keep, on_error=self.options.on_error,
            on_full=self.options.on_full, verify=self.options.verify,
            background=background.chosen(self.options.background, accelerated=accelerated(self.parts)),
        )  # fmt: skip
        flying.boarding(self._run, accelerated=accelerated(self.parts))
        self._steps = steps.Steps(self._run, lambda: [p.optimizer for p in self.parts if isinstance(p, Optimizer)])
        self._run.space.leaving = lambda: self._occasions.stopping(self._boundary.step if self._boundary else 0)
        self._occasions = Occasions(self.options.triggers)
        self._run.grace.since = lambda: self._occasions.signals.terminated_at
        self._guard = Guard(on=self.options.guard == "mark", not_finite=self._not_finite)
        self._stack = ExitStack()
        self._recorder = Recorder(self.options.trail, self._guard.hear if self._guard.on else None)
        self._boundary: Boundary | None = None
        self._metrics = Metrics(self._run)
        self._loss: Any = None
        self._began = 0
        self._once = Once(None)
        self._ending = False
        self._facts: dict[str, Any] = {}
        self._arguments = {key: masked(key, value) for key, value in (self.options.arguments or {}).items()}

    # ---- begin and end -------------------------------------------------------------------

    def restore(
        self,
        start: Any = "auto",
        *,
        rename: Mapping[str, str] | None = None,
        new: Sequence[str] = (),
        gone: Sequence[str] = (),
        cast: bool = False,
    ) -> int:
        """Put back the last good checkpoint of this run; returns the number of steps that are complete, 0 at first.

        start: "auto" (the last good one, a fresh start if there is none), "last", "best", a step, the path of a
        checkpoint, or False for a fresh start beside what is there.
        rename, new, gone, cast: what may differ between the models of the run and those of the checkpoint, see
        `lastgood.state.match.Match`; without them every tensor has to be the same one, proven by its digest.

        Everything is looked at before anything is changed. Raises NoCheckpoint, CorruptCheckpoint, IncompleteRestore
        or Incompatible, each with what to do.
        """
        if self._boundary is not None:
            raise UsageError("restore() was called already", hint="one CheckpointManager serves one run of the loop")
        match = Match(rename=rename or {}, new=new, gone=gone, cast=cast)
        self._run.open(takeover=self.options.takeover)
        self._stack.callback(self._run.close, "interrupted")
        self._stack.enter_context(self._steps.heard())
        try:
            step = self._begin(start, match)
        except BaseException:
            self._stack.close()
            raise
        return step

    @uncollected()
    def _begin(self, start: Any, match: Match) -> int:
        target = resolve(self._run, start, option="start", stock_too=False)
        self._facts = {"front": "loop", **writing.facts(self.parts)}
        if isinstance(target, Fresh):
            if target.why:
                say(target.why)
            step, origin = 0, self._fresh(match)
        else:
            self.report, step = restoring.restore(self, target, match)
            origin = target.path.name if target.record is None else target.record.id
            say(str(self.report))
        self._recorder.begin(self._run.door, run=self._run.run, start=step, checkpoint=origin)
        self._stack.enter_context(self._occasions.listening())
        self._occasions.begin(self._run.door, step, self.epoch)
        self._guard.begin(self._run, origin)
        self._began = step
        self._boundary = Boundary.here(step, self.parts)
        return step

    def _fresh(self, match: Match) -> str:
        origin = ""
        if self.options.init is not None:
            origin, told = restoring.init(self, Path(self.options.init), match)
            say(f"a new run with the weights of {self.options.init}: {told}")
        empty = [name for item in self.parts if isinstance(item, Model) for name in item.empty]
        if empty:
            raise UsageError(
                f"{empty[0]} is on the meta device, and there is no checkpoint to take its values from",
                hint="a fresh start needs a model with values: model.to_empty(device='cpu') and its own initialisation",
            )
        self._run.begin_fresh()
        facts.environment()  # remembered: the first save would have to look for it
        return origin

    def close(self) -> None:
        """Save the last step, where anything but `save()` saves at all, and give the run back."""
        try:
            if self._boundary is not None and self._run._lock is not None:
                self._run.settle()
                if self.options.triggers.any or self.options.save_best or self._run.owed:
                    self._save_last(self._boundary, "the end of the loop", sure=False)
                self._recorder.flush()
                self._run.retain()
                self._run.close("finished")
        finally:
            self._stack.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            if isinstance(error, Preempted):
                self._run.close("preempted", by=self._occasions.by)
            elif not isinstance(error, LastgoodError):
                self._rescue(error)
        finally:
            self._recorder.flush()
            self._stack.close()

    # ---- the loop ------------------------------------------------------------------------

    def step(
        self, step: int, loss: Any = None, *, grad_norm: Any = None, lr: float | None = None, **metrics: Any
    ) -> None:
        """So many steps are complete; called between two of them. Saves if that is due, for whatever reason.

        loss, grad_norm: numbers or tensors, for the trail; a tensor isn't waited for. metrics: as for `record`.
        Raises Preempted (a SystemExit with status 75) after the save that a SIGTERM or the time limit asked for.
        """
        before = self._running("step()")
        step = counted(step)
        if not before.step <= step < MOST_STEPS:
            raise UsageError(f"step({step!r}) after step({before.step}): steps are counted upwards", hint=_COUNT)
        self._once.take()  # a loader that begins only now goes on under what the steps since the restore have left
        boundary = self._boundary = Boundary.here(step, self.parts)
        self._heed(step)
        self._loss = loss
        if loss is not None:
            self._recorder.loss(loss if isinstance(loss, torch.Tensor) else torch.tensor(float(loss)))
        self._recorder.step(step, 1, grad_norm=grad_norm, lr=lr)
        if metrics:
            self._metrics.note(step, metrics, now=step)
        reasons = self._occasions.look(step, self.epoch, busy=self._run.busy)
        if reasons:
            self._save(boundary, reasons, skip=not self._occasions.wanted)
            self._occasions.stopping(step)  # asked to leave meanwhile: what is behind this step is saved
        if self._occasions.leave:
            self._leave(boundary)
        self._run.warm(partial(writing.size, self.parts), tables, writing.rehearsal(self.parts, boundary))

    def record(self, step: int, **metrics: Any) -> None:
        """Attach metrics to the checkpoint of this step, whenever they arrive; they decide which one is the best.

        Right behind `step()` of the same step generators, and loaders that were gone through since, are put back to
        where they were then: an evaluation doesn't change what training goes on with, interrupted or not.
        """
        before, step = self._running("record()"), counted(step)
        self._heed(before.step)
        self._metrics.note(step, metrics, now=before.step)
        if step == before.step:
            rng.restore(before.rng)
            for item in self._loaders():
                item.rewind(item.at)
            if self.options.save_best and step not in self._run.saved and self._metrics.best(metrics):
                self._save(before, ("the best so far",))
            if self._occasions.stopping(step):
                self._leave(before)
            self._occasions.resumes()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside leaves generators and loaders as they were: for an evaluation that records nothing."""
        before, marks = rng.capture(), [(item, item.stream.mark()) for item in self._loaders()]
        try:
            yield
        finally:
            rng.restore(before)
            for item, mark in marks:
                item.rewind(mark)

    def save(self, why: str = "asked for by the program") -> Record | None:
        """Save the state behind the last `step()` now, unless it is saved already; None if that failed.

        Raises UsageError where the parts have changed since: between two steps they fit together, elsewhere not.
        """
        boundary = self._running("save()")
        moved = boundary.moved(self.parts, sure=False)
        if moved:
            raise UsageError(
                f"save() after {', '.join(moved)} changed since step({boundary.step})",
                hint="call it right behind step(), or step() with the number of steps that are complete now",
            )
        self._heed(boundary.step)
        return self._run.saved.get(boundary.step) or self._save(boundary, (why,), looked_at=True)

    def settle(self) -> None:
        """Wait until every save so far is on the disk; one that failed meanwhile is told as on_error says."""
        self._running("settle()")
        self._run.settle()

    def batches(self, name: str = "dataloader") -> Iterator[Any]:
        """The batches of a loader without an end, epoch after epoch, from where the run stands."""
        for item in self.parts:
            if isinstance(item, Data) and item.name == name:
                return item.stream.batches()
        raise UsageError(f"there is no data loader called {name!r}", hint=f"CheckpointManager(..., {name}=loader)")

    @property
    def epoch(self) -> float:
        """Epochs of the first loader that are complete, with the share of the one under way if its length is known."""
        return next((item.epoch for item in self._loaders()), 0.0)

    @property
    def run(self) -> Any:
        """The run as `lastgood.open` shows it."""
        from lastgood.run import open

        self._run.settle()
        return open(self._run.root)

    def load_best(self) -> Record:
        """Load the models of the best checkpoint into this run's, verified. Raises NoCheckpoint if there is none."""
        self._run.settle()
        held = Held(state=False)
        found = self._run.find("best", full=False, held=held)
        restoring.weights(self, Saved(self._run.root / found.record.name, found.record, held))
        say(f"loaded the best model: {found.record.name}")
        return found.record

    # ---- inside --------------------------------------------------------------------------

    def _loaders(self) -> list[Data]:
        return [item for item in self.parts if isinstance(item, Data)]

    def _not_finite(self) -> str:
        return next(filter(None, (not_finite(item.module) for item in self.parts if isinstance(item, Model))), "")

    def _running(self, what: str) -> Boundary:
        if self._boundary is None or self._run._lock is None:
            raise UsageError(
                f"{what} {'after close()' if self._boundary is not None else 'before restore()'}",
                hint="for step in range(ckpt.restore(), total): ...",
            )
        return self._boundary

    def _heed(self, step: int) -> None:
        """What failed behind the loop's back is told now; the run may have to stop for it."""
        self._run.heed()
        self._occasions.ask(self._run.owed)
        if self._run.space.lack is not None:
            self._occasions.no_room(step)

    def _save(
        self, boundary: Boundary, reasons: Sequence[str], *, skip: bool = False, looked_at: bool = False
    ) -> Record | None:
        started = time.monotonic()
        told: dict[str, Any] = {"saved_because": "; ".join(reasons)}
        loss = finite(number(self._loss))
        if loss is not None:
            told["loss"] = loss
        costs = {item.name: str(cost) for item in self._loaders() if (cost := item.cost()).batches}
        if costs:  # known beforehand: reading a stream again may take longer than the training since the last save
            told["to_resume"] = costs
        self._recorder.ask()
        self._guard.judge(self._run)
        record = self._run.save(
            boundary.step,
            lambda staging: writing.write(staging, self.parts, boundary, self.epoch, looked_at=looked_at),
            estimate=writing.size(self.parts),
            environment=facts.environment(),
            arguments=self._arguments,
            facts={**self._facts, **told, **self._guard.facts()},
            now=self._ending or bool(self._occasions.leave),
            skip=skip,
        )
        # A save on the way out takes as long as one takes, not as long as training notices.
        self._occasions.saved(boundary.step, max(time.monotonic() - started, self._run.took), self.epoch)
        if record is not None:
            self._recorder.saved(boundary.step, record.id, self._run)
            self._metrics.saved(boundary.step)
            self._run.retain()
            self._occasions.spent(time.monotonic() - started, busy=self._run.busy)
        elif self._run.space.lack is not None:
            self._occasions.no_room(boundary.step)
        return record

    def _leave(self, boundary: Boundary) -> None:
        self._run.settle()
        if boundary.step not in self._run.saved and self._began < boundary.step != self._run.space.left:
            self._save(boundary, (self._occasions.leave,))
        why = self._occasions.parting(boundary.step)
        say(f"{why}; the same command continues")
        raise Preempted(f"{why}; relaunch to continue") from self._run.space.lack

    def _rescue(self, error: BaseException) -> None:
        """Training failed; whatever happens here, its error must not be hidden by another one."""
        boundary, self._run.space.patient = self._boundary, False
        if boundary is not None and self._run._lock is not None:
            try:
                self._settle_whatever()
                self._save_last(boundary, f"{type(error).__name__} after step {boundary.step}", sure=True)
            except Exception as failed:
                warn(f"step {boundary.step} could not be saved ({failed})")

    def _settle_whatever(self) -> None:
        """What becomes of the save under way must not keep the last one from being tried."""
        try:
            self._run.settle()
        except Exception as failed:
            warn(str(failed))

    def _save_last(self, boundary: Boundary, why: str, *, sure: bool) -> None:
        """Save the last step behind which everything fits together, if it still does; sure: if that can be shown."""
        if boundary.step in self._run.saved or boundary.step <= self._began:
            return
        self._ending = True
        moved = boundary.moved(self.parts, sure=sure)
        if moved:
            say(f"{why}: not saved, because {', '.join(moved)} changed since step {boundary.step}")
        elif self._save(boundary, (why,), looked_at=True) is not None:
            say(f"{why}: saved as step {boundary.step}")


_COUNT = "for step in range(ckpt.restore(), total): train(); ckpt.step(step + 1)"
