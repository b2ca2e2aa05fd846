"""Content -> a checkpoint that another tool goes on from.

Every writer makes its target whole or not at all and returns, in words, what the target has no place for.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lastgood.convert import weights
from lastgood.convert.content import PENDING, Content, by_name, legacy_numpy
from lastgood.errors import NotSupported, UsageError
from lastgood.format import tensors as safetensors
from lastgood.layouts.progress import STATE
from lastgood.state.tensors import named
from lastgood.store import local
from lastgood.store.appear import appearing

_FORM = {
    PENDING, "left_out", "accelerator_step", "dcp_keys", "state_dict_metadata", "hparams_name",
    "pytorch-lightning_version",
}  # fmt: skip
"""Keys of `rest` that say how a tool laid things out: nobody misses them elsewhere, or they are told apart."""


def to_trainer(content: Content, target: Path) -> list[str]:
    """A directory that a stock transformers Trainer resumes from.

    Raises UsageError if `target` exists, NotSupported for several optimizers or models.
    """
    if len(content.optimizers) > 1 or len(content.schedulers) > 1 or "models" in content.rest:
        raise NotSupported("a Trainer has one model, one optimizer and one scheduler, the checkpoint has several")
    with appearing(target) as folder:
        _weights(content, folder)
        _copy(content, folder)
        for state, name in zip(content.optimizers, ("optimizer.pt",), strict=False):
            torch.save(state, folder / name)
        for state, name in zip(content.schedulers, ("scheduler.pt",), strict=False):
            torch.save(state, folder / name)
        if content.scaler is not None:
            torch.save(content.scaler, folder / "scaler.pt")
        if content.rng is not None:
            others = content.rest.get("rng_ranks", {})
            for rank, state in {"0": content.rng, **others}.items() if others else ():
                torch.save(state, folder / f"rng_state_{rank}.pth")
            # One process keeps the state of its own device alone.
            single = {kind: value[0] if isinstance(value, list) else value for kind, value in content.rng.items()}
            torch.save(single, folder / "rng_state.pth")
        if STATE not in content.files:
            state = {"global_step": max(0, content.step), "epoch": content.epoch or 0.0, "log_history": []}
            local.write(folder / STATE, [f"{json.dumps(state, indent=2)}\n".encode()], sync=False)
    # Of ours these are in trainer_state.json, or follow from it.
    notes = _left(content, {"rng_ranks"} | ({"progress", "data", "callbacks"} if not content.layout else set()))
    notes += [f"no {what}: it starts afresh" for what, has in _resumed(content) if not has]
    if PENDING in content.rest:
        notes.append("the evaluation that was still due at this step: the Trainer doesn't make up for it")
    return notes


def _resumed(content: Content) -> tuple[tuple[str, bool], ...]:
    return (
        ("optimizer", bool(content.optimizers)),
        ("scheduler", bool(content.schedulers)),
        ("random state", content.rng is not None),
    )


def to_accelerate(content: Content, target: Path) -> list[str]:
    """A directory for Accelerator.load_state. Raises UsageError if `target` exists."""
    with appearing(target) as folder:
        _weights(content, folder)
        for number, model in enumerate(content.rest.get("models", []), 1):
            _safetensors(folder / f"model_{number}.safetensors", model)
        for stem, states in (
            ("optimizer", content.optimizers),
            ("scheduler", content.schedulers),
            ("sampler", content.rest.get("samplers", [])),
            ("dl_state_dict", content.rest.get("dataloaders", [])),
        ):
            for number, state in enumerate(states):
                torch.save(state, folder / (f"{stem}_{number}.bin" if number else f"{stem}.bin"))
        if content.scaler is not None:
            torch.save(content.scaler, folder / "scaler.pt")
        ranks = {"0": content.rng, **content.rest.get("rng_ranks", {})} if content.rng is not None else {}
        for rank, state in ranks.items():
            torch.save(_for_accelerate(state, content), folder / f"random_states_{rank}.pkl")
        for number, value in enumerate(content.custom):
            torch.save(value, folder / f"custom_checkpoint_{number}.pkl")
        _copy(content, folder)
    return _left(content, {"models", "samplers", "dataloaders", "rng_ranks"})


def _for_accelerate(state: dict[str, Any], content: Content) -> dict[str, Any]:
    words = {"python": "random_state", "numpy": "numpy_random_seed", "cpu": "torch_manual_seed", "xla": "xm_seed"}
    named_states = {words.get(kind, f"torch_{kind}_manual_seed"): value for kind, value in state.items()}
    return {"step": content.rest.get("accelerator_step", 0), **named_states}


def to_lightning(content: Content, target: Path, prefix: str = "") -> list[str]:
    """A .ckpt file. prefix: put before every name of the model, as the LightningModule's attribute is called.

    From Lightning it holds what the original held; from elsewhere weights, optimizers, schedulers and the step, from
    which Trainer.fit goes on at the beginning of an epoch. Raises UsageError if `target` exists.
    """
    native = content.layout == "lightning"
    state: dict[str, Any] = OrderedDict((prefix + name, tensor) for name, tensor in content.model.items())
    rest = dict(content.rest) if native else {}
    state.update(rest.pop("state_dict_other", {}))
    if names := rest.pop("state_dict_metadata", None):
        # load_state_dict goes by the version of each module that is noted there.
        state._metadata = OrderedDict(names)  # type: ignore[attr-defined]
    checkpoint: dict[str, Any] = {
        "epoch": content.epoch if native else int(content.epoch or 0),
        "global_step": content.step,
        "pytorch-lightning_version": _version(),
        "state_dict": state,
        **({} if native else {"loops": _loops(content)}),
        **rest,
    }
    if not native or content.optimizers or content.schedulers:
        checkpoint |= {"optimizer_states": content.optimizers, "lr_schedulers": content.schedulers}
    if content.scaler is not None:
        checkpoint["MixedPrecision"] = content.scaler
    with appearing(target, directory=False) as file:
        torch.save(checkpoint, file)
    notes = [] if native else _left(content, set())
    return notes + ([] if native or content.rng is None else ["random states: Lightning keeps none"])


def _loops(content: Content) -> dict[str, Any]:
    """What Lightning's global_step is counted by; it keeps what isn't named at its beginning."""
    step = max(0, content.step)
    count = {"ready": step, "completed": step}
    full = {**count, "started": step}
    progress = {
        "optimizer": {
            "step": {"total": dict(count), "current": dict(count)},
            "zero_grad": {"total": dict(full), "current": dict(full)},
        }
    }
    return {
        "fit_loop": {
            "epoch_loop.state_dict": {"_batches_that_stepped": step},
            "epoch_loop.automatic_optimization.optim_progress": progress,
        }
    }


def _version() -> str:
    for package in ("lightning", "pytorch-lightning"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "2.6.0"  # the layout that `_loops` is in


def to_dcp(content: Content, target: Path) -> list[str]:
    """A directory for torch.distributed.checkpoint.load: model, optimizer (by name where names are known), step ...

    Raises UsageError if `target` exists.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    rest = dict(content.rest) if content.layout == "dcp" else {}
    keys = rest.pop("dcp_keys", {})
    state: dict[str, Any] = {"model": content.model} if keys.get("model") is None else dict(content.model)
    if len(content.optimizers) == 1:
        names = content.parameter_names
        optimizer = by_name(content.optimizers[0], names) if names else content.optimizers[0]
        state[keys.get("optimizer", "optimizer")] = optimizer
    elif content.optimizers:
        raise NotSupported("several optimizers have no common form in a distributed checkpoint")
    # torch takes dicts and lists apart, and empty ones get lost; a tuple is stored as it is.
    more = {
        "step": content.step if content.step >= 0 else None,
        "epoch": content.epoch,
        "schedulers": tuple(content.schedulers) or None,
        "scaler": None if content.scaler is None else (content.scaler,),
        "custom": tuple(content.custom) or None,
        "rng": None if content.rng is None else {**content.rng, "numpy": legacy_numpy(content.rng["numpy"])},
    }
    state |= {key: value for key, value in more.items() if value is not None and key not in state} | rest
    if "under" in keys:
        state = {keys["under"]: state}
    with appearing(target) as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        save(state, checkpoint_id=folder, no_dist=True)
    notes = [] if content.layout == "dcp" else _left(content, set())
    return notes + ([f"files beside the weights: {', '.join(sorted(content.files))}"] if content.files else [])


# ---- common ------------------------------------------------------------------------------


def _weights(content: Content, folder: Path) -> None:
    for name, tensors in weights.files(content).items():
        local.make_parents(folder / name, folder)
        _safetensors(folder / name, tensors)


def _safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    size, chunks = safetensors.encode(named(tensors), {"format": "pt"})
    local.write(path, chunks, size=size, sync=False)


def _copy(content: Content, folder: Path) -> None:
    for name, source in content.files.items():
        if name in content.texts:
            local.write(folder / name, [content.texts[name]], sync=False)
            continue
        if local.size(source) is None:
            raise UsageError(f"{source} is not there any more")
        local.make_parents(folder / name, folder)
        local.clone(source, folder / name)


def _left(content: Content, known: set[str]) -> list[str]:
    """What no writer but that of the same tool knows a place for."""
    notes = [f"{key} of the source" for key in sorted(content.rest.keys() - known - _FORM)]
    if left := content.rest.get("left_out"):
        notes.append(f"pickles that were not read: {', '.join(left)}")
    return notes
