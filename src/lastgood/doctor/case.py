"""All that is known about a patient: its log, its run directory, its settings, the versions installed here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib import metadata

from lastgood.doctor.disk import Disk
from lastgood.doctor.log import Log
from lastgood.doctor.settings import Settings

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
