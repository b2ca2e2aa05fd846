"""What a Lightning run holds besides its dictionary: weights by digest, optimizers by name, gradients, places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lastgood.errors import Incompatible
from lastgood.format.digests import FORMAT
from lastgood.integrations.lightning import metrics, moment
from lastgood.integrations.lightning.moment import Where
from lastgood.integrations.lightning.stream import Place
from lastgood.repo.staging import Staging
from lastgood.state import lightning as files
from lastgood.state import optimizer, plain, rng, tree, weights
from lastgood.state.capturing import Capturing
from lastgood.state.digests import Digests, Split, identity
from lastgood.state.fingerprint import Fingerprints, live_tensors
from lastgood.state.rng import Rng
from lastgood.state.tensors import named


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where a save happens. counters: of the fit loop, exact. accumulating: gradients wait for the next step."""

    where: Where
    counters: dict[str, Any]
    rng: Rng
    train: list[Place]
    evaluation: list[Place]
    accumulating: bool


@dataclass(slots=True)
class Weights:
    """The module's tensors: which of them `state_dict` doesn't hold, and the proof of a restore."""

    initial: dict[str, str]
    prints: Fingerprints
    capturing: dict[int, Capturing] = field(default_factory=dict)

    @classmethod
    def begin(cls, module: torch.nn.Module) -> Weights:
        prints = Fingerprints()
        still = {name: tensor for name, tensor in live_tensors(module).items() if not tensor.requires_grad}
        return cls(prints.of(still), prints)

    def stage(
        self, staging: Staging, module: torch.nn.Module, model: files.Model, stored: Iterable[torch.Tensor]
    ) -> None:
        """Digests of all tensors, and those that are trained or changed and neither in `model` nor among `stored`."""
        live = live_tensors(module)
        split = Split.of(live, [model], self.prints)
        digests = Digests(list(live), split.known(live, self.prints), split.later, {model.name: model.digests})
        held = {identity(tensor) for tensor in (*model.tensors.values(), *stored)}
        lost = {
            name: tensor
            for name, tensor in live.items()
            if identity(tensor) not in held and (tensor.requires_grad or self.initial.get(name) != digests.known[name])
        }
        if lost:
            staging.tensors(files.EXTRA, "model", named(lost), files.METADATA)
        staging.data(files.DIGESTS, "model", lambda: files.dump({"format": FORMAT, "tensors": digests.all()}))

    def restore(self, module: torch.nn.Module, path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Every tensor as its digest says. Raises Incompatible or IncompleteRestore, and nothing is changed then."""

        def load() -> dict[str, torch.Tensor]:
            found = files.load(path / files.MODEL)
            extra = files.load(path / files.EXTRA, missing=True)
            return {**tensors, **found, **{f"extra/{name}": tensor for name, tensor in extra.items()}}

        return weights.restore(module, files.read_json(path / files.DIGESTS)["tensors"], load)


def write(
    staging: Staging, checkpoint: Mapping[str, Any], trainer: Any, module: Any, now: Moment, proof: Weights
) -> dict[str, str]:
    """Stage everything; returns the hyper-parameters that were left out, with the reasons."""
    precision = type(trainer.precision_plugin).__qualname__
    model, left = files.write_model(staging, checkpoint, precision)
    full = "optimizer_states" in checkpoint
    under = checkpoint.get("current_model_state", {}) if full else {}
    proof.stage(staging, module, model, [t for t in under.values() if isinstance(t, torch.Tensor)])
    if full:
        _write_resume(staging, checkpoint, trainer, module, now, proof, precision, left)
    return left


def _write_resume(
    staging: Staging,
    checkpoint: Mapping[str, Any],
    trainer: Any,
    module: Any,
    now: Moment,
    proof: Weights,
    precision: str,
    left: Mapping[str, str],
) -> None:
    live, tensors = live_tensors(module), {}
    states = []
    for number, one in enumerate(trainer.optimizers):
        capturing = proof.capturing.setdefault(number, Capturing())
        entry, found = capturing.capture(one, live, prefix=f"{number}." if number else "")
        states.append(entry)
        tensors.update(found)
    single = len(states) == 1
    waiting = {name: t.grad for name, t in live.items() if t.grad is not None} if now.accumulating else {}
    tensors.update({f"gradient.{name}": gradient for name, gradient in waiting.items()})
    tensors.update(averages(trainer))
    run = {key: value for key, value in checkpoint.items() if key in ("current_model_state", "averaging_state")}
    loops = {key: value for key, value in checkpoint["loops"].items() if key != "fit_loop"}
    loops["fit_loop"] = moment.arriving(now.counters, now.where, stop_at=-1)
    schedulers = [plain.state(entry, tensors, f"scheduler.{n}") for n, entry in enumerate(checkpoint["lr_schedulers"])]
    resume = {
        "format": 1,
        "optimizer": states[0] if single else None,
        **({} if single else {"optimizers": states}),
        "scheduler": schedulers[0] if len(schedulers) == 1 else None,
        "schedulers": schedulers,
        "scaler": plain.state(checkpoint[precision], tensors, "scaler") if precision in checkpoint else None,
        "rng": rng.encode(now.rng),
        "data": {
            "consumed": max((place.consumed for place in now.train), default=0) if now.where != "epoch" else 0,
            "loaders": [place.encode(tensors, f"data.{n}") for n, place in enumerate(now.train)],
            "evaluation": [place.encode(tensors, f"evaluation.{n}") for n, place in enumerate(now.evaluation)],
        },
        "callbacks": plain.state(checkpoint["callbacks"], tensors, "callbacks"),
        "progress": {
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "where": now.where,
            "evaluate": now.where == "validate",
        },
        "lightning": {
            "precision": precision,
            "run": plain.state(run, tensors, "lightning"),
            "loops": plain.state(
                {**loops, "fit_loop": moment.arriving(now.counters, now.where, stop_at=-1)}, tensors, "loops"
            ),
            "exact": now.counters,
            "metrics": metrics.capture(trainer, module, tensors),
            "gradients": list(waiting),
            "should_stop": bool(trainer.should_stop),
            "reloads": {name: getattr(loop, name) for loop, name in reloads(trainer)},
            "left_out": sorted(left),
        },
    }
    staging.tensors(files.STATE, "optimizer", named(tensors), files.METADATA)
    staging.data(files.RESUME, "progress", files.dump(resume))


def averages(trainer: Any) -> dict[str, torch.Tensor]:
    """Buffers of averaged models that are in no state_dict."""
    found = {}
    for number, callback in enumerate(one for one in trainer.callbacks if averaging(one)):
        model = callback._average_model
        kept = set(model.state_dict())
        found.update({f"average.{number}.{name}": t for name, t in model.named_buffers() if name not in kept})
    return found


def restore_averages(trainer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, live in averages(trainer).items():
        if name in tensors and tensors[name].shape == live.shape:
            live.copy_(tensors[name])


def averaging(callback: Any) -> bool:
    """Whether it holds an average of the model (WeightAveraging, StochasticWeightAveraging)."""
    return isinstance(getattr(callback, "_average_model", None), torch.nn.Module)


def reloads(trainer: Any) -> list[tuple[Any, str]]:
    """(loop, attribute): the epoch in which loaders were last made anew (reload_dataloaders_every_n_epochs)."""
    fit = trainer.fit_loop
    pairs = [(fit, "_last_train_dl_reload_epoch"), (fit.epoch_loop.val_loop, "_last_val_dl_reload_epoch")]
    return [(loop, name) for loop, name in pairs if isinstance(getattr(loop, name, None), int)]


def restore_optimizers(
    live_optimizers: list[Any],
    live: Mapping[str, torch.Tensor],
    saved: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> list[tuple[str, str]]:
    """Load by parameter name; lines for the report. Raises Incompatible before anything is changed."""
    entries = files.optimizers(saved)
    if len(entries) != len(live_optimizers):
        raise Incompatible(
            f"the checkpoint holds the states of {len(entries)} optimizers, configure_optimizers gives"
            f" {len(live_optimizers)}",
            hint="build the same optimizers as when it was saved",
        )
    lines = []
    for number, (one, entry) in enumerate(zip(live_optimizers, entries, strict=True)):
        prefix = f"{number}." if number else ""
        own = {name: t.clone() for name, t in tensors.items() if name.startswith(optimizer.beginnings(prefix))}
        optimizer.restore(one, live, entry, own)
        lines.append(("optimizer", f"{entry['class'].rpartition('.')[2]}, {len(entry['state'])} parameters"))
    return lines


def wake_averaging(
    trainer: Any, module: Any, saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, inside: bool
) -> None:
    """StochasticWeightAveraging makes its scheduler when an epoch begins, which a resume inside one leaves out.

    Making it changes the learning rate that was restored: that is put back. At an epoch's beginning the callback's
    own hook comes right after this, so it is called here, once.
    """
    for callback in trainer.callbacks:
        if type(callback).__name__ != "StochasticWeightAveraging" or callback._scheduler_state is None:
            continue
        if not callback._initialized and callback.swa_start <= trainer.current_epoch <= callback.swa_end:
            latest, callback._latest_update_epoch = callback._latest_update_epoch, trainer.current_epoch
            callback.on_train_epoch_start(trainer, module)
            callback._latest_update_epoch = latest
            for one, entry in zip(trainer.optimizers, files.optimizers(saved), strict=True):
                for group, values_ in zip(one.param_groups, entry["groups"], strict=True):
                    group.update(tree.decode(values_["values"], tensors))


def estimate(trainer: Any, module: Any, *, full: bool) -> int:
    """Bytes that a save will need: the module's tensors, the optimizers' states, and an average if there is one."""
    size = sum(t.numel() * t.element_size() for t in live_tensors(module).values())
    total = size * (2 if full and any(averaging(c) for c in trainer.callbacks) else 1)
    for one in trainer.optimizers if full else ():
        for entry in one.state.values():
            total += sum(v.numel() * v.element_size() for v in entry.values() if isinstance(v, torch.Tensor))
    return int(total)
