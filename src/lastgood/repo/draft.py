"""A checkpoint in memory: everything that is to be written, copied, so that what it was copied from may change.

A Window says when the copy is made: at once, or while training goes on and nothing changes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lastgood.format import tensors as safetensors
from lastgood.repo.staging import Content, Staging, beside_training, explained, written_by_libraries
from lastgood.store import local
from lastgood.store.memory import Arena

SMALL = 1 << 14
"""Bytes (16 KiB) below which tensors are copied side by side."""
GATHERED = 1 << 19
"""Bytes (512 KiB) of what is copied so in one go."""


class Changed(Exception):
    """What was copied while training went on has changed meanwhile: the copy is none of any step, and worth nothing."""


class Source(Protocol):
    """The tensors of one file."""

    @property
    def entries(self) -> tuple[safetensors.Tensor, ...]:
        """With their buffers, in which nothing may be yet."""
        ...

    def tensors(self) -> Iterable[safetensors.Tensor]:
        """The same with what is to be written; waits for it. Asked by whoever writes, from another thread than the one
        that trains, and behind `Window.fill`."""
        ...

    def ready(self, name: str) -> None:
        """Wait until what is to be written of the tensor of that name is there. Raises SaveFailed if it won't be."""
        ...


class Window(Protocol):
    """The copying of one save. It is open from `begin` until nothing of the live state is needed any more.

    waited: seconds that `finish` has held training so far.
    """

    @property
    def waited(self) -> float: ...

    def stage(self, tensors: Iterable[safetensors.Tensor], arena: Arena) -> Source:
        """Take the tensors of one file, while nothing changes.

        Raises Short where memory is, UsageError for what no file can hold: by the call that is at fault.
        """
        ...

    def begin(self) -> None:
        """All is staged; training goes on now."""
        ...

    def finish(self) -> None:
        """Called by whoever is about to change the state: returns when nothing of it is needed any more."""
        ...

    def fill(self) -> None:
        """Called by whoever writes, before anything else: copy what isn't copied yet."""
        ...

    def prove(self) -> None:
        """Called by whoever writes, before it commits. Raises Changed unless all is as it was when it was staged."""
        ...


@dataclass(frozen=True, slots=True)
class Copied:
    """Tensors that were copied when they were handed over."""

    entries: tuple[safetensors.Tensor, ...]

    def tensors(self) -> Iterable[safetensors.Tensor]:
        return self.entries

    def ready(self, name: str) -> None:
        return


class Eager:
    """A window that never opens: everything is copied when it is staged."""

    waited = 0.0

    def stage(self, tensors: Iterable[safetensors.Tensor], arena: Arena) -> Source:
        copies = tuple(kept(tensors, arena))
        safetensors.check(copies)
        return Copied(copies)

    def begin(self) -> None: ...

    def finish(self) -> None: ...

    def fill(self) -> None: ...

    def prove(self) -> None: ...


class Blank(Eager):
    """One that takes no tensors: for a save that is only rehearsed."""

    def stage(self, tensors: Iterable[safetensors.Tensor], arena: Arena) -> Source:
        return Copied(())


def kept(tensors: Iterable[safetensors.Tensor], arena: Arena) -> Iterator[safetensors.Tensor]:
    """Copies of all of them, in their order; small ones side by side, for to ask for memory takes longer than to copy
    them. Raises Short."""
    small: list[safetensors.Tensor] = []
    count = 0
    for entry in tensors:
        if len(entry.data) < SMALL:
            small.append(entry)
            count += len(entry.data)
            if count < GATHERED:
                continue
        yield from _side_by_side(small, arena)
        small, count = [], 0
        if len(entry.data) >= SMALL:
            yield entry._replace(data=arena.keep(entry.data))
    yield from _side_by_side(small, arena)


def _side_by_side(entries: Sequence[safetensors.Tensor], arena: Arena) -> Iterator[safetensors.Tensor]:
    view, at = arena.keep(memoryview(b"".join([entry.data for entry in entries]))) if entries else memoryview(b""), 0
    for name, dtype, shape, data in entries:
        end = at + len(data)
        yield safetensors.Tensor(name, dtype, shape, view[at:end])
        at = end


@dataclass(slots=True)
class Draft(Staging):
    """Takes what a Staging takes. Its directory is for libraries that write files; `adopt` reads those back and
    removes them, so that nothing of a save lies on the disk before the writer's turn.

    seconds: "copy" is the time spent on copying. names: of the parts that it has so far.
    """

    arena: Arena = field(default_factory=Arena)
    window: Window = field(default_factory=Eager)
    _todo: list[Callable[[Staging], object]] = field(default_factory=list)

    def tensors(
        self,
        name: str,
        part: str,
        tensors: Iterable[safetensors.Tensor],
        metadata: Mapping[str, str] | None = None,
        *,
        told: dict[str, str] | None = None,
        ready: Callable[[str], object] | None = None,
    ) -> None:
        """Copy them, at once or in the window. Raises Short where memory is, UsageError for what no file can hold."""
        assert ready is None, "the window knows what is ready"
        started = time.perf_counter()
        source = self.window.stage(tensors, self.arena)
        self._spent("copy", started)
        self._will(part, lambda out: out.tensors(name, part, source.tensors(), metadata, told=told, ready=source.ready))

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


def draft(staging: Staging, arena: Arena, window: Window) -> Draft:
    """In the place of an empty Staging."""
    arena.reset()
    return Draft(staging.root, staging.id, arena=arena, window=window)
