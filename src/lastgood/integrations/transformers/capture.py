"""A Trainer's state -> the parts of a checkpoint, written into a staging directory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.trainer_callback import ExportableState

from lastgood.behind import Behind
from lastgood.format import guard
from lastgood.format.digests import FORMAT
from lastgood.integrations.transformers import extras
from lastgood.repo.staging import Staging
from lastgood.state import rng, tree
from lastgood.state.capturing import Capturing
from lastgood.state.conversions import tables
from lastgood.state.data import Position
from lastgood.state.fingerprint import live_tensors
from lastgood.state.rng import Rng
from lastgood.state.tensors import named
from lastgood.state.weights import Coverage

TENSOR_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where in the loop a save happens: what a resume has to catch up with before the next step.

    where: "step" (inside an epoch, its end not announced yet) or "epoch" (at its end).
    evaluate: an evaluation is due at this step and comes after the save.
    """

    where: str
    evaluate: bool
    updates_per_epoch: int
    rng: Rng
    position: Position | None


def write(
    trainer: Any,
    staging: Staging,
    *,
    live: Mapping[str, torch.Tensor],
    coverage: Coverage,
    moment: Moment,
) -> None:
    """Stage everything: weights through save_model, the rest by ourselves, no pickle anywhere.

    live: the model's tensors as they are now.
    """
    _write_model(trainer, staging, live, coverage)
    for name in guard.NAMES:
        staging.data(name, "model", guard.content(name))
    staging.data("trainer_state.json", "model", trainer_state(trainer))
    if not trainer.args.save_only_model:
        _write_resume_state(trainer, staging, live, moment, coverage.capturing)
    staging.adopt("model")


def rehearsal(trainer: Any, coverage: Coverage) -> Callable[[Staging], None] | None:
    """Stages what takes the time of a first save: models and optimizers. None where that runs somebody's own code."""
    methods = ("save_model", "_save")
    if not all(getattr(type(trainer), name).__module__.startswith(_LIBRARIES) for name in methods):
        return None
    if any(name in vars(trainer) for name in methods):
        return None

    def write(staging: Staging) -> None:
        live = live_tensors(trainer.model, coverage.members(trainer.model))
        _write_model(trainer, staging, live, coverage)
        if not trainer.args.save_only_model:
            _, tensors = coverage.capturing.capture(trainer.optimizer, live)
            staging.tensors("optimizer.safetensors", "optimizer", named(tensors), TENSOR_METADATA)
        staging.adopt("model")

    return write


_LIBRARIES = ("transformers.", "trl.", "lastgood.")


def _write_model(trainer: Any, staging: Staging, live: Mapping[str, torch.Tensor], coverage: Coverage) -> None:
    coverage.look(trainer.model, coverage.members(trainer.model))
    with coverage.collecting(trainer.model, staging.path) as files:
        trainer.save_model(staging.path, _internal_call=True)
    digests, beside = coverage.extras(trainer.model, live, files)
    for file in files:
        staging.tensors(file.name, "model", named(file.tensors), file.metadata, told=digests.of(file.name))
    if beside:
        staging.tensors("extra.safetensors", "model", named(beside), TENSOR_METADATA)
    made = coverage.computed(trainer.model) & set(digests.names)
    unstored, transient = sorted(made - set(beside)), sorted(made & set(beside))
    tied = coverage.aliases(trainer.model, files)
    about = {"unstored": unstored, "transient": transient, **({"aliases": tied} if tied else {})}
    staging.data("tensors.json", "model", lambda: _json({"format": FORMAT, "tensors": digests.all(), **about}))


def _write_resume_state(
    trainer: Any, staging: Staging, live: Mapping[str, torch.Tensor], moment: Moment, capturing: Capturing
) -> None:
    values, tensors = capturing.capture(trainer.optimizer, live)
    scaler = getattr(trainer.accelerator, "scaler", None)
    resume = {
        "format": 1,
        "optimizer": values,
        "scheduler": tree.encode(trainer.lr_scheduler.state_dict(), tensors, "scheduler"),
        "scaler": None if scaler is None else tree.encode(scaler.state_dict(), tensors, "scaler"),
        "rng": rng.encode(moment.rng),
        "data": None if moment.position is None else moment.position.encode(),
        "callbacks": tree.encode(callback_states(trainer), tensors, "callbacks"),
        "extras": extras.capture(trainer, live, tensors),
        "progress": {
            "global_step": trainer.state.global_step,
            "epoch": trainer.state.epoch,
            "where": moment.where,
            "evaluate": moment.evaluate,
            "updates_per_epoch": moment.updates_per_epoch,
            "loss_window": tree.encode(float(trainer._tr_loss.item()), {}, "loss_window"),
            "last_logged_step": trainer._globalstep_last_logged,
        },
    }
    staging.tensors("optimizer.safetensors", "optimizer", named(tensors), TENSOR_METADATA)
    staging.data("resume.json", "progress", _json(resume))


def callback_states(trainer: Any) -> list[dict[str, Any]]:
    """State of the callbacks that have one, in the order in which they are registered."""
    states = []
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            states.append({"class": type(callback).__name__, "state": callback.state().get("attributes", {})})
    return states


def trainer_state(trainer: Any) -> bytes:
    """trainer_state.json as the stock Trainer writes it, so that notebooks and plots keep working."""
    return _json(_state(trainer), indent=2)


def after_evaluation(trainer: Any, rows: int) -> dict[str, Any]:
    """What an evaluation changed since the save of the same step (repo/after.py). rows: of the log at the save."""
    state = _state(trainer)
    log = state.pop("log_history")
    tensors: dict[str, torch.Tensor] = {}
    scheduler = tree.encode(trainer.lr_scheduler.state_dict(), tensors, "scheduler")
    return {
        "format": 1,
        "rng": rng.encode(rng.capture()),
        "trainer_state": state,
        "rows": log[rows:],
        "scheduler": None if tensors else scheduler,
        "rates": [float(group["lr"]) for group in trainer.optimizer.param_groups],
    }


def _state(trainer: Any) -> dict[str, Any]:
    states: dict[str, list[Any]] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    # One state as itself, several of the same class as a list: what the stock Trainer reads back.
    trainer.state.stateful_callbacks.update({name: found if found[1:] else found[0] for name, found in states.items()})
    plain: dict[str, Any] = _valid(asdict(trainer.state))
    return plain


def _valid(value: Any) -> Any:
    """JSON has no NaN and no infinity; the stock Trainer writes them all the same and other readers choke."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _valid(item) for key, item in value.items()}
    return [_valid(item) for item in value] if isinstance(value, (list, tuple)) else value


def _json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, allow_nan=False, sort_keys=indent is not None, indent=indent) + "\n").encode()


def warm(run: Behind, trainer: Any, coverage: Coverage) -> None:
    """See `Behind.warm`: nothing is rehearsed where a save is due now."""
    write = None if trainer.control.should_save else rehearsal(trainer, coverage)
    run.warm(lambda: estimate(trainer, live_tensors(trainer.model)), tables, write)


def estimate(trainer: Any, live: Mapping[str, torch.Tensor]) -> int:
    """Bytes that a save will need: weights that are saved plus optimizer state."""
    adapter = hasattr(trainer.model, "peft_config")
    total = sum(t.numel() * t.element_size() for t in live.values() if t.requires_grad or not adapter)
    if not trainer.args.save_only_model and trainer.optimizer is not None:
        total += extras.size(trainer, live) + Capturing().bytes(trainer.optimizer)
    return int(total)
