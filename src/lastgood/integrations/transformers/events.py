"""The callback that tells a session where the training loop is, and asks for the saves that are due besides its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from lastgood.talk import say

if TYPE_CHECKING:
    from lastgood.integrations.transformers.session import Session


class Events(TrainerCallback):
    """Last in the list, so that it sees what the other callbacks asked for."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.training_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session, occasions = self.session, self.session.occasions
        session.where = "step"
        if session.proving is not None:
            control.should_training_stop = control.should_training_stop or bool(occasions.stopping(state.global_step))
            return
        session.heed()
        self._schedule(args, state, control)
        reasons = occasions.look(state.global_step, state.epoch or 0.0, busy=session.live.busy)
        if reasons and (not self._saves_nothing(args) or occasions.by == "request" or not occasions.leave):
            if not control.should_save:
                say(f"saving at step {state.global_step}: {'; '.join(reasons)}")
            control.should_save = session.owed = True
        control.should_training_stop = control.should_training_stop or bool(occasions.leave)

    def _schedule(self, args: Any, state: Any, control: Any) -> None:
        """With save_steps="auto" the Trainer's own number of steps brings no save, and the last step always one."""
        if self.session.occasions.triggers.interval is None:
            return
        if state.global_step >= state.max_steps:
            control.should_save = True
        elif args.save_strategy == "steps" and state.save_steps > 0 and state.global_step % state.save_steps == 0:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asked to leave while it was being saved: what is behind this step is there, another one would have to be."""
        if self.session.occasions.active and self.session.occasions.stopping(state.global_step):
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.where = "epoch"

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.session.occasions.active and self.session.occasions.stopping(state.global_step):
            self.session.stop_inside_evaluation()

    def _saves_nothing(self, args: Any) -> bool:
        """save_strategy="no", and no trigger: a preemption doesn't save then; who asks for a save gets one."""
        triggers = self.session.occasions.triggers
        return args.save_strategy == "no" and not triggers.any and triggers.time_limit is None
