"""The digests of a model's tensors at a save: some known at once, the others told by the writing of its files.

A live tensor that a file holds as it is has the digest of the file's bytes. Those are hashed by whoever writes the
file, as they pass, in the background maybe, when the live tensor has long become another one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lastgood.state.fingerprint import Fingerprints
from lastgood.state.tensors import digest, signature

Place = tuple[str, str]
"""File and name of a tensor in it."""


@dataclass(slots=True)
class Digests:
    """names: of all live tensors. known: digests of some; later: where the others are written."""

    names: list[str]
    known: dict[str, str]
    later: dict[str, Place]
    told: dict[str, dict[str, str]] = field(default_factory=dict)

    def of(self, file: str) -> dict[str, str]:
        """Where to put the digests of a file, by the names that tensors have in it, when it has been written."""
        return self.told.setdefault(file, {})

    def all(self) -> dict[str, str]:
        """live name -> digest, in the order of the names. To be called when the files have been written."""
        return {name: self.known.get(name) or self._found(*self.later[name]) for name in self.names}

    def _found(self, file: str, name: str) -> str:
        return self.told[file][name]


class File(Protocol):
    """A safetensors file with the tensors that go into it."""

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class Held:
    """What some files hold. objects: by id of the tensors, which `files` keeps; places: by their identity; starts:
    where their memory begins."""

    files: Sequence[File]
    objects: dict[int, Place]
    places: dict[tuple[Any, ...], Place]
    starts: frozenset[int]

    @classmethod
    def of(cls, files: Sequence[File]) -> Held:
        every = [((f.name, name), tensor) for f in files for name, tensor in f.tensors.items() if tensor.numel()]
        objects, places = {id(tensor): place for place, tensor in every}, {identity(t): place for place, t in every}
        return cls(tuple(files), objects, places, frozenset(at[0] for at in places))

    def where(self, tensor: torch.Tensor) -> Place | None:
        """Where a file holds this very tensor, if one does."""
        place = self.objects.get(id(tensor))  # nearly always the same object; its identity takes ten times as long
        if place or not tensor.numel() or (_dense(tensor) and tensor.data_ptr() not in self.starts):
            return place
        return self.places.get(identity(tensor))

    def digests(self, like: Collection[str]) -> set[str]:
        """Digests of those that could be one of `like`: of the same dtype and shape."""
        kinds = {one.partition(":")[0] for one in like}
        if not kinds:
            return set()
        every = (item for file in self.files for item in file.tensors.items())
        return {digest(tensor, name) for name, tensor in every if signature(tensor) in kinds}


@dataclass(frozen=True, slots=True)
class Split:
    """Where the digests of the live tensors come from. later: where those are that are written; now: names of the
    others, and frozen: of those among them that are hashed once; loose: of all that no file holds as they are."""

    held: Held
    later: dict[str, Place]
    now: list[str]
    frozen: list[str]
    loose: list[str]

    @classmethod
    def of(cls, live: Mapping[str, torch.Tensor], files: Sequence[File], prints: Fingerprints) -> Split:
        held = Held.of(files)
        places = {name: held.where(tensor) for name, tensor in live.items()}
        later = {name: place for name, place in places.items() if place and not prints.remembers(live[name])}
        now = [name for name in live if name not in later]
        # One that is frozen, and has the memory of one that is trained, changes without torch counting it.
        trained = {tensor.data_ptr() for tensor in live.values() if tensor.requires_grad and _dense(tensor)}
        frozen = [
            n for n in now if prints.remembers(live[n]) and not (_dense(live[n]) and live[n].data_ptr() in trained)
        ]
        return cls(held, later, now, frozen, [name for name, place in places.items() if not place])

    def known(self, live: Mapping[str, torch.Tensor], prints: Fingerprints) -> dict[str, str]:
        """The digests of `now`."""
        found = prints.of({name: live[name] for name in self.frozen})
        return {name: found.get(name) or digest(live[name], name) for name in self.now}


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two names of the very same tensor have in common; one without memory of its own is like no other."""
    if not _dense(tensor):
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)


def _dense(tensor: torch.Tensor) -> bool:
    """Whether it has memory of its own."""
    return tensor.layout is torch.strided and bool(tensor.data_ptr())
