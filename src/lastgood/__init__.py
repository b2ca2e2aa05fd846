"""Checkpoint management for fine-tuning: there is always a last good checkpoint, and the best one is never lost.

Nothing here imports torch until a Trainer is managed or tensors are loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lastgood.background import Background as Background
    from lastgood.checkpoint import Checkpoint as Checkpoint
    from lastgood.doctor.diagnose import diagnose as diagnose
    from lastgood.doctor.finding import Finding as Finding
    from lastgood.errors import (
        Conflict as Conflict,
    )
    from lastgood.errors import (
        CorruptCheckpoint as CorruptCheckpoint,
    )
    from lastgood.errors import (
        Incompatible as Incompatible,
    )
    from lastgood.errors import (
        IncompleteRestore as IncompleteRestore,
    )
    from lastgood.errors import (
        LastgoodError as LastgoodError,
    )
    from lastgood.errors import (
        NoCheckpoint as NoCheckpoint,
    )
    from lastgood.errors import (
        NotEnoughSpace as NotEnoughSpace,
    )
    from lastgood.errors import (
        NotSupported as NotSupported,
    )
    from lastgood.errors import (
        Preempted as Preempted,
    )
    from lastgood.errors import (
        RunLocked as RunLocked,
    )
    from lastgood.errors import (
        SaveFailed as SaveFailed,
    )
    from lastgood.errors import (
        UsageError as UsageError,
    )
    from lastgood.integrations.lightning.callback import (
        LightningCheckpoint as LightningCheckpoint,
    )
    from lastgood.integrations.lightning.callback import (
        LightningIO as LightningIO,
    )
    from lastgood.integrations.lightning.io import lightning_file as lightning_file
    from lastgood.integrations.torch.manager import CheckpointManager as CheckpointManager
    from lastgood.integrations.transformers.manage import manage as manage
    from lastgood.integrations.transformers.trainer import ManagedTrainer as ManagedTrainer
    from lastgood.interval import Interval as Interval
    from lastgood.planner.plan import plan as plan
    from lastgood.policy import Keep as Keep
    from lastgood.run import Run as Run
    from lastgood.run import open as open
    from lastgood.watching import watch as watch

__version__ = "0.1.0"

_HOMES = {
    "Background": "lastgood.background",
    "Checkpoint": "lastgood.checkpoint",
    "CheckpointManager": "lastgood.integrations.torch.manager",
    "Conflict": "lastgood.errors",
    "CorruptCheckpoint": "lastgood.errors",
    "Finding": "lastgood.doctor.finding",
    "Incompatible": "lastgood.errors",
    "IncompleteRestore": "lastgood.errors",
    "Interval": "lastgood.interval",
    "Keep": "lastgood.policy",
    "LastgoodError": "lastgood.errors",
    "LightningCheckpoint": "lastgood.integrations.lightning.callback",
    "LightningIO": "lastgood.integrations.lightning.callback",
    "ManagedTrainer": "lastgood.integrations.transformers.trainer",
    "NoCheckpoint": "lastgood.errors",
    "NotEnoughSpace": "lastgood.errors",
    "NotSupported": "lastgood.errors",
    "Preempted": "lastgood.errors",
    "Run": "lastgood.run",
    "RunLocked": "lastgood.errors",
    "SaveFailed": "lastgood.errors",
    "UsageError": "lastgood.errors",
    "diagnose": "lastgood.doctor.diagnose",
    "lightning_file": "lastgood.integrations.lightning.io",
    "manage": "lastgood.integrations.transformers.manage",
    "open": "lastgood.run",
    "plan": "lastgood.planner.plan",
    "watch": "lastgood.watching",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lastgood' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers", "numpy", "accelerate", "lightning", "pytorch_lightning"):
            extra = "lightning" if "lightning" in _HOMES[name] else "trl"
            raise ImportError(f"lastgood.{name} needs {error.name}: pip install 'lastgood[{extra}]'") from error
        raise
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
