"""The Trainer whose checkpoints are managed: the stock one with its save, resume and best-model hooks replaced.

`ManagedTrainer` stands right above `transformers.Trainer` in the method resolution order, so
whatever a subclass (SFTTrainer, the user's own) does around these hooks with super() stays.
Hooks translate between the Trainer's loop and the session; decisions are taken in policy.
"""

from __future__ import annotations

import os
from typing import Any

import transformers.trainer as stock
from accelerate import skip_first_batches
from transformers.trainer_utils import SaveStrategy

from lastgood.integrations.transformers import settings, unmanaged
from lastgood.integrations.transformers.old_loop import NEEDED, Loop
from lastgood.integrations.transformers.onlookers import onlookers
from lastgood.integrations.transformers.options import Options
from lastgood.integrations.transformers.session import Session
from lastgood.report import Report
from lastgood.state import rng
from lastgood.state.data import can_skip_unread, draws_nothing


class ManagedTrainer(Loop):
    """Inherit from it in front of Trainer, or let `lastgood.manage` put it there."""

    _lastgood: Session | None = None
    control: Any

    @property
    def lastgood(self) -> Session:
        """The session; made with the default options if `manage` was never called."""
        if self._lastgood is None:
            self._lastgood = Session(self, Options())
        return self._lastgood

    @property
    def resume_report(self) -> Report | None:
        """What the last `train()` restored, skipped and found changed; None after a fresh start."""
        return self.lastgood.report

    # ---- train ---------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None, **kwargs: Any
    ) -> Any:
        """As the stock `train`, where resume_from_checkpoint may also be "auto", "last", "best" or a step."""
        with self.lastgood.active(resume_from_checkpoint, trial) as path:
            return super().train(
                resume_from_checkpoint=path, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval, **kwargs
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        session = self.lastgood
        target = self.model if model is None else model
        session.model_ready(target)
        if not session.restore_weights(resume_from_checkpoint, target):
            rest = () if model is None else (model,)
            load = self._stock_load
            unmanaged.load_weights(resume_from_checkpoint, target, lambda: load(resume_from_checkpoint, *rest))

    def _stock_load(self, *args: Any) -> None:
        """How the class would load the weights of a checkpoint that isn't ours."""
        super()._load_from_checkpoint(*args)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        self.lastgood.model_ready(self.model)
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.lastgood.begin(num_update_steps_per_epoch)
        # The stock loop would train one step more than there are.
        return (num_train_epochs, 0) if self.lastgood.finished else (epochs, batches)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        session = self.lastgood
        if session.source is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        session.source.optimizer(self)
        session.source.scheduler(self)
        new = session.options.hyperparameters == "new"
        lr = settings.settle(self, fresh, apply_new=new)
        manifest = session.source.record.manifest
        if manifest is not None:
            session.changed += settings.changes(manifest.arguments, settings.arguments(self.args), apply_new=new, lr=lr)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.lastgood.source is None:
            super()._load_scaler(checkpoint)
        else:
            self.lastgood.source.scaler(self)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # A managed resume sets the generators in _run_epoch, each at the moment it was at when it was saved.
        if self.lastgood.source is None:
            super()._load_rng_state(checkpoint)

    # ---- the loop ------------------------------------------------------------------------

    def _run_epoch(self, *, epoch: int, epochs_trained: int, train_dataloader: Any, **rest: Any) -> None:
        session, consumed = self.lastgood, rest["steps_trained_in_current_epoch"]
        loader = session.tracker.watch(train_dataloader)
        if not self._begin_epoch(epoch, resumed=epoch == epochs_trained, consumed=consumed, **rest):
            return
        original = stock.skip_first_batches
        stock.skip_first_batches = self._skip_for(session.place, consumed)
        try:
            super()._run_epoch(epoch=epoch, epochs_trained=epochs_trained, train_dataloader=loader, **rest)
        finally:
            stock.skip_first_batches = original

    def _begin_epoch(self, epoch: int, *, resumed: bool, consumed: int, **rest: Any) -> bool:
        """Stand where the run was interrupted, if it was in this epoch; False if nothing of it is left to train."""
        session = self.lastgood
        source, session.place = session.source if resumed else None, None
        if source is None or not source.resume:
            return True
        rng.restore(rng.decode(source.resume["rng"]))
        self._catch_up(epoch, **rest)
        if self.control.should_training_stop:
            return False
        session.place = source.position()
        if session.place is not None and consumed in (session.place.consumed, 0):
            session.tracker.set_own(session.place.own)
        return True

    def _skip_for(self, position: Any, consumed: int) -> Any:
        """The stock loop's way past the batches already trained on, made ours: exact, and followed."""
        session = self.lastgood
        then = rng.capture()
        original = skip_first_batches
        if session.source is None or not session.source.resume:
            return original

        def skip(loader: Any, count: int) -> Any:
            wanted = session.options.data_skip
            replay = wanted == "replay" or (wanted == "auto" and loader.num_workers > 0 and not draws_nothing(loader))
            at = position if position is not None and position.consumed == count else None
            if at is None:  # another batch size or data length: skip as the stock loop does
                return session.tracker.watch(original(loader, count))
            if replay or not can_skip_unread(loader):
                return session.tracker.watch(loader, resume=at, then=then, discard=count)
            return session.tracker.watch(original(loader, count), resume=at, then=then)

        return skip

    def _catch_up(self, epoch: int, **rest: Any) -> None:
        """What the interrupted run still had to do at the step that was saved: evaluate, end the epoch."""
        session = self.lastgood
        if session.caught_up or session.source is None:
            return
        session.caught_up = True
        progress = session.source.resume["progress"]
        session.where = progress["where"]
        if progress["evaluate"]:
            self.control.should_evaluate = True
            self._after_step(epoch, **rest)
        # The loop leaves an epoch at its end, and when training is to stop (patience that ran out just now).
        stops = session.finished or self.control.should_training_stop
        ended = stops or self.state.global_step % session.updates_per_epoch == 0
        if progress["where"] == "step" and ended:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._after_step(epoch, **rest)

    def _after_step(
        self, epoch: int, *, model: Any, trial: Any, ignore_keys_for_eval: Any, start_time: float, **_: Any
    ) -> None:
        self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, epoch, ignore_keys_for_eval, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.lastgood.recorder.loss(loss)
        return self.lastgood.with_window(loss)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *rest: Any, **kwargs: Any) -> None:
        """Log, save, then evaluate: a crash in the evaluation must not cost the checkpoint of the same step."""
        session, args = self.lastgood, (tr_loss, grad_norm, *rest)
        session.stepped(grad_norm, kwargs.get("learning_rate"))
        if self.control.should_save and self.control.should_evaluate and self.args.save_strategy != SaveStrategy.BEST:
            self.control.should_evaluate = False
            session.evaluate = True
            super()._maybe_log_save_evaluate(*args, **kwargs)
            session.evaluate = False
            self.control.should_evaluate = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if session.owed:  # save_strategy="best" saves nothing but the best so far
            session.owed = False
            self._save_checkpoint(rest[0], rest[1])
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        session.occasions.resumes()
        if session.proving is not None and session.proved:
            session.proving.leave(self)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        session = self.lastgood
        session.evaluating = rng.capture()
        try:
            return super()._evaluate(*args, **kwargs)
        finally:
            session.evaluating = None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        new_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        self.lastgood.evaluated(metrics)
        return bool(new_best)

    # ---- saving and the end --------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.lastgood.proving is not None:
            return
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        record = self.lastgood.save(looked_at=tuple(onlookers(self, ManagedTrainer)))
        if record is not None and self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(self._get_output_dir(trial), record.name))

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        limit = self.args.save_total_limit
        try:
            self._end_loop(trial, start_time)
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def _end_loop(self, trial: Any, start_time: float) -> None:
        """The loop was left; what comes is the end of the run, or the end of this process. Asked twice, done once."""
        session = self.lastgood
        if session.left:
            return
        session.left = True
        if session.proving is not None:
            session.proving.leave(self)
        if session.coverage is not None:
            session.heed(wait=True)
            if session.live.owed:  # there is no next step to save
                self._save_checkpoint(self.model, trial)
        if session.finished and session.source is not None and not session.caught_up:
            session.caught_up = session.source.finish(self, session.live.root)
            rest = {"model": self.model_wrapped, "trial": trial, "ignore_keys_for_eval": None, "start_time": start_time}
            self._catch_up(int(self.state.num_train_epochs) - 1, **rest)
        if session.occasions.leave and not session.finished and self.state.global_step < self.state.max_steps:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            session.preempted()
        # With a limit of 1 the stock Trainer ends by deleting every checkpoint but the best, whosever it is.
        self.args.save_total_limit = None
        if session.coverage is not None:
            session.live.retain()

    def _load_best_model(self) -> None:
        if NEEDED:  # the old loop comes here before it ends
            self._end_loop(None, 0.0)
        self.lastgood.load_best(self.model)
