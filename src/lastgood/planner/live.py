"""A live model, and a Trainer around it -> what a plan starts from. By the names of their parts: torch isn't imported.

Shapes and dtypes are those of the tensors themselves, so mixed precision, frozen layers and adapters need no guess.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lastgood.errors import UsageError
from lastgood.format.tensors import CODES
from lastgood.planner.tensor import Model, Role, Tensor
from lastgood.schedule import absolute_steps, total_steps
from lastgood.store.quota import room

LIVE = "the live model"
ENTRY = 100
"""Bytes of tokenizer.json for each entry of a vocabulary, merges included: about, for it isn't written to find out."""
WHOLE_LAYERS = ("embed_tokens", "lm_head")
"""Modules that peft saves whole, with both embeddings, where an adapter goes onto one of them (peft 0.21)."""


def is_module(what: object) -> bool:
    """Whether it has parameters as a torch module has them."""
    return all(callable(getattr(what, name, None)) for name in ("named_parameters", "named_buffers", "named_modules"))


def is_trainer(what: object) -> bool:
    """Whether it is a Trainer as transformers has them: a module and its training arguments."""
    return hasattr(getattr(what, "args", None), "save_strategy") and is_module(getattr(what, "model", None))


def model_of_module(module: Any, *, beside: int = 0) -> Model:
    """The tensors of a module as a checkpoint holds them. beside: bytes of a tokenizer that is saved as well.

    Raises UsageError where shapes or sizes can't be told: lazy modules, meta tensors, whole quantised models.
    """
    adapters = tuple(getattr(module, "peft_config", None) or ())
    if not adapters and getattr(module, "is_quantized", False):
        raise UsageError("the files of a quantised model can't be told from its tensors")
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_json_string") and not adapters:
        beside += len(config.to_json_string()) + 200  # with generation_config.json
    tensors = tuple(_parameters(module, adapters))
    if not tensors:
        raise UsageError(f"{type(module).__name__} has no parameters")
    return Model(
        name=str(getattr(config, "name_or_path", "") or type(module).__name__),
        source=LIVE, tensors=tensors, beside=beside,
        buffers=tuple(_buffers(module, saved=not adapters)), adapter=bool(adapters),
    )  # fmt: skip


def _parameters(module: Any, adapters: tuple[str, ...]) -> Iterator[Tensor]:
    modules = dict(module.named_modules())
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    whole = any(name in (getattr(c, "target_modules", None) or ()) for c in _configs(module) for name in WHOLE_LAYERS)
    named = re.compile(rf"\.({'|'.join(map(re.escape, adapters))})(?=\.|$)") if adapters else None
    for name, parameter in module.named_parameters():
        code = _code(name, parameter)
        owner, _, leaf = name.rpartition(".")
        kinds = {kind.__name__ for kind in type(modules[owner]).__mro__}
        role: Role = "head" if modules[owner] is head else "embedding" if "Embedding" in kinds else ""
        role = role if leaf == "weight" else ""
        stored: str | None = None
        if named is not None:
            saved = parameter.requires_grad or named.search(name) is not None or (whole and role != "")
            stored = named.sub("", name) if saved else ""
        yield Tensor(
            _clean(name), tuple(parameter.shape), leaf == "weight" and bool(kinds & {"Linear", "Conv1D"}), role,
            code, bool(parameter.requires_grad), stored,
        )  # fmt: skip


def _buffers(module: Any, *, saved: bool) -> Iterator[Tensor]:
    passing = {
        f"{owner}.{name}" if owner else name
        for owner, inner in module.named_modules()
        for name in getattr(inner, "_non_persistent_buffers_set", ())
    }
    for name, buffer in module.named_buffers():
        stored = None if saved and name not in passing else ""
        yield Tensor(_clean(name), tuple(buffer.shape), False, "", _code(name, buffer), False, stored)


def _configs(module: Any) -> tuple[Any, ...]:
    found = getattr(module, "peft_config", None)
    return tuple(found.values()) if isinstance(found, Mapping) else ()


def _code(name: str, tensor: Any) -> str:
    """The dtype's code. Raises UsageError for a tensor that has no shape or data yet, or can't be stored."""
    if type(tensor).__name__.startswith("Uninitialized") or getattr(tensor, "is_meta", False):
        raise UsageError(f"{name} has no data yet (a lazy module, or the meta device)")
    code = CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise UsageError(f"{name} is of {tensor.dtype}, which no safetensors file holds")
    return code


def _clean(name: str) -> str:
    return name.replace("_orig_mod.", "")  # what torch.compile puts in front


# ---- a Trainer ---------------------------------------------------------------------------


def model_of_trainer(trainer: Any) -> Model:
    """Its model, with what it writes beside the weights. Raises UsageError as `model_of_module` does."""
    processing: Any = getattr(trainer, "processing_class", None)
    processing = getattr(processing, "tokenizer", processing)
    beside = ENTRY * len(processing) + 1000 if hasattr(processing, "__len__") else 0
    return model_of_module(trainer.model, beside=beside)


def optimizer_of(trainer: Any) -> str:
    """A name for `planner.optim`: of the optimizer that is there, else the one that the arguments ask for.

    Raises UsageError for one whose state isn't known.
    """
    args, inner = trainer.args, getattr(trainer, "optimizer", None)
    if inner is None:
        momentum = "momentum=" in str(getattr(args, "optim_args", None))
        return str(getattr(args.optim, "value", args.optim)) + (", momentum" if momentum else "")
    while type(inner).__module__.startswith("accelerate.") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    origin, kind = type(inner).__module__, type(inner).__name__.lower()
    groups = inner.param_groups
    if origin.startswith("bitsandbytes."):
        kind = re.sub(r"^paged|(8|32)bit$", "", kind).replace("adamw", "adam").replace("adam", "adamw")
        return f"{kind}{'_bnb' if kind == 'rmsprop' else ''}_{inner.args.optim_bits}bit"
    more = any(group.get(name) for group in groups for name in ("amsgrad", "centered", "beta1"))
    heavy = any(group.get("momentum") for group in groups)
    known = {"torch.optim": ("adam", "adamw", "sgd", "adagrad", "rmsprop"), "transformers.optimization": ("adafactor",)}
    fits = any(origin.startswith(home) and kind in names for home, names in known.items())
    if not fits or more or (heavy and kind != "sgd"):
        raise UsageError(f"the state of {origin}.{type(inner).__name__} isn't known")
    return "sgd_momentum" if kind == "sgd" and heavy else kind


def nearest(path: Path) -> Path:
    """The directory itself, or the one above it that is there: where its bytes will lie."""
    path = Path(os.path.abspath(path))
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), path)


def steps_per_epoch(trainer: Any) -> int | None:
    """Optimizer steps of an epoch; None for data without a length."""
    try:
        samples = len(trainer.train_dataset)
    except TypeError:
        return None
    args = trainer.args
    per_batch, accumulated = int(args.train_batch_size), int(args.gradient_accumulation_steps)
    batches = samples // per_batch if args.dataloader_drop_last else -(-samples // per_batch)
    return max(1, -(-batches // accumulated))


def evaluations(args: Any, max_steps: int, per_epoch: int | None) -> int | None:
    """Steps between evaluations; None without any."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "epoch":
        return per_epoch
    every: float | None = args.eval_steps if strategy == "steps" else None
    return absolute_steps(every, max_steps) if every else None


def options(trainer: Any) -> dict[str, Any]:
    """A Trainer's settings as `lastgood.plan` has them: schedule, policy, optimizer."""
    args, per_epoch = trainer.args, steps_per_epoch(trainer)
    found: dict[str, Any] = {
        "optim": optimizer_of(trainer),
        "save_strategy": str(getattr(args.save_strategy, "value", args.save_strategy)),
        "save_steps": args.save_steps,
        "steps_per_epoch": per_epoch,
    }
    if args.output_dir and (free := room(nearest(Path(args.output_dir)))) > 0:
        found["disk"] = free
    length = total_steps(args.max_steps, args.num_train_epochs, per_epoch)
    if length is not None:
        found["max_steps"] = length
        every = evaluations(args, length, per_epoch)
        found |= {"metrics": "none"} if every is None else {"eval_steps": every}
    session = getattr(trainer, "lastgood", None)  # a managed one has its own policy
    keep = session.options.keep if session is not None else None
    if keep is not None:
        return {**found, "keep": keep}
    limit, monitor = args.save_total_limit, args.metric_for_best_model
    found |= {"save_total_limit": limit} if limit is not None and limit > 0 else {}
    if monitor is not None:
        found["monitor"] = monitor if monitor.startswith("eval_") else f"eval_{monitor}"
        if args.greater_is_better is not None:
            found["mode"] = "max" if args.greater_is_better else "min"
    return found
