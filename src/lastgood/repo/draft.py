"""A checkpoint in memory: everything that is to be written, copied, so that what it was copied from may change."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lastgood.format import tensors as safetensors
from lastgood.repo.staging import Content, Staging, beside_training, explained, written_by_libraries
from lastgood.store import local
from lastgood.store.memory import Arena


class Source(Protocol):
    """The tensors of one file. Whoever writes asks for them once, from another thread than the one that trains."""

    def tensors(self) -> Iterable[safetensors.Tensor]:
        """Each with a host buffer that is ready to be written, and stays as it is until the file is."""
        ...


@dataclass(frozen=True, slots=True)
class Copied:
    """Tensors that were copied when they were handed over."""

    entries: tuple[safetensors.Tensor, ...]

    def tensors(self) -> Iterable[safetensors.Tensor]:
        return self.entries


@dataclass(slots=True)
class Draft(Staging):
    """Takes what a Staging takes. Its directory is for libraries that write files; `adopt` reads those back and
    removes them, so that nothing of a save lies on the disk before the writer's turn.

    seconds: "copy" is the time spent on copying. names: of the parts that it has so far.
    """

    arena: Arena = field(default_factory=Arena)
    _todo: list[Callable[[Staging], object]] = field(default_factory=list)

    def tensors(
        self,
        name: str,
        part: str,
        tensors: Iterable[safetensors.Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[safetensors.Tensor, ...]:
        """Copy them. Raises Short where memory is; UsageError for what no file can hold."""
        started = time.perf_counter()
        source = Copied(tuple(entry._replace(data=self.arena.keep(entry.data)) for entry in tensors))
        safetensors.encode(source.entries, metadata)  # what is wrong with them is told by the call that is at fault
        self._spent("copy", started)
        self._will(part, lambda out: out.tensors(name, part, source.tensors(), metadata))
        return source.entries

    def data(self, name: str, part: str, content: Content) -> None:
        """Remember it; a function is called by whoever writes, and may look at nothing but what was copied."""
        self._will(part, lambda out: out.data(name, part, content))

    def adopt(self, part: str) -> None:
        """Take in what libraries wrote into the directory. Raises SaveFailed, and Short where memory is."""
        started = time.perf_counter()
        for name, path in written_by_libraries(self.directory):
            with explained(path):
                content = self.arena.keep(memoryview(local.read(path, sys.maxsize)))
                local.unlink(path)
            self.data(name, part, content)
        self._spent("copy", started)

    def write(self, out: Staging) -> None:
        """Put it on the disk. As often as necessary: a disk that was full may have room later."""
        for act in self._todo:
            act(out)

    def opened(self) -> Staging:
        """The staging directory, made anew if it was removed. Raises SaveFailed or NotEnoughSpace."""
        with explained(self.directory):
            local.make_dirs(self.directory.parent)
            local.make_dir(self.directory)
        return Staging(self.root, self.id, writers=beside_training())

    def _will(self, part: str, act: Callable[[Staging], object]) -> None:
        self.parts.setdefault(part, [])
        self._todo.append(act)


def draft(staging: Staging, arena: Arena) -> Draft:
    """In the place of an empty Staging."""
    arena.reset()
    return Draft(staging.root, staging.id, arena=arena)
