"""What a save finds out about a model, and the next one needn't as long as the model is built the same.

Of an adapter's save half the time went into the collecting of a state dict, three times, and into the question which of
its tensors are the adapter's; PEFT compiled the template of its README at every save.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch

from lastgood.state.digests import identity
from lastgood.state.members import Members, Walk
from lastgood.state.replaced import replaced
from lastgood.state.spots import Spots

T = TypeVar("T")
CHOICE = ("peft.peft_model", "get_peft_model_state_dict")
"""PEFT's function that says which tensors an adapter has, and their names."""


@dataclass(slots=True)
class Build:
    """How a model is built: its modules, the names of its tensors and where they are, the hooks of its state dict, the
    configuration of its adapters.

    Values may change: all that is remembered are the tensors themselves, never a copy of one. every: kept, so that no
    other tensor comes to lie where one of them was.
    """

    every: Members
    spots: Spots
    hooks: list[Any]
    adapters: dict[str, Any]

    @classmethod
    def of(cls, model: torch.nn.Module, every: Members) -> Build:
        adapters = _adapters(model)
        try:
            adapters = copy.deepcopy(adapters)  # PEFT changes some configurations in place
        except Exception:  # who knows what is in it: then nothing is remembered
            adapters = {"": object()}
        return cls(every, Spots.of(_tensors(every)), _hooks(model, every[2]), adapters)

    def still(self, model: torch.nn.Module, every: Members) -> bool:
        """Whether it is, as far as anything that chooses tensors by their names could notice."""
        if every is not self.every or not self.spots.still():
            return False
        if _hooks(model, every[2]) != self.hooks:
            return False
        try:
            return bool(_adapters(model) == self.adapters)
        except (RuntimeError, ValueError):  # a tensor in a configuration says neither yes nor no
            return False


@dataclass(slots=True)
class Known:
    """A run's memory of one model; empty before the first save."""

    walk: Walk = field(default_factory=Walk)
    _build: Build | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict)
    _last: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _own: frozenset[int] = frozenset()

    def look(self, model: torch.nn.Module, every: Members) -> None:
        """To be called first in each save: forget what was found out if the model is built otherwise now.

        every: what `walk` found, which is another object if it is another.
        """
        if self._build is None or not self._build.still(model, every):
            self._build, self._own = Build.of(model, every), frozenset(map(id, _tensors(every)))
            self._found.clear()
            self._last.clear()

    @property
    def build(self) -> object:
        """The same object as long as the model is built the same."""
        return self._build

    def once(self, what: Hashable, find: Callable[[], T]) -> T:
        """What `find` returns, asked the first time only. what: names it, and all that it rests on but the build."""
        if what not in self._found:
            self._found[what] = find()
        return self._found[what]  # type: ignore[no-any-return]

    def recall(self, what: Hashable) -> Any:
        """What `once` returned; None if it wasn't asked since the model was built otherwise."""
        return self._found.get(what)

    def unless(self, what: str, rests_on: Any, find: Callable[[], T]) -> T:
        """The same for what rests on something that differs from save to save, maybe: only the last one is kept."""
        found = self._last.get(what)
        if found is None or found[0] != rests_on:
            found = self._last[what] = rests_on, find()
        return found[1]

    def ordinary(self) -> bool:
        """Whether its state dict is its parameters and buffers, as they are: no module has a say of its own in it."""
        assert self._build is not None, "look() comes first"
        modules, (*_, overrides, hooks) = self._build.every[2], self._build.hooks
        return self.once(
            "ordinary", lambda: not overrides and not hooks and all(map(_ordinary, set(map(type, modules))))
        )

    def owns(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether all of these are tensors of the model as `look` found it, or what PEFT chose of them: none is a copy,
        and the next save has the very same objects.
        """
        return self._own.issuperset(map(id, tensors.values()))

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
            path, what = Path(output_dir) / "README.md", ("card", *base_names(model))
            if what in self._found:
                path.write_bytes(self._found[what])
            else:
                original(output_dir)
                self._found[what] = path.read_bytes()

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
                self._own |= set(map(id, chosen.values()))
            return dict(self._found[what])  # whoever asks may put clones in it

        return get_peft_model_state_dict

    def _all_its_own(self, chosen: Any) -> bool:
        """Whether these are tensors of the model, nothing that was computed from them."""
        if self._build is None or not isinstance(chosen, dict):
            return False
        own = {identity(tensor) for tensor in _tensors(self._build.every)}
        return all(isinstance(tensor, torch.Tensor) and identity(tensor) in own for tensor in chosen.values())


def base_names(model: Any) -> tuple[str, ...]:
    """What PEFT calls the model under an adapter, where nothing else says it."""
    base = getattr(model, "base_model", None)
    inner = (base, getattr(base, "model", None))
    return tuple(str(vars(one).get("name_or_path")) for one in inner if isinstance(one, torch.nn.Module))


def _tensors(every: Members) -> Iterator[torch.Tensor]:
    return chain(every[0].values(), every[1].values())


def _ordinary(kind: type[torch.nn.Module]) -> bool:
    return all(getattr(kind, name) is getattr(torch.nn.Module, name) for name in _METHODS)


def _hooks(model: torch.nn.Module, modules: tuple[torch.nn.Module, ...]) -> list[Any]:
    """What has a say in a state dict beside the tensors: torch numbers hooks, and no number comes twice."""
    own = list(map(vars, modules))
    try:
        hooks = list(chain.from_iterable(filter(None, chain.from_iterable(map(_HOOKS, own)))))
        loose = [(number, *sorted(names)) for number, names in enumerate(map(_LOOSE, own)) if names]
    except KeyError:  # kept elsewhere: unlike any, so that nothing is remembered
        return [object()] * 4
    return [vars(model).get("save_pretrained"), loose, _overrides(own), hooks]


def _overrides(own: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Methods that a module has for itself alone."""
    return [
        (number, *map(one.get, _METHODS))
        for number, one in enumerate(own)
        if "state_dict" in one or "_save_to_state_dict" in one or "get_extra_state" in one  # a loop would take longer
    ]


_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")
_HOOKS = itemgetter("_state_dict_hooks", "_state_dict_pre_hooks")
_LOOSE = itemgetter("_non_persistent_buffers_set")


def _adapters(model: torch.nn.Module) -> dict[str, Any]:
    """What their configurations are made of."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    unlike_any = object()  # of what can't be compared nobody knows whether it is the same
    return {name: getattr(config, "__dict__", unlike_any) for name, config in configs.items()}
