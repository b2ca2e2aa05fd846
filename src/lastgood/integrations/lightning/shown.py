"""What code written for ModelCheckpoint reads from the callback, as the run directory has it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lastgood import ranking
from lastgood.integrations.lightning.session import Session
from lastgood.integrations.lightning.target import best, path_of
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo.read import records


class Shown:
    """best_model_path, best_model_score, best_k_models, last_model_path and their like."""

    # Set by ModelCheckpoint's own __init__.
    dirpath: Any
    save_last: bool | str | None
    save_on_exception: bool
    save_weights_only: bool
    verbose: bool
    _every_n_train_steps: int
    _every_n_epochs: int
    _train_time_interval: timedelta | None
    _last_time_checked: float | None
    _should_save_on_train_epoch_end: Any
    keep: Keep | None
    _best_path: str
    _session: Session | None
    _last_session: Session | None

    @property
    def best_model_path(self) -> str:
        """The best checkpoint's directory by the monitor, without one the newest; "" if there is none."""
        if self._session is not None:
            self._session.settle()
        if self.dirpath is not None:
            self._refresh()
        return self._best_path

    @best_model_path.setter
    def best_model_path(self, value: str) -> None:
        self._best_path = value

    @property
    def report(self) -> Any:
        """What the last resume brought back (lastgood.report.Report); None after a fresh start."""
        session = self._session or self._last_session
        return None if session is None else session.report

    def _refresh(self) -> None:
        """The attributes of ModelCheckpoint as the directory has it now."""
        root = Path(str(self.dirpath))
        found = records(root) if self.keep is not None and root.is_dir() else ()
        keep = self.keep or Keep()
        mine = [record for record in found if record.ours and record.current]
        ranked: tuple[Record, ...] = ()
        monitor, mode = keep.primary
        if monitor is not None and mode is not None:
            ranked = ranking.ranking(mine, monitor, mode)
        top = ranked[: keep.best] if keep.best is not None else ranked
        self.best_k_models = {path_of(root, r): _score(r, keep) for r in top}
        self._best_path = path_of(root, best(found, keep))
        self.best_model_score = _score(ranked[0], keep) if ranked else None
        self.kth_best_model_path = path_of(root, top[-1]) if top else ""
        if top:
            self.kth_value = _score(top[-1], keep)
        newest = max(mine, key=lambda record: record.seq, default=None)
        self.last_model_path = path_of(root, newest)
        self.current_score = _score(newest, keep) if newest is not None and newest in ranked else None

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what there is to know stands in the run directory, which may be moved."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, also from a ModelCheckpoint."""


def _score(record: Record, keep: Keep) -> torch.Tensor | None:
    monitor, _ = keep.primary
    value = None if monitor is None else ranking.metric_of(record, monitor)
    return None if value is None else torch.tensor(value, dtype=torch.float64)
