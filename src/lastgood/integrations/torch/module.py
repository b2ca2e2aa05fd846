"""The part that is a model: its weights in a file that other tools open, each live tensor proven by its digest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch

from lastgood.errors import NotSupported, UsageError
from lastgood.integrations.torch.exchange import Reading, Ready, Writing
from lastgood.integrations.torch.stamp import Stamp
from lastgood.repo.staging import Staging, written_by_libraries
from lastgood.state import adapter, tree, weights
from lastgood.state.digests import identity
from lastgood.state.fingerprint import live_tensors
from lastgood.state.match import Match
from lastgood.state.members import Members
from lastgood.state.meta import unfilled
from lastgood.state.optimizer import clean
from lastgood.state.partial import by_name
from lastgood.state.tensors import named
from lastgood.state.weights import Coverage, TensorFile

EXTRA_STATE = "_extra_state"
"""How torch ends the name under which a module's own get_extra_state() is in its state dict."""


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = module.module
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


@dataclass(slots=True)
class Model:
    """Files: `<name>.safetensors`, or what the model's save_pretrained writes (in `<name>/` unless it is "model")."""

    name: str
    module: torch.nn.Module
    _coverage: Coverage = field(init=False)
    _tracked: tuple[torch.Tensor, ...] = ()
    _sized: tuple[tuple[torch.Tensor, ...], int] = ((), 0)  # those whose bytes were summed up, and the sum
    _every: Members = field(default_factory=lambda: ({}, {}, ()))  # as it was looked at last
    _live: dict[str, torch.Tensor] = field(default_factory=dict)  # of those

    def __post_init__(self) -> None:
        self.module = unwrapped(self.module)
        lazy = [name for name, tensor in self.module.named_parameters() if torch.nn.parameter.is_lazy(tensor)]
        if lazy:
            raise UsageError(
                f"{self.name}: {lazy[0]} has no shape yet (a lazy module)",
                hint="run one batch through the model before it is handed to CheckpointManager",
            )
        self._coverage = Coverage.begin(self.module)

    def _look(self) -> None:
        self._every = self._coverage.members(self.module)
        self._live = live_tensors(self.module, self._every)

    @property
    def live(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer, under the name that optimizers' states use."""
        self._look()
        return self.seen

    @property
    def seen(self) -> dict[str, torch.Tensor]:
        """The same of a module in which nothing was replaced since `live`, or `replaced`, was asked last."""
        prefix = "" if self.name == "model" else f"{self.name}."
        found = {**self._live, **unfilled(self.module, self._every)}
        return {prefix + name: tensor for name, tensor in found.items()} if prefix else found

    @property
    def empty(self) -> dict[str, torch.Tensor]:
        """Those without memory: the model was built on the meta device, and nothing was restored yet."""
        return unfilled(self.module)

    def estimate(self) -> int:
        live = self._tracked or tuple(live_tensors(self.module).values())
        if hasattr(self.module, "peft_config"):
            return sum(tensor.nbytes for tensor in live if tensor.requires_grad)
        if self._sized[0] is not live:
            self._sized = live, sum(tensor.nbytes for tensor in live)
        return self._sized[1]

    def stamp(self) -> Stamp:
        tracked = self._tracked
        if not tracked:  # to walk through a large model at every step would take longer than the rest of it
            tracked = self._tracked = tuple(live_tensors(self.module).values())
        return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tracked)

    def replaced(self) -> bool:
        """Whether it has other tensors now than those that the stamp is about."""
        self._look()
        return not self._tracks(self._live)

    def _tracks(self, live: Mapping[str, torch.Tensor]) -> bool:
        return len(live) == len(self._tracked) and all(map(is_, live.values(), self._tracked))

    # ---- writing -------------------------------------------------------------------------

    def write(self, out: Writing) -> None:
        live = self._live  # whoever made `out` has asked for it
        if not self._tracks(live):
            self._tracked = tuple(live.values())
        self._coverage.look(self.module, self._every)
        files, about = self._files(out, live)
        digests, extras = self._coverage.extras(self.module, live, files)
        if extras:
            files.append(TensorFile(self._path("extra.safetensors"), extras, {"format": "pt"}))
        for file in files:
            told = digests.of(file.name)
            out.staging.tensors(file.name, "model", named(file.tensors, file.since), file.metadata, told=told)
        about |= {"tensors": digests, "files": [file.name for file in files]}
        computed = self._coverage.computed(self.module) & set(digests.names)
        about["unstored"], about["transient"] = sorted(computed - set(extras)), sorted(computed & set(extras))
        if self.name == "model":
            out.digests.update(about)
        else:
            out.digests.setdefault("modules", {})[self.name] = about

    def _path(self, file: str) -> str:
        return file if self.name == "model" else f"{self.name}/{file}" if self._pretrained else f"{self.name}.{file}"

    @property
    def _pretrained(self) -> bool:
        """Whether the model knows by itself how from_pretrained wants its files."""
        return hasattr(self.module, "save_pretrained") and (
            hasattr(self.module, "config") or hasattr(self.module, "peft_config")
        )

    def _files(self, out: Writing, live: Mapping[str, torch.Tensor]) -> tuple[list[TensorFile], dict[str, Any]]:
        """(files, what to know of them): `aliases` other name -> name of tied tensors; `extra_state` of its modules;
        `own`: names that only the model's state_dict has, neither parameters nor buffers."""
        if self._pretrained:
            files = self._save_pretrained(out.staging)
            tied = self._coverage.aliases(self.module, files)
            return files, {"aliases": tied} if tied else {}
        file, about = self._coverage.collected(lambda: self._state_dict(live))
        return [file], dict(about)

    def _save_pretrained(self, staging: Staging) -> list[TensorFile]:
        known = adapter.recall(self._coverage.known, self.module)
        if known is not None:
            for name, content in known.beside.items():
                staging.data(name, "model", content)
            return list(known.tensors)
        place = staging.path if self.name == "model" else os.path.join(staging.path, self.name)
        others = written_by_libraries(staging.directory)  # a tokenizer's: a save before training goes on leaves them
        with self._coverage.collecting(self.module, staging.path) as files:
            self.module.save_pretrained(place)  # type: ignore[operator]
        if not others:
            adapter.remember(self._coverage.known, self.module, files, staging.directory)
        staging.adopt("model")
        return files

    def _state_dict(self, live: Mapping[str, torch.Tensor]) -> tuple[TensorFile, dict[str, Any]]:
        tensors: dict[str, torch.Tensor] = {}
        about: dict[str, Any] = {}
        first: dict[tuple[Any, ...], str] = {}
        for key, value in self.module.state_dict(keep_vars=True).items():
            name = clean(key)
            if name.endswith(EXTRA_STATE):
                about.setdefault("extra_state", {})[name] = tree.encode(value, tensors, name)
                continue
            if not isinstance(value, torch.Tensor):
                raise NotSupported(
                    f"{self.name}: its state_dict holds {name}, a {type(value).__name__}, beside tensors",
                    hint="return it from get_extra_state(), or hand it to CheckpointManager as a part of its own",
                )
            known = first.setdefault(identity(value), name) if value.numel() else name
            if known == name:
                tensors[name] = value
                if name not in live:
                    about.setdefault("own", []).append(name)
            else:
                about.setdefault("aliases", {})[name] = known
        return TensorFile(f"{self.name}.safetensors", tensors, {"format": "pt"}), about

    # ---- reading -------------------------------------------------------------------------

    def prepare(self, source: Reading) -> Ready | None:
        digests = source.saved.digests
        about = digests if self.name == "model" else digests.get("modules", {}).get(self.name)
        if about is None or not (about.get("tensors") or "files" in about):
            source.lacks(self.name)
            return None
        files = about.get("files")
        if files is None:  # a Trainer's checkpoint
            files = [name for name in source.saved.parts["model"] if name.endswith(".safetensors")]

        def load() -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = {}
            for file in files:
                own = f"{self.name}/" if self.name != "model" else ""
                prefix = "" if file.removeprefix(own).startswith(("model", f"{self.name}.safetensors")) else f"{file}/"
                found |= {prefix + key: tensor for key, tensor in source.saved.load(file).items()}
            return found

        if not source.match.exact:
            return self._ready_by_name(about["tensors"], load(), source.match)
        prepared = weights.prepare(
            self.module,
            about["tensors"],
            load,
            stored=[item for file in files for item in source.saved.stored(file)],
            empty=self.empty,
            allow_base="base_model" in source.allow,
            unstored=about.get("unstored", ()),
        )

        def ready() -> str:
            counts = prepared.apply()
            self._set_rest(about, load)
            detail = ", ".join(f"{number} {how}" for how, number in counts.items() if number)
            return f"all {sum(counts.values())} tensors proven ({detail})"

        return ready

    def _ready_by_name(self, expected: Mapping[str, str], saved: dict[str, torch.Tensor], match: Match) -> Ready:
        if self.empty:
            raise NotSupported(
                f"{self.name} is on the meta device, and tensors may differ from the checkpoint's",
                hint="build it on the CPU to restore with rename=, new=, gone= or cast=",
            )
        plan = by_name(self.module, expected, saved, match, self.name)

        def ready() -> str:
            plan.apply()
            return plan.detail

        return ready

    def _set_rest(self, about: Mapping[str, Any], load: Callable[[], dict[str, torch.Tensor]]) -> None:
        """What is in a state dict beside parameters and buffers."""
        extra, own = about.get("extra_state", {}), about.get("own", [])
        if not extra and not own:
            return
        tensors = load()
        for key, value in extra.items():
            owner = self.module.get_submodule(key.removesuffix(EXTRA_STATE).removesuffix("."))
            owner.set_extra_state(tree.decode(value, tensors))
        if own:
            keys = {clean(key): key for key in self.module.state_dict()}
            self.module.load_state_dict({keys[name]: tensors[name] for name in own if name in keys}, strict=False)
