"""What an operation did to the disk, call by call, in terms of files and directories rather than of their names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lastgood.store.fs import AnyPath, FileSystem

Node = int
"""A file or a directory, whatever it is called: what file systems call an inode. 0 is the root."""


class Named(NamedTuple):
    """A name in a directory now stands for `node`; None: for nothing. was: what it stands for no longer."""

    place: Node
    name: str
    node: Node | None


class Moved(NamedTuple):
    """From one name to another, in one step; what had the new name loses it."""

    source: Node
    old: str
    target: Node
    new: str
    node: Node


class Filled(NamedTuple):
    """What a file holds from byte `at` on. whole: and nothing behind it, so that it may be shorter than before."""

    node: Node
    content: bytes
    at: int
    whole: bool = False


class Synced(NamedTuple):
    """The content of a file or the names in a directory are durable, says the file system."""

    node: Node


Event = Named | Moved | Filled | Synced


@dataclass
class Tree:
    """Files (bytes) and directories (name -> node), by node."""

    nodes: dict[Node, bytes | dict[str, Node]]

    def copy(self) -> Tree:
        """An independent one."""
        return Tree({n: dict(value) if isinstance(value, dict) else value for n, value in self.nodes.items()})

    def apply(self, event: Event) -> None:
        """As the disk would. What doesn't fit any more is left out: its directory may be gone."""
        if isinstance(event, Filled):
            old = self.nodes[event.node]
            assert isinstance(old, bytes)
            behind = b"" if event.whole else old[event.at + len(event.content) :]
            self.nodes[event.node] = old[: event.at].ljust(event.at, b"\0") + event.content + behind
        elif isinstance(event, Named):
            place = self._place(event.place)
            if event.node is None:
                place.pop(event.name, None)
            else:
                place[event.name] = event.node
        elif isinstance(event, Moved):
            source = self._place(event.source)
            if source.get(event.old) == event.node:
                del source[event.old]
            self._place(event.target)[event.new] = event.node

    def _place(self, node: Node) -> dict[str, Node]:
        found = self.nodes[node]
        assert isinstance(found, dict)
        return found

    def files(self, node: Node = 0, prefix: str = "") -> dict[str, bytes | None]:
        """Relative name -> content of everything that has a name; None for a directory."""
        found: dict[str, bytes | None] = {}
        for name, inner in self._place(node).items():
            value = self.nodes[inner]
            if isinstance(value, dict):
                found[prefix + name] = None
                found |= self.files(inner, f"{prefix}{name}/")
            else:
                found[prefix + name] = value
        return found


class Recorder(FileSystem):
    """Does what is asked for and writes it down, for everything below `root`.

    before: the tree as it was. events: what happened since. What a library wrote without coming through here is
    taken in when it is made durable.
    """

    workers = 1

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.before = Tree({0: {}})
        self._next = 1
        self.now = self.before
        self.events: list[Event] = []
        self._look(0, self.root)
        self.before, self.events = self.now.copy(), []
        self._open: dict[int, Path] = {}

    def open(self, path: AnyPath, flags: int, mode: int = 0o666) -> int:
        """See FileSystem, as for all of these."""
        there = os.path.lexists(path)
        handle = super().open(path, flags, mode)
        at = Path(os.path.abspath(path))
        if at == self.root or self.root in at.parents:
            self._open[handle] = at
            if not there:
                self._node(at)
        return handle

    def write(self, handle: int, data: bytes | memoryview) -> int:
        node = self._node(self._open[handle]) if handle in self._open else None  # as it is before
        count = super().write(handle, data)
        if node is not None:  # where it is now is where the write ended, also of a file that is only appended to
            self._did(Filled(node, bytes(data)[:count], os.lseek(handle, 0, os.SEEK_CUR) - count))
        return count

    def allocate(self, handle: int, size: int) -> None:
        node = self._node(self._open[handle]) if handle in self._open else None
        super().allocate(handle, size)
        if node is not None:
            self._did(Filled(node, bytes(size), 0))

    def truncate(self, handle: int, size: int) -> None:
        node = self._node(self._open[handle]) if handle in self._open else None
        super().truncate(handle, size)
        if node is not None:
            old = self.now.nodes[node]
            assert isinstance(old, bytes)
            self._did(Filled(node, old[:size], 0, whole=True))

    def sync(self, handle: int) -> None:
        super().sync(handle)
        if handle in self._open:
            path = self._open[handle]
            self._did(Synced(self._node(path)))

    def close(self, handle: int) -> None:
        self._open.pop(handle, None)
        super().close(handle)

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        super().rename(source, target)
        self._moved(source, target)

    def replace(self, source: AnyPath, target: AnyPath) -> None:
        super().replace(source, target)
        self._moved(source, target)

    def unlink(self, path: AnyPath) -> None:
        super().unlink(path)
        self._gone(path)

    def mkdir(self, path: AnyPath) -> None:
        super().mkdir(path)
        self._node(Path(os.path.abspath(path)))

    def rmdir(self, path: AnyPath) -> None:
        super().rmdir(path)
        self._gone(path)

    def _did(self, event: Event) -> None:
        self.events.append(event)
        self.now.apply(event)

    def _node(self, path: Path) -> Node:
        """The node of a path that is there; what has none yet was written by somebody else, and is taken in."""
        node = 0
        for depth, name in enumerate(path.relative_to(self.root).parts, 1):
            place = self.now.nodes[node]
            assert isinstance(place, dict)
            if name not in place:
                at = self.root.joinpath(*path.relative_to(self.root).parts[:depth])
                self._take_in(node, at)
            node = self.now._place(node)[name]
        self._look(node, path)
        return node

    def _take_in(self, place: Node, path: Path) -> None:
        node, self._next = self._next, self._next + 1
        self.now.nodes[node] = {} if path.is_dir() and not path.is_symlink() else b""
        if self.now is not self.before:
            self.before.nodes[node] = {} if path.is_dir() and not path.is_symlink() else b""
        self._did(Named(place, path.name, node))
        self._look(node, path)

    def _look(self, node: Node, path: Path) -> None:
        """What happened to it without coming through here."""
        known = self.now.nodes[node]
        if isinstance(known, dict):
            there = sorted(entry.name for entry in os.scandir(path) if not entry.is_symlink())
            for name in [name for name in known if name not in there]:
                self._did(Named(node, name, None))
            for name in there:
                if name not in known:
                    self._take_in(node, path / name)
        else:
            content = path.read_bytes()
            if content != known:
                self._did(Filled(node, content, 0, whole=True))

    def _moved(self, source: AnyPath, target: AnyPath) -> None:
        old, new = Path(os.path.abspath(source)), Path(os.path.abspath(target))
        if self.root not in old.parents or self.root not in new.parents:
            return
        here, there = self._parent(old), self._parent(new)
        node = self.now._place(here).get(old.name)
        if node is None:
            self._take_in(there, new)
        else:
            self._did(Moved(here, old.name, there, new.name, node))

    def _gone(self, path: AnyPath) -> None:
        at = Path(os.path.abspath(path))
        if self.root in at.parents:
            try:
                place = self._parent(at)
            except KeyError:  # of a library's own, and gone before anybody asked for it: it was never written down
                return
            self._did(Named(place, at.name, None))

    def _parent(self, path: Path) -> Node:
        node = 0
        for name in path.relative_to(self.root).parts[:-1]:
            node = self.now._place(node)[name]
        return node
