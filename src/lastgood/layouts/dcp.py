"""torch.distributed.checkpoint directories: `.metadata` (a pickle) and `__<rank>_<n>.distcp` files.

Layout (torch/distributed/checkpoint/filesystem.py): `.metadata` names for every tensor its chunks, and for
every chunk a file, an offset and a length; each such stretch is a torch.save archive of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastgood.errors import CorruptCheckpoint
from lastgood.format import archive, inert
from lastgood.format.inert import Node
from lastgood.layouts.found import Found, files_of, is_directory, modified
from lastgood.store import local

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Item:
    """One stretch of a file. offsets: where the chunk begins in the whole tensor; None for what isn't a tensor."""

    name: str
    file: str
    begin: int
    length: int
    offsets: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Index:
    """tensors: name -> (dtype code, shape). items: where everything lies. paths: name -> keys in the nested state."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    items: tuple[Item, ...]
    paths: dict[str, tuple[Any, ...]]


def recognises(path: Path) -> bool:
    """Whether this directory is one."""
    return is_directory(path) and local.size(path / METADATA) is not None


def look(path: Path) -> Found:
    """What it holds, by its index."""
    files = files_of(path)
    problem, names = "", set[str]()
    try:
        index = read(path)
        names = {str(index.paths.get(item.name, (item.name,))[0]).partition(".")[0] for item in index.items}
        problem = "; ".join(_gaps(path, index))
    except CorruptCheckpoint as error:
        problem = error.message
    full = any("optim" in name for name in names)
    number = re.search(r"(\d{1,18})$", path.name)
    return Found(
        path=path,
        layout="dcp",
        step=int(number[1]) if number else -1,
        state="incomplete" if problem else "full" if full else "weights",
        parts={"model" if not full else "state": tuple(files)},
        files=files,
        problem=problem,
        created=modified(path / METADATA),
    )


def problems(path: Path, *, full: bool) -> tuple[str, ...]:
    """Every stretch lies inside its file; full: and is an archive whose checksums are right."""
    try:
        index = read(path)
    except CorruptCheckpoint as error:
        return (error.message,)
    found = _gaps(path, index)
    if full and not found:
        for item in index.items:
            try:
                archive.load(path / item.file, begin=item.begin, length=item.length)
            except CorruptCheckpoint as error:
                found.append(f"{item.name}: {error.message}")
                continue
            found += filter(None, [archive.check(path / item.file, full=True, begin=item.begin, length=item.length)])
    return tuple(found)


def read(path: Path) -> Index:
    """The index in `.metadata`. Raises CorruptCheckpoint."""
    try:
        data = local.read(path / METADATA, inert.LIMIT)
    except OSError as error:
        raise CorruptCheckpoint(f"{METADATA} can't be read: {error.strerror or error}") from error
    tree = inert.loads(data, METADATA)
    fields = tree.fields if isinstance(tree, Node) else {}
    states, storage = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(states, dict) or not isinstance(storage, dict):
        raise CorruptCheckpoint(f"{METADATA} isn't that of a distributed checkpoint")
    tensors = {name: _tensor(node) for name, node in states.items() if isinstance(name, str) and _is_tensor(node)}
    items = tuple(_items(storage))
    planner = fields.get("planner_data")
    paths = (
        {k: v for k, v in planner.items() if isinstance(k, str) and _is_path(v)} if isinstance(planner, dict) else {}
    )
    return Index(tensors, items, paths)


def _is_path(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(key, (str, int)) for key in value)


def _is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and node.name.endswith("TensorStorageMetadata")


def _tensor(node: Node) -> tuple[str, tuple[int, ...]]:
    properties, size = node.fields.get("properties"), node.fields.get("size")
    dtype = None
    if isinstance(properties, Node):
        # TensorProperties pickles itself as a tuple that begins with the dtype.
        state = properties.state
        dtype = state[0] if isinstance(state, tuple) and state else properties.fields.get("dtype")
    word = str(getattr(dtype, "inert", "")).rpartition(".")[2]
    return archive.DTYPES.get(word, word[:40] or "?"), _extents(size) or ()


def _extents(value: Any) -> tuple[int, ...] | None:
    """A shape or an offset; None for what is neither."""
    found = value.args[0] if isinstance(value, Node) and value.args else () if isinstance(value, Node) else value
    if not isinstance(found, (list, tuple)) or not all(type(n) is int and 0 <= n < 1 << 62 for n in found):
        return None
    return tuple(found)


def _items(storage: dict[Any, Any]) -> Iterator[Item]:
    for key, value in storage.items():
        index, info = _fields(key), _fields(value)
        name, file = index.get("fqn"), info.get("relative_path")
        begin, length = info.get("offset"), info.get("length")
        if not isinstance(name, str) or not isinstance(file, str) or not _inside(file):
            raise CorruptCheckpoint(f"{METADATA} names a place outside the checkpoint")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in (begin, length)):
            raise CorruptCheckpoint(f"{METADATA} names bytes of {file[:200]} that no file can have")
        assert isinstance(begin, int)
        assert isinstance(length, int)
        offset = index.get("offset")
        yield Item(name, file, begin, length, None if offset is None else _extents(offset))


def _fields(node: Any) -> dict[str, Any]:
    return node.fields if isinstance(node, Node) else {}


def _inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\\" not in name


def _gaps(path: Path, index: Index) -> list[str]:
    ends: dict[str, int] = {}
    for item in index.items:
        ends[item.file] = max(ends.get(item.file, 0), item.begin + item.length)
    found = []
    # Not by asking for each name: on the way to it there may be a link that leads out of the checkpoint.
    files = files_of(path)
    for name, end in sorted(ends.items()):
        size = files.get(name)
        if size is None:
            found.append(f"{name} is missing")
        elif size < end:
            found.append(f"{name} has {size} bytes, expected {end}")
    return found
