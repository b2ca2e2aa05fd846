"""What the doctor says: one finding per thing that is wrong."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["error", "warning", "info", "benign"]
"""error: something is lost or won't start. warning: something will be. info: worth knowing. benign: harmless, though
it looks bad. Only errors and warnings are findings that a script should stop at."""

SERIOUS: tuple[Severity, ...] = ("error", "warning")
ORDER: tuple[Severity, ...] = ("error", "warning", "info", "benign")


class Repair(msgspec.Struct, frozen=True):
    """What `--fix` does about it; nothing here deletes.

    quarantine: move the checkpoint (or leftover) `name` to .lastgood/quarantine. adopt: give the intact checkpoints of
    a stock Trainer manifests. relink: write `text` into the file `name`; what it held is kept beside the quarantine.
    """

    kind: Literal["quarantine", "adopt", "relink"]
    name: str = ""
    text: str = ""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """where: a checkpoint's name, "arguments" or "log". saw: what was found there. evidence: further facts, from disk.

    means: what comes of it. fix: commands or settings, the best first.
    """

    code: str
    title: str
    severity: Severity
    where: str
    saw: str
    means: str
    evidence: tuple[str, ...] = ()
    fix: tuple[str, ...] = ()
    repair: Repair | None = None
