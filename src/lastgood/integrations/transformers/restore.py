"""A verified managed checkpoint -> a Trainer, part by part, with a line in the report for each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState

from lastgood.errors import IncompleteRestore
from lastgood.garbage import uncollected
from lastgood.integrations.transformers import extras
from lastgood.repo import after
from lastgood.state import optimizer, rng, tree, weights
from lastgood.state.data import Position
from lastgood.state.fingerprint import live_tensors
from lastgood.state.saved import Saved


@dataclass(slots=True)
class Source(Saved):
    """One checkpoint being restored, and the protocol of it."""

    allow: Collection[str] = ()
    restored: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    # ---- parts ---------------------------------------------------------------------------

    @uncollected()
    def weights(self, model: torch.nn.Module) -> None:
        """Every parameter and buffer of `model`, proven by digest."""
        expected, unstored = self.digests["tensors"], self.digests.get("unstored", ())
        base = "base_model" in self.allow
        stored = [item for name in self._weight_files for item in self.stored(name)]
        counts = weights.restore(
            model, expected, self._saved_weights, stored=stored, allow_base=base, unstored=unstored
        )
        detail = ", ".join(f"{number} {how}" for how, number in counts.items() if number)
        self.restored.append(("model", f"all {sum(counts.values())} tensors proven ({detail})"))

    @property
    def _weight_files(self) -> list[str]:
        return [name for name in self.parts["model"] if name.endswith(".safetensors")]

    def _saved_weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name in self._weight_files:
            # Conversions go by the names in the model's own files. Elsewhere (two adapters, live tensors
            # beside converted ones) the same name may come twice, and digests find either.
            prefix = "" if name.startswith("model") else f"{name}/"
            for key, tensor in self.load(name).items():
                found[prefix + key] = tensor
        return found

    @uncollected()
    def optimizer(self, trainer: Any) -> None:
        if self._has("optimizer"):
            own = self.given(optimizer.beginnings())
            optimizer.restore(trainer.optimizer, live_tensors(trainer.model), self.resume["optimizer"], own)
            kind = self.resume["optimizer"]["class"].rpartition(".")[2]
            self.restored.append(("optimizer", f"{kind}, {len(self.resume['optimizer']['state'])} parameters"))

    def scheduler(self, trainer: Any) -> None:
        if self._has("scheduler"):
            trainer.lr_scheduler.load_state_dict(tree.decode(self.resume["scheduler"], self.tensors))
            rates = ", ".join(f"{group['lr']:.4g}" for group in trainer.optimizer.param_groups[:1])
            self.restored.append(("scheduler", f"{type(trainer.lr_scheduler).__name__}, learning rate {rates}"))

    def scaler(self, trainer: Any) -> None:
        live = getattr(trainer.accelerator, "scaler", None)
        if live is not None and self._has("scaler"):
            live.load_state_dict(tree.decode(self.resume["scaler"], self.tensors))
            self.restored.append(("scaler", f"scale {live.get_scale():g}"))

    def callbacks(self, trainer: Any) -> None:
        """Attributes of callbacks that export them; matched by class, in order."""
        waiting = tree.decode(self.resume.get("callbacks", []), self.tensors)
        for callback in trainer.callback_handler.callbacks:
            if not isinstance(callback, ExportableState):
                continue
            match = next((entry for entry in waiting if entry["class"] == type(callback).__name__), None)
            if match is None:
                continue
            waiting.remove(match)
            for name, value in match["state"].items():
                setattr(callback, name, value)
            self.restored.append(("callback", type(callback).__name__))

    def extras(self, trainer: Any) -> None:
        """What the trainer and its callbacks carry from step to step."""
        saved = self.resume.get("extras")
        names = [] if saved is None else extras.restore(trainer, live_tensors(trainer.model), saved, self.tensors)
        if names:
            self.restored.append(("trainer", ", ".join(names)))

    def describe_rest(self, epoch: float) -> None:
        """Protocol of what the first epoch puts back: the generators and the place in the data."""
        if self._has("rng"):
            devices = sum(len(states) for states in self.resume["rng"]["devices"].values())
            self.restored.append(("rng", "python, numpy, torch" + (f", {devices} devices" if devices else "")))
        position = self.position()
        if position is not None:
            where = f"batch {position.consumed} of the epoch" if position.consumed else "beginning of an epoch"
            self.restored.append(("data", f"epoch {epoch:.4g}, {where}"))

    def finish(self, trainer: Any, root: Path) -> bool:
        """Of a run that is complete, no epoch begins that would put the generators back. root: of that run.

        Returns whether its last evaluation is done and what it changed is known: nothing is left to catch up with then.
        """
        later = after.read(root, self.record.id)
        rng.restore(rng.decode((later or self.resume)["rng"]))
        if later is None:
            return False
        for name in ("best_metric", "best_global_step"):
            setattr(trainer.state, name, later["trainer_state"].get(name, getattr(trainer.state, name)))
        trainer.state.log_history += later["rows"]
        return True

    def position(self) -> Position | None:
        value = self.resume.get("data")
        return None if value is None else Position.decode(value)

    def require(self, *parts: str) -> None:
        """Raise IncompleteRestore, before anything is changed, for parts that are missing and weren't allowed to be."""
        lost = [part for part in parts if self.resume.get(part) is None and part not in self.allow]
        if lost:
            raise IncompleteRestore(
                f"{self.record.name} holds no {', '.join(lost)}"
                + ("" if self.record.state == "full" else " (only its weights were kept)"),
                hint=f"resume from a full checkpoint, or lastgood.manage(trainer, allow_missing={lost}) to start"
                " these afresh",
            )

    def _has(self, part: str) -> bool:
        if self.resume.get(part) is not None:
            return True
        self.require(part)
        self.missing.append(part)
        return False
