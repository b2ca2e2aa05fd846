"""Marks on checkpoints whose state is unhealthy: `.lastgood/poisoned.json`, checkpoint id -> reason.

A checkpoint that was unhealthy when it was saved says so in its manifest (facts, `poisoned`). What is found out later
is written here, and so is that one is healthy after all: an empty reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lastgood.errors import CorruptCheckpoint
from lastgood.model import Manifest
from lastgood.repo import pins, sealed
from lastgood.repo.layout import hidden
from lastgood.store import local

NAME = "poisoned.json"
FACT = "poisoned"
"""The fact in a manifest with the reason."""


def read(root: Path) -> dict[str, str]:
    """checkpoint id -> reason. Raises ValueError or OSError for a file that isn't readable."""
    return pins.table(root, NAME, str)


def marks(root: Path, *, sure: bool = False) -> Mapping[str, str]:
    """The same; where they can't be read every checkpoint counts as marked, for none may be healed by damage.

    sure: see `records`.
    """
    try:
        return read(root)
    except OSError as error:
        if sure and local.passing(error):
            raise
        return _Everything()
    except ValueError:
        return _Everything()


def reason(manifest: Manifest, marked: Mapping[str, str]) -> str:
    """Why this checkpoint is poisoned; "" for a healthy one. A mark overrules what its manifest says."""
    known = marked.get(manifest.id)
    if known is not None:
        return known
    own = manifest.facts.get(FACT)
    return own if isinstance(own, str) else ""


def mark(root: Path, reasons: Mapping[str, str]) -> None:
    """Mark checkpoints (id -> reason; "": it is healthy), durably and at once for every reader.

    Raises CorruptCheckpoint where the marks there are can't be read: adding to them would lose them.
    """
    with pins.alone(root):
        try:
            known = read(root)
        except ValueError as error:
            raise CorruptCheckpoint(
                f"{NAME} can't be read ({error}): every checkpoint counts as poisoned, no mark is added or taken away",
                hint=f"repair {hidden(root, NAME)}, or delete it to let go of all marks",
            ) from error
        text = json.dumps(sealed.seal({**known, **reasons}), indent=1)
        local.replace(hidden(root, NAME), f"{text}\n".encode())


class _Everything(dict[str, str]):
    def get(self, key: str, default: object = None) -> str:
        return f"{NAME} can't be read: repair or delete it"
