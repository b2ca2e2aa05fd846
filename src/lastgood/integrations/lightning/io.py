"""Lightning's CheckpointIO: lastgood's directories are read by us, the rest by whoever was there before."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lastgood.errors import CorruptCheckpoint, NoCheckpoint, Refused
from lastgood.integrations.lightning.target import best, verified
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.state import lightning as files
from lastgood.talk import warn

if TYPE_CHECKING:
    from lastgood.integrations.lightning.session import Session

MANIFEST = "lastgood.json"


def ours(path: Any) -> bool:
    """Whether this is a checkpoint directory with a manifest."""
    return isinstance(path, (str, os.PathLike)) and (Path(path) / MANIFEST).is_file()


class Reading:
    """Mixed into CheckpointIO. before: the one that was in use; session: the fit that is under way."""

    before: Any = None
    session: Session | None = None
    manager: Manager | None = None  # of the run that the callback writes, for reading alone

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if self.session is not None and self.session.staging is not None:
            self.session.write(checkpoint)
            return
        self._others().save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if not ours(path):
            given = {} if map_location is None else {"map_location": map_location}
            found: dict[str, Any] = self._others().load_checkpoint(path, weights_only=weights_only, **given)
            return found
        if self.session is not None and self.session.trainer is not None and self.session.trainer.state.fn == "fit":
            self.session.model_ready(self.session.trainer.lightning_module)
            return self.session.load(Path(path), self.session.trainer)
        place = Path(path)
        try:
            record = verified(place, full=True)
        except CorruptCheckpoint as error:
            record, place = self._instead(place, error)
        return files.read_whole(place, () if record.manifest is None else record.manifest.files)

    def _instead(self, path: Path, error: CorruptCheckpoint) -> tuple[Record, Path]:
        """The next best good one where the best is damaged and ckpt_path="best" named it."""
        if self.manager is None or path.absolute().parent != self.manager.root.absolute():
            raise error
        named, others = path.name, self.manager.records()
        first = best(tuple(others), self.manager.keep)
        if first is None or first.name != named or self.manager.keep.monitor is None:
            raise error
        found = self.manager.find("best", full=False)
        warn(f"{error.message}; the next best good one is loaded: {found.record.name}")
        return found.record, self.manager.root / found.record.name

    def remove_checkpoint(self, path: Any) -> None:
        if ours(path):
            raise Refused(f"{path} is a checkpoint of lastgood: its retention alone deletes it", hint="lastgood prune")
        self._others().remove_checkpoint(path)

    def teardown(self) -> None:
        if self.before is not None:
            self.before.teardown()

    def _others(self) -> Any:
        if self.before is None:
            from lightning.pytorch.plugins.io import TorchCheckpointIO

            self.before = TorchCheckpointIO()
        return self.before


def lightning_file(path: str | os.PathLike[str]) -> io.BytesIO:
    """A checkpoint directory as the open file that `load_from_checkpoint` takes; it is verified first.

    `Model.load_from_checkpoint(lastgood.lightning_file(callback.best_model_path))`. Holds the weights in memory a
    second time. Raises NoCheckpoint or CorruptCheckpoint.
    """
    place = Path(path)
    if not ours(place):
        raise NoCheckpoint(f"{place} is not a checkpoint of lastgood", hint="give one such as run/checkpoint-500")
    verified(place, full=True)
    if not (place / files.ABOUT).exists():
        raise NoCheckpoint(f"{place} wasn't written by a Lightning run", hint="load its weights with safetensors")
    buffer = io.BytesIO()
    torch.save(files.read_model(place), buffer)
    buffer.seek(0)
    return buffer
