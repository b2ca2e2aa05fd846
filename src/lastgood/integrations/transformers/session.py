"""One `train()` of a managed Trainer: what its hooks share, from the lock to the last deletion."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lastgood import ranking
from lastgood.background import chosen
from lastgood.errors import NoCheckpoint, Preempted
from lastgood.guard import Guard
from lastgood.integrations.transformers import capture, old_loop, settings
from lastgood.integrations.transformers.events import Events
from lastgood.integrations.transformers.options import Options, retention
from lastgood.integrations.transformers.outlook import look_ahead
from lastgood.integrations.transformers.proving import Proving
from lastgood.integrations.transformers.restore import Source
from lastgood.integrations.transformers.told import told
from lastgood.manager import Manager
from lastgood.model import Record, finite
from lastgood.occasions import Occasions
from lastgood.repo import after, journal
from lastgood.repo.held import Held
from lastgood.repo.staging import Staging
from lastgood.report import Change, Report
from lastgood.state import facts, flying, rng
from lastgood.state.data import Position, Tracker
from lastgood.state.fingerprint import live_tensors
from lastgood.state.finite import not_finite
from lastgood.state.lazy import Pace
from lastgood.state.match import some
from lastgood.state.recorder import Recorder
from lastgood.state.rng import Rng
from lastgood.state.steps import Steps
from lastgood.state.weights import Coverage
from lastgood.talk import say, warn
from lastgood.target import Fresh, Target, resolve


@dataclass(slots=True)
class Session:
    """Attributes are in the order in which a run fills them."""

    trainer: Any
    options: Options
    occasions: Occasions = field(default_factory=Occasions)
    guard: Guard = field(default_factory=Guard)
    report: Report | None = None
    manager: Manager | None = None
    target: Target | None = None
    source: Source | None = None
    coverage: Coverage | None = None
    tracker: Tracker = field(default_factory=Tracker)
    recorder: Recorder = field(default_factory=Recorder)
    pace: Pace = field(default_factory=Pace)
    proving: Proving | None = None
    updates_per_epoch: int = 1
    planned: bool = False  # a batch size that is tried anew begins training anew
    finished: bool = False  # the checkpoint resumed from is the last step of the run
    caught_up: bool = True  # nothing left to do of the step that was resumed from
    place: Position | None = None  # in the data, of the epoch that is resumed in its middle
    window: torch.Tensor | None = None  # losses since the last log line, where the loop has to be handed them
    left: bool = False  # the loop is over
    where: str = "step"
    evaluate: bool = False  # an evaluation of this very step is still to come
    evaluating: Rng | None = None  # inside an evaluation: the generators as they were before it
    unsaved_metrics: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    changed: list[Change] = field(default_factory=list)
    unsure: bool = False  # which one is the best: a save or its metrics are under way
    owed: bool = False  # a save that somebody asked for, at this step
    saved_step: int = -1
    saved_rows: int = 0  # of the Trainer's log, at that save
    card: dict[str, bytes] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # what doesn't change while training

    # ---- begin and end -------------------------------------------------------------------

    def attach(self) -> None:
        """Put our callback behind the others, once."""
        handler = self.trainer.callback_handler
        handler.callbacks = [callback for callback in handler.callbacks if not isinstance(callback, Events)]
        handler.callbacks.append(Events(self))

    @contextmanager
    def active(self, value: Any, trial: Any) -> Iterator[str | None]:
        """Hold the run for one `train()`; yields the directory to resume from, None for a fresh start."""
        args = self.trainer.args
        self.proving = Proving.asked()
        if self.proving is not None:
            self.proving.take_over(self.trainer)
            value, trial = "auto", None
        self.manager = Manager(
            root=Path(self.trainer._get_output_dir(trial)),
            keep=retention(self.options, args),
            on_error=self.options.on_error,
            on_full=self.options.on_full,
            verify=self.options.verify,
            background=chosen(self.options.background, accelerated=args.device.type != "cpu"),
        )
        flying.boarding(self.manager, accelerated=args.device.type != "cpu")
        self.manager.space.leaving = lambda: self.occasions.stopping(self.trainer.state.global_step)
        self.manager.grace.since = lambda: self.occasions.signals.terminated_at
        self._reset()
        self.attach()
        event = "interrupted"
        try:
            self.manager.open(takeover=self.options.takeover)
            found = resolve(self.manager, value)
            self.target = found if isinstance(found, Target) else None
            if self.target is None and self.proving is not None:
                raise NoCheckpoint(f"there is no checkpoint to prove in {self.manager.root}")
            if isinstance(found, Fresh) and found.why:
                say(found.why)
            steps = Steps(self.live, lambda: [self.trainer.optimizer], self.pace)
            with self.occasions.listening(), steps.heard():
                yield None if self.target is None else os.fspath(self.target.path)
            event = "finished"
        except Preempted:
            event = "preempted"
            raise
        finally:
            self.recorder.flush()
            self.manager.close(event, **({"by": self.occasions.by} if event == "preempted" else {}))

    def _reset(self) -> None:
        self.target = self.source = self.coverage = self.report = None
        self.occasions = Occasions(self.options.triggers)
        guarded = self.options.guard == "mark" and self.proving is None
        self.guard = Guard(on=guarded, not_finite=lambda: not_finite(self.trainer.model))
        self.recorder = Recorder(self.options.trail or self.proving is not None, self.guard.hear if guarded else None)
        self.tracker = Tracker(self.recorder.batches if self.recorder.on else None)
        self.finished, self.caught_up, self.evaluate, self.evaluating = False, True, False, None
        self.where, self.saved_step, self.planned, self.owed = "step", -1, False, False
        self.left, self.place, self.window, self.unsure = False, None, None, False
        self.unsaved_metrics, self.changed = {}, []

    @property
    def live(self) -> Manager:
        """The manager of the train() that is running."""
        assert self.manager is not None, "only inside train()"
        return self.manager

    # ---- restoring -----------------------------------------------------------------------

    def model_ready(self, model: torch.nn.Module) -> None:
        """The model is built and nothing was loaded into it yet."""
        if self.coverage is None:
            self.coverage = Coverage.begin(model)

    def restore_weights(self, path: str, model: torch.nn.Module) -> bool:
        """Load the target's weights; False if `path` isn't the target, or holds a stock Trainer's files."""
        target = self.target
        if target is None or os.fspath(target.path) != os.fspath(path) or target.record is None or target.record.layout:
            return False
        self.source = Source(target.path, target.record, target.held, allow=self.options.allow_missing)
        # Before the first tensor changes: a checkpoint that can't be restored as a whole isn't restored in part.
        self.source.require("optimizer", "scheduler", "rng", "progress")
        _ = self.source.tensors  # read and hashed, if its verification hasn't done so
        self.source.weights(model)
        return True

    def begin(self, updates_per_epoch: int) -> None:
        """The Trainer's state is loaded: decide whose run this is, and where in it we are."""
        self.updates_per_epoch = updates_per_epoch
        target, state = self.target, self.trainer.state
        self.arguments = settings.arguments(self.trainer.args)
        self.about = {
            "trainer": type(self.trainer).__mro__[1].__name__,
            "world_size": self.trainer.args.world_size,
            "data": facts.data_facts(self.trainer.train_dataset),
            **facts.model_facts(self.trainer.model),
        }
        if target is None:
            self.live.begin_fresh()
            self.recorder.begin(self.live.door, run=self.live.run, start=0, checkpoint="")
            return
        if target.own and target.record is not None:
            self.live.begin_from(target.record)
            self.live.saved[target.record.step] = target.record
        else:
            self.live.begin_fresh()
            journal.append(self.live.door, "continued", source=target.path.name, step=state.global_step)
        origin = target.path.name if target.record is None else target.record.id
        self.recorder.begin(self.live.door, run=self.live.run, start=state.global_step, checkpoint=origin)
        state.compute_steps(self.trainer.args, state.max_steps)
        self._set_best(self.live.records())
        if self.source is not None:
            self.source.callbacks(self.trainer)
            self.caught_up = not self.source.resume
        self.finished = state.global_step >= state.max_steps

    def training_begins(self) -> None:
        """The Trainer has set its loss window to zero: put back what was in it, then report."""
        state, record = self.trainer.state, None if self.target is None else self.target.record
        self.occasions.begin(self.live.door, state.global_step, state.epoch or 0.0)
        self.guard.begin(self.live, "" if record is None else record.id)
        progress = {} if self.source is None else self.source.resume.get("progress", {})
        if progress and not self.finished:
            window = progress["loss_window"]
            value = float(window["$float"]) if isinstance(window, dict) else float(window)
            trainer = self.trainer
            trainer._tr_loss = torch.tensor(value, device=trainer.args.device)
            # The Trainer reports the mean loss of this call: what came before the save isn't counted in it.
            trainer._total_loss_scalar = -value
            self.window = trainer._tr_loss if old_loop.NEEDED else None
            trainer._globalstep_last_logged = progress["last_logged_step"]
        if self.source is not None:  # only now: callbacks that copy the model have done so
            self.source.extras(self.trainer)
        if self.target is not None:
            self.report = told(self)
            say(str(self.report))
            self.target.held.clear()
            if self.source is not None:
                self.source.done()
        if self.proving is None and not self.finished and not self.planned:
            self.planned = True
            look_ahead(self)

    def with_window(self, loss: Any) -> Any:
        """`loss`, and with the first one what the old loop, which begins its sum at zero, doesn't know of."""
        window, self.window = self.window, None
        return loss if window is None else loss + window

    def stepped(self, grad_norm: Any, lr: Any) -> None:
        """The loop is behind an optimizer step, or asks once more at the end of the epoch."""
        trainer, control = self.trainer, self.trainer.control
        batches = getattr(trainer, "current_gradient_accumulation_steps", 1)
        skipped = bool(trainer.accelerator.optimizer_step_was_skipped)
        self.recorder.step(trainer.state.global_step, batches, grad_norm=grad_norm, lr=lr, skipped=skipped)
        assert self.coverage is not None
        capture.warm(self.live, trainer, self.coverage)
        if control.should_log or control.should_save:
            (self.recorder.ask if control.should_save else self.recorder.flush)()
            self.guard.judge(self.live)
        if self.proved:
            control.should_evaluate = control.should_save = False

    @property
    def proved(self) -> bool:
        """Whether every step that was to be repeated has been."""
        return self.proving is not None and self.trainer.state.global_step >= self.proving.until

    # ---- saving --------------------------------------------------------------------------

    def save(self, *, looked_at: tuple[str, ...] = ()) -> Record | None:
        """The checkpoint of the current step, then retention.

        looked_at: by whom, right behind this: then it is on the disk when this returns.
        """
        if looked_at and self.live.background is not None:
            say(f"saves aren't written in the background, because these look into the checkpoint: {some(looked_at)}")
            self.live.background = None
        trainer, step = self.trainer, self.trainer.state.global_step
        assert self.coverage is not None
        coverage, live = self.coverage, live_tensors(trainer.model, self.coverage.members(trainer.model))
        consumed = step % self.updates_per_epoch * trainer.args.gradient_accumulation_steps
        moment = capture.Moment(
            where=self.where,
            evaluate=self.evaluate or self.evaluating is not None,
            updates_per_epoch=self.updates_per_epoch,
            rng=self.evaluating if self.evaluating is not None else rng.capture(),
            position=self.tracker.position(consumed),
        )

        def write(staging: Staging) -> None:
            if self.unsure:  # the last save is there now, and this one says which was the best until here
                self._set_best(self.live.seen())
            capture.write(trainer, staging, live=live, coverage=coverage, moment=moment)

        begun = time.monotonic()
        record = self.live.save(
            step,
            write,
            estimate=capture.estimate(trainer, live),
            environment=facts.environment(),
            arguments=self.arguments,
            facts={**self.facts(), **self.guard.facts()},
            now=bool(self.occasions.leave),
            skip=not (self.owed or step >= trainer.state.max_steps or trainer.args.save_strategy == "best"),
        )
        self.owed = False
        # A save on the way out takes as long as one takes, not as long as training notices.
        seconds = max(time.monotonic() - begun, self.live.took)
        self.occasions.saved(step, seconds, trainer.state.epoch or 0.0)
        if record is None:
            self._without(step)
            return None
        self.recorder.saved(step, record.id, self.live)
        self.saved_step, self.saved_rows = step, len(trainer.state.log_history)
        if step in self.unsaved_metrics:  # save_strategy="best" evaluates first
            self.live.record(step, self.unsaved_metrics.pop(step))
        decisions = self.live.retain()
        if self.live.busy:
            self.unsure = True
        else:
            self._set_best([one.record for one in decisions if one.action != "delete"] or self.live.seen())
        self.occasions.spent(time.monotonic() - begun, busy=self.live.busy)
        return record

    def heed(self, *, wait: bool = False) -> None:
        """What was done behind training's back is known now: a failure is told, the best one is named.

        wait: until all of it is done.
        """
        if wait:
            self.live.settle()
        self.live.heed()
        self.occasions.ask(self.live.owed)
        if self.saved_step not in self.live.saved:
            self.saved_step = -1  # it came to nothing
        if self.live.space.lack is not None and not self.occasions.leave:
            self._without(self.trainer.state.global_step)
        if self.unsure and not self.live.busy:
            self._set_best(self.live.seen())

    def _without(self, step: int) -> None:
        """The save of this step came to nothing: is it the end, or was that asked for while it waited for room?"""
        if self.live.space.lack is not None:
            self.occasions.no_room(step)
        if self.occasions.leave:
            self.trainer.control.should_training_stop = True

    def facts(self) -> dict[str, Any]:
        """What a later resume compares itself with."""
        for entry in reversed(self.trainer.state.log_history):
            if "loss" in entry:
                return {**self.about, "loss": finite(entry["loss"])}
        return self.about

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of the current step arrived; they belong to the checkpoint of this step and to no other."""
        step = self.trainer.state.global_step
        values = {name: value for name, value in metrics.items() if name.startswith("eval_")}
        if step in self.live.saved:
            self.live.record(step, values)
            self.unsure = True
            self.heed()
            if step == self.saved_step and not self.trainer.args.save_only_model:
                changed, door = capture.after_evaluation(self.trainer, self.saved_rows), self.live.door
                self.live.then(step, lambda record: after.write(door, record.id, changed))
        else:
            self.unsaved_metrics = {step: values}

    def stop_inside_evaluation(self) -> None:
        """Asked to stop while evaluating, which can take hours: save the step that is being evaluated, and leave."""
        step = self.trainer.state.global_step
        self.heed(wait=True)
        if step not in (self.saved_step, self.live.space.left) and self.trainer.args.save_strategy != "no":
            self.trainer._save_checkpoint(self.trainer.model, None)
        self.preempted()

    def preempted(self) -> None:
        """Leave the process with exit status 75 instead of returning as if training were done."""
        self.trainer.is_in_train = False
        why = self.occasions.parting(self.trainer.state.global_step)
        say(f"{why}; the same command continues")
        raise Preempted(f"{why}; relaunch to continue") from self.live.space.lack

    # ---- best ----------------------------------------------------------------------------

    def best(self, records: Sequence[Record]) -> Record | None:
        monitor, mode = self.live.keep.primary
        return None if monitor is None or mode is None else ranking.best(records, monitor, mode)

    def _set_best(self, records: Sequence[Record]) -> None:
        best, self.unsure = self.best(records), False
        self.trainer.state.best_model_checkpoint = None if best is None else os.path.join(self.live.root, best.name)

    def load_best(self, model: torch.nn.Module) -> None:
        """load_best_model_at_end: exactly the weights that the best metric of a saved checkpoint belongs to."""
        (monitor, mode), state = self.live.keep.primary, self.trainer.state
        if monitor is None or mode is None:
            warn("load_best_model_at_end: no metric says which checkpoint is the best; the last weights stay")
            return
        held = Held(state=False)
        try:
            found = self.live.find("best", full=False, held=held)
        except NoCheckpoint as error:
            warn(f"load_best_model_at_end: {error}\n  the last weights stay")
            return
        for name, reason in found.skipped:
            if name in found.damaged:
                warn(f"load_best_model_at_end passed over {name}: {reason}")
        record = found.record
        Source(self.live.root / record.name, record, held, allow=self.options.allow_missing).weights(model)
        score = ranking.metric_of(record, monitor)
        say(f"loaded the best model: {record.name} ({monitor} = {score})")
        if state.best_global_step not in (None, record.step) and state.best_metric != score:
            say(f"step {state.best_global_step} had {state.best_metric}, but no checkpoint was saved there")
        state.best_metric, state.best_global_step = score, record.step
        state.best_model_checkpoint = os.path.join(self.live.root, record.name)
