"""All that is known about a patient: its log, its run directory, its settings, the versions installed here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path

from lastgood.doctor.disk import Disk
from lastgood.doctor.log import Log
from lastgood.doctor.settings import Settings
from lastgood.layouts.found import modified
from lastgood.store import local

NOW = 60
"""Seconds since the last write within which a save may still be under way."""
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "lightning", "safetensors", "numpy", "deepspeed")


class Case:
    """Any of the three may be missing. arguments: the training arguments as they were given or recorded, by name.

    recorded: whether they come from the newest checkpoint and not from the user.
    """

    def __init__(
        self,
        *,
        log: Log | None = None,
        disk: Disk | None = None,
        arguments: Mapping[str, object] | None = None,
        settings: Settings | None = None,
        recorded: bool = False,
    ) -> None:
        self.log, self.disk, self.settings, self.recorded = log, disk, settings, recorded
        self.arguments: Mapping[str, object] = arguments or {}

    @cached_property
    def versions(self) -> Mapping[str, str]:
        """Library -> version installed here; nothing is imported for it."""
        found = {}
        for name in LIBRARIES:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return found

    def under_way(self, path: Path) -> bool:
        """Whether somebody wrote there a moment ago, so that it may be a save that isn't finished."""
        if self.log is not None and self.log.raised and self.log.raised[0].kind:
            return False  # what was writing has ended
        newest = max(map(modified, (path, *(path / name for name in local.names(path)))))
        return abs(time.time() - newest) < NOW
