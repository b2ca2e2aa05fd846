"""Who a run is (run.json), where it stands after going back (head.json), what it keeps (policy.json)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from lastgood.format.manifest import NewerFormat
from lastgood.model import FORMAT, Head
from lastgood.repo import reserve, sealed
from lastgood.repo.layout import hidden, new_id
from lastgood.store import local

RUN, HEAD, POLICY = "run.json", "head.json", "policy.json"

T = TypeVar("T")


class _Identity(msgspec.Struct, frozen=True):
    format: int
    run: str


def read_run(root: Path, *, sure: bool = False) -> str | None:
    """The id of the run in this directory; None where there is none (or it isn't readable). sure: see `records`."""
    identity = _read(hidden(root, RUN), _Identity, sure)
    return None if identity is None else identity.run


def check_format(root: Path) -> None:
    """Before anything is written: nothing there is a later release's. Raises NewerFormat."""
    identity = _read(hidden(root, RUN), _Identity, False)
    if identity is not None and identity.format > FORMAT:
        raise NewerFormat(
            f"{hidden(root, RUN)} has format {identity.format}, this version of lastgood writes {FORMAT}",
            hint="use a newer lastgood; nothing was changed",
        )


def start_run(root: Path, run: str | None = None) -> str:
    """Make the directory that of a new run (or of `run`, whose run.json was lost); returns its id."""
    identity = _Identity(FORMAT, run or new_id())
    reserve.spend(root, lambda: local.replace(hidden(root, RUN), _json(identity)))
    if run is None:
        # Not before: cut short in between, the old run would be without it, and stand on the branch that it had left.
        local.unlink(hidden(root, HEAD))
    return identity.run


def raise_format(root: Path) -> None:
    """Before the first checkpoint of this format in a run of an older one: older releases leave the run alone then.

    One that went on would not know this checkpoint, go on from the one before, and give the same number twice.
    """
    identity = _read(hidden(root, RUN), _Identity, False)
    if identity is not None and identity.format < FORMAT:
        new = _Identity(FORMAT, identity.run)
        reserve.spend(root, lambda: local.replace(hidden(root, RUN), _json(new)))


def read_head(root: Path, run: str | None, *, sure: bool = False) -> Head | None:
    """The head of this run; None if it never went back. sure: see `records`."""
    head = _read(hidden(root, HEAD), Head, sure)
    return head if head is not None and head.run == run else None


def lost_head(root: Path) -> str:
    """Why nobody knows on which branch the run is, "" where that is known: a head that is there and can't be read.

    Taking the newest save instead would go on with a branch that was left.
    """
    path = hidden(root, HEAD)
    if not os.path.lexists(path) or _read(path, Head, False) is not None:
        return ""
    return f"{path} can't be read: whether the run went back to an earlier checkpoint isn't known"


def write_head(root: Path, head: Head) -> None:
    """Durable when this returns."""
    reserve.spend(root, lambda: local.replace(hidden(root, HEAD), _json(head)))


def forget_head(root: Path) -> None:
    """The run is where its newest checkpoint is."""
    local.remove(hidden(root, HEAD))


def write_policy(root: Path, options: Mapping[str, object]) -> None:
    """Remember the policy of the run that begins, so that listings and `prune` can say why something is kept."""
    content = f"{json.dumps(dict(options), indent=1)}\n".encode()
    path = hidden(root, POLICY)
    with suppress(OSError):  # nothing rests on it
        if local.size(path) is None or local.read(path, 1 << 20) != content:
            local.replace(path, content)


def read_policy(root: Path) -> dict[str, object]:
    """The options of Keep that the run was last started with; {} if none are known."""
    try:
        value = json.loads(local.read(hidden(root, POLICY), 1 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read(path: Path, kind: type[T], sure: bool) -> T | None:
    try:
        value = json.loads(local.read(path, 1 << 20))
        return msgspec.convert(sealed.unseal(value), type=kind) if isinstance(value, dict) else None
    except OSError as error:
        if sure and local.passing(error):
            raise
        return None
    except (ValueError, msgspec.MsgspecError, RecursionError):  # ValueError: not UTF-8 either
        return None


def _json(value: msgspec.Struct) -> bytes:
    return f"{json.dumps(sealed.seal(msgspec.to_builtins(value)), indent=1)}\n".encode()
