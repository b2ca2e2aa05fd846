"""The loop of transformers before 5.4: one long method, with none of the hooks that `ManagedTrainer` overrides.

What these hooks do happens here at the places that the method does call: the loader is followed from where it is made,
a callback in front of the others begins each epoch, and the metrics at the end say that the loop is over. Everything
is taken back when the method returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.trainer as stock
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerState

NEEDED = not hasattr(Trainer, "_run_epoch")
"""Whether the transformers that is installed has the old loop."""


class OldLoop(Trainer):
    """Between ManagedTrainer and Trainer; calls what ManagedTrainer has for both kinds of loop."""

    lastgood: Any
    _loop: dict[str, Any]
    _begin_epoch: Any
    _skip_for: Any
    _end_loop: Any

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        trial = kwargs.get("trial", args[3] if len(args) > 3 else None)
        ignored = kwargs.get("ignore_keys_for_eval", args[4] if len(args) > 4 else None)
        self._loop = {"trial": trial, "ignore_keys_for_eval": ignored, "start_time": 0.0, "muted": None}
        limit = self.args.save_total_limit
        with self._hooked():
            try:
                return super()._inner_training_loop(*args, **kwargs)
            finally:
                self._unmute()
                self.args.save_total_limit = limit

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handler = self.callback_handler
        make: Any = self.get_train_dataloader
        first = _First(self)
        handler.callbacks.insert(0, first)
        # On the instance: a subclass that makes its loader by itself stands in front of this class.
        self.__dict__["get_train_dataloader"] = lambda: self.lastgood.tracker.watch(make())
        skip, speed = stock.skip_first_batches, stock.speed_metrics

        def speed_metrics(split: str, *args: Any, **kwargs: Any) -> Any:
            if split == "train":
                self._end_loop(self._loop["trial"], self._loop["start_time"])
            return speed(split, *args, **kwargs)

        def skip_batches(loader: Any, count: int) -> Any:
            return self._loop["skip"](loader, count)  # known when the epoch begins

        stock.skip_first_batches = skip_batches
        stock.speed_metrics = speed_metrics
        try:
            yield
        finally:
            stock.skip_first_batches, stock.speed_metrics = skip, speed
            del self.__dict__["get_train_dataloader"]
            handler.callbacks[:] = [callback for callback in handler.callbacks if callback is not first]

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        epochs, updates, *rest = super().set_initial_training_values(*args, **kwargs)
        self.lastgood.model_ready(self.model)
        self._loop |= {"epochs": epochs, "updates": updates, "max_steps": rest[-1]}
        target = self.lastgood.target
        if target is not None:
            step = TrainerState.load_from_json(str(Path(target.path) / stock.TRAINER_STATE_NAME)).global_step
            if step >= rest[-1]:  # of a finished run the loop would train one step more
                epochs = step // updates
        return (epochs, updates, *rest)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            self.lastgood.begin(self._loop["updates"])

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.state.max_steps = self._loop["max_steps"]
        self.lastgood.begin(self._loop["updates"])

    def begin_epoch(self, epoch: int) -> None:
        """Before any other callback hears of the epoch."""
        session, loader = self.lastgood, self.callback_handler.train_dataloader
        session.tracker.watch(loader)  # in place, again: the epoch before may have begun in its middle
        trained = self._loop.setdefault("first_epoch", epoch) == epoch and session.target is not None
        consumed = 0
        if trained and not self.args.ignore_data_skip:
            consumed = self.state.global_step % self._loop["updates"] * self.args.gradient_accumulation_steps
        rest = {"model": self.model_wrapped, **{k: self._loop[k] for k in ("trial", "ignore_keys_for_eval")}}
        ready = self._begin_epoch(epoch, resumed=trained, consumed=consumed, start_time=0.0, **rest)
        if not ready:
            # Patience ran out at the step that was resumed from. The loop can't be left before it has been through an
            # epoch, so it gets an empty one that nobody hears of.
            self._loop["muted"] = list(self.callback_handler.callbacks)
            self.callback_handler.callbacks.clear()
        self._loop["skip"] = self._skip_for(session.place, consumed)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        return ([], None) if self._loop["muted"] is not None else super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Any, *args: Any, **kwargs: Any) -> None:
        if self._loop["muted"] is not None:
            self._unmute()
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False
            return
        self._tr_loss = tr_loss
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _unmute(self) -> None:
        muted, self._loop["muted"] = self._loop["muted"], None
        if muted is not None:
            self.callback_handler.callbacks[:] = muted


class _First(TrainerCallback):
    """In front of the others."""

    def __init__(self, trainer: OldLoop) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.num_train_epochs = self.trainer._loop["epochs"]
        self.trainer._tr_loss = torch.tensor(0.0, device=args.device)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = self.trainer._loop.get("epoch")
        epoch = int(state.global_step // self.trainer._loop["updates"]) if epoch is None else epoch + 1
        self.trainer._loop["epoch"] = epoch
        self.trainer.begin_epoch(epoch)


Loop: Any = OldLoop if NEEDED else Trainer
"""What ManagedTrainer stands on."""
