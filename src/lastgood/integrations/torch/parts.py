"""Parts that aren't models: optimizers, whatever has a state dict, generators, plain values, tokenizers."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lastgood.errors import Incompatible, NotSupported, UsageError, wrong_type
from lastgood.integrations.torch.exchange import Part, Reading, Ready, Writing
from lastgood.integrations.torch.loader import Data, followable
from lastgood.integrations.torch.module import Model
from lastgood.integrations.torch.stamp import Stamp, leaves
from lastgood.state import optimizer as optimizers
from lastgood.state import tree
from lastgood.state.capturing import Capturing
from lastgood.state.tokenizers import Tokenizers

LONG = 0.02
"""Seconds of this thread that a look at a part may take at every step."""

RESERVED = frozenset({"base_model", "data", "extra", "format", "group", "lastgood", "progress"}) | frozenset(
    {"rest", "resume", "rng", "state", "tensors"}
)
"""Names that mean something else in a checkpoint."""


def part(name: str, thing: Any) -> Part:
    """What `thing` is to a checkpoint. Raises UsageError for a name that can't be one, or a thing that has no state."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) or name in RESERVED:
        raise UsageError(
            f"{name!r} can't name a part",
            hint=f"use a word of letters, digits and _ such as 'ema'; taken are {', '.join(sorted(RESERVED))}",
        )
    if isinstance(thing, torch.nn.Module):
        return Model(name, thing)
    if isinstance(thing, torch.optim.Optimizer):
        return Optimizer(name, thing)
    if followable(thing):
        return Data.of(name, thing)
    if hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
        return Stateful(name, thing)
    if isinstance(thing, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
        return Generator(name, thing)
    if hasattr(thing, "save_pretrained"):
        return Files(name, thing)
    if isinstance(thing, (dict, list, torch.Tensor, np.ndarray)):
        return Value(name, thing)
    raise wrong_type(
        name,
        thing,
        "a model, an optimizer, a data loader, anything with state_dict() and load_state_dict(), a random generator,"
        " a tokenizer, or a dict, list, tensor or array that is changed in place",
    )


@dataclass(slots=True)
class Optimizer:
    """By parameter name, so that a changed set of parameters is named and not guessed."""

    name: str
    optimizer: torch.optim.Optimizer
    _steps: int = 0
    _capturing: Capturing = field(default_factory=Capturing)

    def __post_init__(self) -> None:
        # Before the step, not after it: one that fails half-way has changed something.
        optimizers.plain(self.optimizer).register_step_pre_hook(self._begins)

    def _begins(self, *_: Any) -> None:
        self._steps += 1

    def stamp(self) -> Stamp:
        groups = optimizers.plain(self.optimizer).param_groups
        rates = (value for group in groups for value in group.values() if isinstance(value, (int, float)))
        return (self._steps, *rates)

    @property
    def _prefix(self) -> str:
        return "" if self.name == "optimizer" else f"{self.name}."

    def write(self, out: Writing) -> None:
        if out.full:
            values, tensors = self._capturing.capture(self.optimizer, out.live, self._prefix)
            lost = [name for group in values["groups"] for name in group["names"] if name not in out.live]
            if lost:
                raise NotSupported(
                    f"{self.name} trains {len(lost)} parameters that belong to none of the parts any more",
                    hint="a parameter that is replaced or added goes into the model and, by a new optimizer or"
                    " add_param_group, into the optimizer",
                )
            out.put(self.name, values)
            out.tensors |= tensors

    def prepare(self, source: Reading) -> Ready | None:
        saved = source.get(self.name)
        if saved is None:
            return None
        if not source.match.exact:
            models = [name for name in source.saved.digests.get("modules", {}) if name != "model"]
            saved = optimizers.renamed(self.optimizer, source.live, saved, source.match, models)
        optimizers.fits(self.optimizer, source.live, saved)
        tensors = source.saved.given(optimizers.beginnings(self._prefix))

        def ready() -> str:
            optimizers.restore(self.optimizer, source.live, saved, tensors)
            return f"{type(optimizers.plain(self.optimizer)).__name__}, {len(saved['state'])} parameters"

        return ready

    def estimate(self) -> int:
        return self._capturing.bytes(self.optimizer)


@dataclass(slots=True)
class Stateful:
    """Anything with state_dict() and load_state_dict(): a schedule, a scaler, an average of weights."""

    name: str
    thing: Any
    _costly: bool = False

    def write(self, out: Writing) -> None:
        if out.full:
            out.put(self.name, tree.encode(self.thing.state_dict(), out.tensors, self.name))

    def prepare(self, source: Reading) -> Ready | None:
        saved = source.get(self.name)
        if saved is None:
            return None
        value = tree.decode(saved, _copies(source, self.name))

        def ready() -> str:
            self.thing.load_state_dict(value)
            return type(self.thing).__name__

        return ready

    def estimate(self) -> int:
        return 0

    def stamp(self) -> Stamp | None:
        if self._costly:
            return None
        started = time.thread_time()
        try:
            return leaves(self.thing.state_dict())
        except Exception:  # the user's own code: a save will tell of it, no step has to fail for it
            return None
        finally:
            self._costly = time.thread_time() - started > LONG  # it copies: that is for saves, not for every step


@dataclass(slots=True)
class Generator:
    """A random generator of the user's own, besides the global ones."""

    name: str
    generator: Any

    def write(self, out: Writing) -> None:
        if out.full:
            out.put(self.name, {"kind": self._kind, "state": tree.encode(self.state(), out.tensors, self.name)})

    @property
    def _kind(self) -> str:
        return f"{type(self.generator).__module__.partition('.')[0]}.{type(self.generator).__name__}"

    def state(self) -> Any:
        """As its library hands it out."""
        generator = self.generator
        if isinstance(generator, torch.Generator):
            return generator.get_state()
        if isinstance(generator, np.random.Generator):
            return generator.bit_generator.state
        if isinstance(generator, np.random.RandomState):
            return generator.get_state(legacy=False)
        return generator.getstate()

    def prepare(self, source: Reading) -> Ready | None:
        saved = source.get(self.name)
        if saved is None:
            return None
        if saved.get("kind") != self._kind:
            raise Incompatible(f"{self.name} was a {saved.get('kind')} when it was saved, it is a {self._kind} here")
        state = tree.decode(saved["state"], _copies(source, self.name))

        def ready() -> str:
            if isinstance(self.generator, torch.Generator):
                self.generator.set_state(state)
            elif isinstance(self.generator, np.random.Generator):
                self.generator.bit_generator.state = state
            elif isinstance(self.generator, np.random.RandomState):
                self.generator.set_state(state)
            else:
                self.generator.setstate(state)
            return self._kind

        return ready

    def estimate(self) -> int:
        return 0

    def stamp(self) -> Stamp | None:
        return leaves(self.state())


@dataclass(slots=True)
class Value:
    """A dict, list, tensor or array; it is changed in place, so that whoever holds it sees what was restored."""

    name: str
    value: Any

    def write(self, out: Writing) -> None:
        if out.full:
            out.put(self.name, tree.encode(self.value, out.tensors, self.name))

    def prepare(self, source: Reading) -> Ready | None:
        saved = source.get(self.name)
        if saved is None:
            return None
        value = tree.decode(saved, _copies(source, self.name))
        shape, here = getattr(value, "shape", None), getattr(self.value, "shape", None)
        if type(value) is not type(self.value) or shape != here:
            raise Incompatible(
                f"{self.name} was a {_what(value)} when it was saved, it is a {_what(self.value)} here",
                hint=f"hand over the same kind of object, or allow_missing=[{self.name!r}]",
            )

        if isinstance(self.value, np.ndarray) and not self.value.flags.writeable:
            raise Incompatible(f"{self.name} is read-only here", hint="hand over a copy: array.copy()")

        def ready() -> str:
            if isinstance(self.value, torch.Tensor):
                with torch.no_grad():
                    self.value.copy_(value)
            elif isinstance(self.value, dict):
                self.value.clear()
                self.value.update(value)
            elif isinstance(self.value, list):
                self.value[:] = value
            else:
                self.value[...] = value
            return _what(value)

        return ready

    def estimate(self) -> int:
        value = self.value
        return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else getattr(value, "nbytes", 0)

    def stamp(self) -> Stamp | None:
        return leaves(self.value)


@dataclass(slots=True)
class Files:
    """A tokenizer or processor: its files go along with the weights, so that a checkpoint can be loaded whole."""

    name: str
    thing: Any
    _tokenizers: Tokenizers = field(default_factory=Tokenizers)

    def write(self, out: Writing) -> None:
        with self._tokenizers.reused():
            self.thing.save_pretrained(out.staging.path)
        out.staging.adopt("model")

    def prepare(self, source: Reading) -> Ready | None:
        return lambda: f"{type(self.thing).__name__} is this run's own"

    def estimate(self) -> int:
        return 0

    def stamp(self) -> Stamp:
        return ()


def _copies(source: Reading, name: str) -> dict[str, torch.Tensor]:
    """Tensors of this part, for whoever keeps what it is given."""
    found = source.saved.tensors
    return {key: tensor.clone() for key, tensor in found.items() if key == name or key.startswith(f"{name}.")}


def _what(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"


def accelerated(parts: Sequence[Part]) -> bool:
    """Whether any of the models lies on something else than the CPU."""
    return any(
        tensor.device.type not in ("cpu", "meta")
        for item in parts
        if isinstance(item, Model)
        for tensor in item.live.values()
    )


def trains_what_is_saved(parts: Sequence[Part]) -> None:
    """Raise UsageError for an optimizer whose parameters no part holds: they would come back as they were built."""
    held = {id(tensor) for item in parts if isinstance(item, Model) for tensor in item.live.values()}
    held |= {id(item.value) for item in parts if isinstance(item, Value)}
    for item in parts:
        if isinstance(item, Optimizer):
            lost = sum(id(p) not in held for group in item.optimizer.param_groups for p in group["params"])
            if lost:
                raise UsageError(
                    f"{item.name} trains {lost} parameters that belong to none of the parts, so they wouldn't be saved",
                    hint="hand over every model that is trained: CheckpointManager(..., model=model, head=head)",
                )


def one_process() -> None:
    """Raise NotSupported for several."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise NotSupported(
            f"CheckpointManager can't save {distributed.get_world_size()} processes yet",
            hint="train in one process; torch.distributed.checkpoint saves several, `lastgood import` reads it",
        )
