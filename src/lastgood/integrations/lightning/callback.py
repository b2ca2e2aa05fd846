"""`lastgood.LightningCheckpoint`: the callback that a Trainer is given in the place of ModelCheckpoint.

It is a ModelCheckpoint, so that trainer.checkpoint_callback, ckpt_path="best" and "last" and code that
reads best_model_path find what they look for; none of the saving code of the original runs.
"""

from __future__ import annotations

import functools
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lastgood.background import Wanted, checked, chosen
from lastgood.errors import LastgoodError, UsageError, wrong_type
from lastgood.integrations.lightning import options
from lastgood.integrations.lightning.flavour import flavour, gate_class, io_class, module
from lastgood.integrations.lightning.io import Reading
from lastgood.integrations.lightning.session import Session
from lastgood.integrations.lightning.shown import Shown
from lastgood.integrations.lightning.target import path_of
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.state import flying, rng
from lastgood.talk import say, warn

STATUS = 75
"""Exit status after a SIGTERM whose checkpoint is on disk: EX_TEMPFAIL, launch it again."""


class Checkpointing(Shown):
    """The methods of LightningCheckpoint; `checkpoint_class` puts them above a ModelCheckpoint.

    dirpath: the run directory; None: `checkpoints` in the trainer's default_root_dir, the same at every launch.
    monitor, mode, save_top_k, save_last: what is kept, as ModelCheckpoint means it; the newest always stays.
    every_n_train_steps, train_time_interval, every_n_epochs, save_on_train_epoch_end, save_on_exception,
    save_weights_only, verbose: as in ModelCheckpoint; a save comes before the validation of the same step.
    keep: a lastgood.Keep in the place of save_top_k and save_last.
    on_error: a save that fails warns and training goes on, or raises SaveFailed.
    on_full: what a save that finds no room does instead: "warn", "wait" until there is room, or "stop" with status 75.
    resume: "auto" goes on from the newest good checkpoint whenever fit is given no ckpt_path, and starts afresh if
        there is none.
    verify: "full" hashes every byte before a resume, "quick" compares sizes and headers.
    background: training goes on while a copy of the state is written: True, False, "auto" (where it is trained on an
        accelerator), or a lastgood.Background.
    """

    _flavour = "lightning.pytorch"

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool | Literal["link"] | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        verbose: bool = False,
        keep: Keep | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        on_full: Literal["warn", "wait", "stop"] | None = None,
        resume: Literal["auto"] | None = None,
        verify: Literal["full", "quick"] = "full",
        background: Wanted = "auto",
        **other: Any,
    ) -> None:
        options.refuse(other)
        checked(background)
        for name, value, allowed in (
            ("on_error", on_error, ("warn", "raise")),
            ("on_full", on_full, ("warn", "wait", "stop", None)),
            ("resume", resume, ("auto", None)),
            ("verify", verify, ("full", "quick")),
        ):
            if value not in allowed:
                raise wrong_type(name, value, " or ".join(repr(word) for word in allowed))
        self._session: Session | None = None
        self._last_session: Session | None = None
        self._best_path = ""
        if keep is not None and monitor is None and isinstance(keep, Keep):
            monitor, mode = keep.primary[0], keep.primary[1] or mode
        self.keep = options.retention(keep, monitor=monitor, mode=mode, save_top_k=save_top_k, save_last=save_last)
        super().__init__(  # type: ignore[call-arg]
            dirpath=None if dirpath is None else os.fspath(dirpath),
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            save_on_exception=save_on_exception,
            save_weights_only=save_weights_only,
            verbose=verbose,
        )
        self.on_error, self.on_full, self.resume, self.verify = on_error, on_full, resume, verify
        self.background = background

    # ---- ckpt_path -----------------------------------------------------------------------

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        """What ckpt_path="last" means: the newest good checkpoint, verified."""
        self._place(trainer)
        if trainer.state.fn == "fit":
            target = self._open(trainer).find("last")
            return set() if target is None else {os.fspath(target.path)}
        manager = Manager(root=Path(str(self.dirpath)), keep=self.keep or Keep(), verify=self.verify)
        if not any(record.ours for record in manager.records()):
            return set()
        return {os.fspath(manager.root / manager.find("last", full=False).record.name)}

    def _place(self, trainer: Any) -> None:
        if self.dirpath is None:
            self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")

    def _open(self, trainer: Any) -> Session:
        """The session of the fit that begins, with the run's lock."""
        if self._session is None:
            root, keep = Path(str(self.dirpath)), self.keep or Keep()
            manager = Manager(
                root, keep, on_error=self.on_error, on_full=self.on_full, verify=self.verify,
                background=chosen(self.background, accelerated=trainer.strategy.root_device.type != "cpu"),
            )  # fmt: skip
            flying.boarding(manager, accelerated=trainer.strategy.root_device.type != "cpu")
            manager.space.leaving = lambda: trainer.received_sigterm
            manager.open()
            self._session = Session(manager, weights_only=self.save_weights_only, trainer=trainer)
        return self._session

    # ---- events --------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not isinstance(trainer, module(self._flavour).Trainer):
            raise UsageError(
                f"this callback was made for {self._flavour}, the Trainer is {type(trainer).__module__}'s",
                hint="lastgood.integrations.lightning.callback.checkpoint_class('pytorch_lightning') makes the other",
            )
        options.supported(trainer, pl_module)
        self._place(trainer)
        reading = trainer.strategy.checkpoint_io
        if not isinstance(reading, Reading):
            reading = trainer.strategy.checkpoint_io = io_class(self._flavour)(reading)
        reading.session = None
        reading.manager = Manager(root=Path(str(self.dirpath)), keep=self.keep or Keep(), verify=self.verify)
        if stage != "fit" or trainer.fast_dev_run or self.keep is None:
            return
        session = reading.session = self._open(trainer)
        self._last_time_checked = None
        original = type(trainer.strategy).process_dataloader

        def process_dataloader(loader: Any) -> Any:
            made = original(trainer.strategy, loader)
            if trainer.state.fn != "fit":
                return made
            return session.watching.watch(made, training=trainer.training)

        trainer.strategy.process_dataloader = process_dataloader
        gate = gate_class(self._flavour)
        trainer.callbacks = [gate(self), *(one for one in trainer.callbacks if not isinstance(one, gate))]
        if self.resume == "auto":
            self._resume_unasked(trainer, session)

    def _resume_unasked(self, trainer: Any, session: Session) -> None:
        """resume="auto": Lightning asks nobody when it is given no ckpt_path, so its one question is answered here."""
        connector = trainer._checkpoint_connector
        original = connector._restore_modules_and_callbacks

        def restore(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
            del connector._restore_modules_and_callbacks
            if not checkpoint_path:
                target = session.find("last")
                checkpoint_path = None if target is None else os.fspath(target.path)
                if target is None:
                    say(f"no checkpoint in {session.manager.root} yet: starting at step 0")
            original(checkpoint_path, weights_only)

        connector._restore_modules_and_callbacks = restore

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._session is not None:
            self._session.begin(trainer, pl_module)
            self._refresh()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._last_time_checked = time.monotonic()
        if self._session is not None:
            self._session.started()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._session is not None:
            self._session.steps_before = trainer.global_step
            self._session.fresh.mark(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        session = self._session
        if session is None:
            return
        session.heed()
        if session.means is not None:
            session.means.join(trainer.fit_loop.epoch_loop._results)
        if not session.due and trainer.global_step != session.saved_step and self._due(trainer):
            session.due = True
        if session.due:
            session.note(session.fresh.values(trainer))
            session.fresh.mark(trainer)

    def _due(self, trainer: Any) -> bool:
        """ModelCheckpoint's triggers, at the end of a batch."""
        steps, interval = self._every_n_train_steps, self._train_time_interval
        if steps >= 1 and trainer.global_step % steps == 0:
            return True
        now = time.monotonic()
        since = self._last_time_checked
        if interval is not None and since is not None and now - since >= interval.total_seconds():
            self._last_time_checked = now
            return True
        last = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        return bool(last and self._epoch_due(trainer) and self._should_save_on_train_epoch_end(trainer))

    def _epoch_due(self, trainer: Any) -> bool:
        return self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def before_validation(self, trainer: Any) -> None:
        session = self._session
        if session is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if session.landing is not None:
            session.land()
        elif session.due or (self._epoch_due(trainer) and not self._should_save_on_train_epoch_end(trainer)):
            self._save("validate", ahead=session._ahead())
        session.clean = rng.capture()
        session.fresh.mark(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        session = self._session
        if session is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        session.note(session.fresh.values(trainer))
        session.fresh.mark(trainer)
        self._refresh()

    def before_epoch(self, trainer: Any) -> None:
        session = self._session
        if session is None:
            return
        if session.means is not None:
            session.means.clear(trainer.fit_loop.epoch_loop._results)
            session.means = None
        if session.landing is not None:
            session.land()
        elif session.due:
            self._save("epoch")

    def before_epoch_end(self, trainer: Any) -> None:
        """Lightning announces the end of an epoch also where max_steps ends the run inside one."""
        session = self._session
        if session is None:
            return
        if session.means is not None:
            session.means.fill(trainer.fit_loop.epoch_loop._results, trainer.lightning_module)
        if session.due and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._save("batch", ahead=session._ahead(), ended=True)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._session is not None:
            self._session.note(self._session.fresh.values(trainer))
            self._session.fresh.mark(trainer)

    def before_train_end(self, trainer: Any) -> None:
        session = self._session
        if session is not None:
            session.settle()
        if session is not None and (session.due or (self.save_last and not session.manager.saved)):
            self._save("epoch")
        self._refresh()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Nothing: the state was saved before the other callbacks' on_train_end."""

    def _save(self, where: Any, **moment: Any) -> None:
        assert self._session is not None
        record = self._session.save(where, **moment)
        if record is not None:
            self._last_checkpoint_saved = path_of(self._session.manager.root, record)
            self._last_global_step_saved = record.step
            if self.verbose:
                say(f"saved {record.name}")
        self._refresh()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        session = self._session
        if session is None:
            return
        stopped = type(exception).__name__ == "SIGTERMException"
        room = exception is session.leave
        try:
            wanted = (stopped or session.due or self.save_on_exception) and not isinstance(exception, LastgoodError)
            if wanted and session.training and session.landing is None and not room:
                session.ending, session.manager.space.patient = True, False
                session.settle_whatever()
                self._save_now(trainer, session)
        finally:
            session.close("preempted" if stopped or room else "interrupted", **({"by": "space"} if room else {}))
            self._release(trainer)
        if stopped:
            say(f"stopped by SIGTERM at step {trainer.global_step}; the same command continues with ckpt_path='last'")
            exception.code = STATUS  # type: ignore[attr-defined]

    def _save_now(self, trainer: Any, session: Session) -> None:
        """Wherever the loops are: between two batches, inside one, inside a validation, between two epochs."""
        loop = trainer.fit_loop
        if trainer.global_step in (0, session.saved_step):
            return
        if trainer.validating:
            if any(getattr(one, "_average_model", None) is not None for one in trainer.callbacks):
                warn("the run ended inside a validation with averaged weights: nothing is saved for this step")
                return
            self._save("validate", ahead=session._ahead(), clean=False)
        elif loop.epoch_progress.current.completed == loop.epoch_progress.current.ready:
            self._save("epoch")
        else:
            progress = loop.epoch_loop.batch_progress.current
            self._save("batch", ahead=session._ahead(), clean=progress.ready == progress.processed)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self._session is not None:
            self._session.close("finished")
            self._release(trainer)

    def _release(self, trainer: Any) -> None:
        trainer.strategy.__dict__.pop("process_dataloader", None)
        vars(trainer._checkpoint_connector).pop("_restore_modules_and_callbacks", None)
        gate = gate_class(self._flavour)
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, gate)]
        reading = trainer.strategy.checkpoint_io
        if isinstance(reading, Reading):
            reading.session = None
        self._refresh()
        self._last_session, self._session = self._session, None


@functools.cache
def checkpoint_class(name: str) -> type[Any]:
    """LightningCheckpoint for `lightning.pytorch` or `pytorch_lightning`."""
    base = module(f"{name}.callbacks").ModelCheckpoint
    body = {"_flavour": name, "__module__": __name__, "__doc__": Checkpointing.__doc__}
    return type("LightningCheckpoint", (Checkpointing, base), body)


def __getattr__(name: str) -> Any:
    if name == "LightningCheckpoint":
        return checkpoint_class(flavour())
    if name == "LightningIO":
        return io_class(flavour())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
