"""The callback that tells a session where the training loop is, and the signal that asks it to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

if TYPE_CHECKING:
    from lastgood.integrations.transformers.session import Session


class Events(TrainerCallback):
    """Last in the list, so that it sees what the other callbacks asked for."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.training_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.where = "step"
        if self.session.stop.requested:
            control.should_save = control.should_save or args.save_strategy != "no"
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.where = "epoch"

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.session.stop.requested:
            self.session.stop_inside_evaluation()


ECHO = 1.0
"""Seconds in which a second SIGTERM is the same request: a service manager signals the launcher and every process of
it, and the launcher passes its own on."""


class StopRequest:
    """SIGTERM, noted: the handler sets a flag and nothing else. A second one, later, ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self.since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while training; the handler that was there before comes back afterwards."""
        self.requested = False
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread alone
            return
        before = signal.getsignal(signal.SIGTERM)
        owner = os.getpid()

        def note(number: int, frame: Any) -> None:
            if self.requested and os.getpid() == owner and time.monotonic() - self.since < ECHO:
                return
            if self.requested or os.getpid() != owner:  # a forked data worker must die as it always did
                signal.signal(number, before if callable(before) else signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.requested, self.since = True, time.monotonic()

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
