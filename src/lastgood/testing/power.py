"""Every state of the disk that a power cut may leave, by two models of what file systems promise.

ordered: names change in the order of the calls, as in the journals of ext4 and xfs; each sync makes all names before
it durable. The content of a file that wasn't synced is there, missing, zeroes, or half there.
posix: nothing that wasn't synced itself need be there: any one change may be the only one that is lost, or the only one
that isn't. A name is durable when its directory was synced, a move when that of its new name was.
The models are those of Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, in short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from lastgood.testing.trace import Event, Filled, Moved, Named, Synced, Tree

Model = Literal["ordered", "posix"]


@dataclass(frozen=True, slots=True)
class Cut:
    """One state. after: how many events had happened. label: which of them the disk has, in words."""

    after: int
    label: str
    files: dict[str, bytes | None]

    def write(self, directory: Path) -> None:
        """Make the state real, in a directory that is empty or isn't there. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            if content is None:
                (directory / name).mkdir()
            else:
                (directory / name).write_bytes(content)


def cuts(before: Tree, events: Sequence[Event], model: Model) -> Iterator[Cut]:
    """Each different state once, in a fixed order; the last ones are of a cut after all events."""
    seen: set[bytes] = set()
    for count in range(len(events) + 1):
        happened = events[:count]
        for label, some in (_ordered if model == "ordered" else _posix)(happened):
            tree = before.copy()
            for event in some:
                tree.apply(event)
            files = tree.files()
            key = _key(files)
            # A cut after the operation returned is looked at even if one before it left the same: more is promised.
            if (key in seen and count < len(events)) or key + b"!" in seen:
                continue
            seen.add(key + b"!" if count == len(events) else key)
            yield Cut(count, label, files)


def _ordered(happened: Sequence[Event]) -> Iterator[tuple[str, Sequence[Event]]]:
    synced = max((i for i, event in enumerate(happened) if isinstance(event, Synced)), default=-1)
    loose = [i for i, event in enumerate(happened) if isinstance(event, (Named, Moved)) and i > synced]
    unsynced = [i for i in _loose(happened) if isinstance(happened[i], Filled)]
    nodes = sorted({event.node for i in unsynced if isinstance(event := happened[i], Filled)})
    for kept in range(len(loose) + 1):
        gone = set(loose[kept:])
        names = [(i, event) for i, event in enumerate(happened) if i not in gone]
        where = f"{kept} of {len(loose)} names"
        yield f"{where}, all content", [event for _, event in names]
        for how in ("missing", "zeroes", "torn") if nodes else ():
            for some in [nodes] if len(nodes) == 1 else [nodes, *([node] for node in nodes)]:
                hurt = [_hurt(event, how) if i in unsynced and _node(event) in some else event for i, event in names]
                yield f"{where}, {how} content of {len(some)} files", [event for event in hurt if event is not None]


def _posix(happened: Sequence[Event]) -> Iterator[tuple[str, Sequence[Event]]]:
    loose = _loose(happened)
    yield "everything", happened
    sure = [event for i, event in enumerate(happened) if i not in loose]
    yield "what was synced alone", sure
    for one in loose:
        yield f"all but event {one}", [event for i, event in enumerate(happened) if i != one]
        yield f"what was synced and event {one}", [e for i, e in enumerate(happened) if i == one or i not in loose]
        for how in ("zeroes", "torn") if isinstance(happened[one], Filled) else ():
            hurt = [_hurt(event, how) if i == one else event for i, event in enumerate(happened)]
            yield f"{how} instead of event {one}", [event for event in hurt if event is not None]


def _loose(happened: Sequence[Event]) -> list[int]:
    """Those events that no sync made durable, by their index."""
    synced: dict[int, int] = {}  # node -> the last sync of it
    for i, event in enumerate(happened):
        if isinstance(event, Synced):
            synced[event.node] = i
    where = {Filled: "node", Named: "place", Moved: "target"}
    return [
        i
        for i, event in enumerate(happened)
        if not isinstance(event, Synced) and synced.get(getattr(event, where[type(event)]), -1) < i
    ]


def _node(event: Event) -> int | None:
    return event.node if isinstance(event, Filled) else None


def _hurt(event: Event, how: str) -> Event | None:
    assert isinstance(event, Filled)
    if how == "missing":
        return None
    if how == "zeroes":
        return event._replace(content=bytes(len(event.content)))
    return event._replace(content=event.content[: len(event.content) // 2])


def _key(files: dict[str, bytes | None]) -> bytes:
    key = blake2b(digest_size=16)
    for name, content in sorted(files.items()):
        key.update(f"{name}\0{-1 if content is None else len(content)}\0".encode())
        key.update(content or b"")
    return key.digest()
