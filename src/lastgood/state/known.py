"""What a save finds out about a model, and the next one needn't as long as the model is built the same.

Of an adapter's save half the time went into the collecting of a state dict, three times, and into the question which of
its tensors are the adapter's; PEFT compiled the template of its README at every save.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lastgood.state.digests import identity
from lastgood.state.members import Members
from lastgood.state.replaced import replaced

T = TypeVar("T")
CHOICE = ("peft.peft_model", "get_peft_model_state_dict")
"""PEFT's function that says which tensors an adapter has, and their names."""


@dataclass(slots=True)
class Build:
    """How a model is built: its modules, the names of its tensors and where they are, the hooks of its state dict, the
    configuration of its adapters.

    Values may change: all that is remembered are the tensors themselves, never a copy of one. tensors: kept, so that
    no other one comes to lie where one of them was.
    """

    tensors: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    places: list[Any]
    modules: tuple[torch.nn.Module, ...]
    hooks: list[Any]
    adapters: dict[str, Any]

    @classmethod
    def of(cls, model: torch.nn.Module, every: Members) -> Build:
        names, tensors, modules = _flat(every)
        return cls(tensors, names, _places(tensors), modules, _hooks(model, modules), _adapters(model))

    def still(self, model: torch.nn.Module, every: Members) -> bool:
        """Whether it is, as far as anything that chooses tensors by their names could notice."""
        names, tensors, modules = _flat(every)
        if names != self.names or _places(tensors) != self.places or modules != self.modules:
            return False
        if _hooks(model, modules) != self.hooks:
            return False
        try:
            return bool(_adapters(model) == self.adapters)
        except (RuntimeError, ValueError):  # a tensor in a configuration says neither yes nor no
            return False


@dataclass(slots=True)
class Known:
    """A run's memory of one model; empty before the first save."""

    _card: bytes | None = None
    _build: Build | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict)

    def look(self, model: torch.nn.Module, every: Members) -> None:
        """To be called first in each save: forget what was found out if the model is built otherwise now."""
        if self._build is None or not self._build.still(model, every):
            self._build = Build.of(model, every)
            self._found.clear()

    def once(self, what: Hashable, find: Callable[[], T]) -> T:
        """What `find` returns, asked the first time only. what: names it, and all that it rests on but the build."""
        if what not in self._found:
            self._found[what] = find()
        return self._found[what]  # type: ignore[no-any-return]

    @contextmanager
    def reused(self, model: Any) -> Iterator[None]:
        """While active, a save_pretrained of PEFT's writes the README, and the tensors, that it wrote before."""
        with self._same_card(model), replaced([(*CHOICE, lambda original: self._choosing(model, original))]):
            yield

    @contextmanager
    def _same_card(self, model: Any) -> Iterator[None]:
        original = getattr(model, "create_or_update_model_card", None)
        if original is None:
            yield
            return

        def create_or_update_model_card(output_dir: str) -> None:
            path = Path(output_dir) / "README.md"
            if self._card is None:
                original(output_dir)
                self._card = path.read_bytes()
            else:
                path.write_bytes(self._card)

        model.__dict__["create_or_update_model_card"] = create_or_update_model_card
        try:
            yield
        finally:
            del model.__dict__["create_or_update_model_card"]

    def _choosing(self, model: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_peft_model_state_dict(*args: Any, **kwargs: Any) -> Any:
            options = {key: value for key, value in kwargs.items() if value is not None}
            if len(args) != 1 or args[0] is not model or not all(isinstance(v, Hashable) for v in options.values()):
                return original(*args, **kwargs)
            what = (original, *sorted(options.items()))
            if what not in self._found:
                chosen = original(*args, **kwargs)
                if not self._all_its_own(chosen):  # made for the occasion: other ones the next time
                    return chosen
                self._found[what] = chosen
            return dict(self._found[what])  # whoever asks may put clones in it

        return get_peft_model_state_dict

    def _all_its_own(self, chosen: Any) -> bool:
        """Whether these are tensors of the model, nothing that was computed from them."""
        if self._build is None or not isinstance(chosen, dict):
            return False
        own = {identity(tensor) for tensor in self._build.tensors}
        return all(isinstance(tensor, torch.Tensor) and identity(tensor) in own for tensor in chosen.values())


def _flat(every: Members) -> tuple[tuple[str, ...], tuple[torch.Tensor, ...], tuple[torch.nn.Module, ...]]:
    parameters, buffers, modules = every
    return (*parameters, *buffers), (*parameters.values(), *buffers.values()), modules


def _places(tensors: tuple[torch.Tensor, ...]) -> list[Any]:
    """Where their memory is, and how it is read: `tensor.data = other` changes that and nothing else, and so two may
    become one."""
    return [
        (one.data_ptr(), one.dtype, one.shape, one.stride()) if one.layout is torch.strided else id(one)
        for one in tensors
    ]


def _hooks(model: torch.nn.Module, modules: tuple[torch.nn.Module, ...]) -> list[Any]:
    """What has a say in a state dict beside the tensors: torch numbers hooks, and no number comes twice."""
    found: list[Any] = [model.__dict__.get("state_dict"), model.__dict__.get("save_pretrained")]
    for module in modules:
        found += module._state_dict_hooks
        found += module._state_dict_pre_hooks
        found += sorted(module._non_persistent_buffers_set)
    return found


def _adapters(model: torch.nn.Module) -> dict[str, Any]:
    """Their configurations, as values of their own: PEFT changes some in place."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    unlike_any = object()  # of what can't be compared nobody knows whether it is the same
    return {name: config.to_dict() if hasattr(config, "to_dict") else unlike_any for name, config in configs.items()}
