"""Lightning has two import names, `lightning.pytorch` and `pytorch_lightning`, with two sets of the same classes."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from lastgood.integrations.lightning.io import Reading


def module(flavour: str) -> Any:
    return importlib.import_module(flavour)


def flavour() -> str:
    """The import name that the program uses: what it has imported already, else what is installed."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if name in sys.modules:
            return name
    try:
        importlib.import_module("lightning.pytorch")
    except ModuleNotFoundError:
        return "pytorch_lightning"
    return "lightning.pytorch"


@functools.cache
def gate_class(name: str) -> type[Any]:
    """The callback that comes before all others: what they do at these events comes after the save."""

    class Gate(module(f"{name}.callbacks").Callback):  # type: ignore[misc]
        def __init__(self, owner: Any) -> None:
            self.owner = owner

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.owner.before_validation(trainer)

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.owner.before_epoch(trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.owner.before_epoch_end(trainer)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.owner.before_train_end(trainer)

    return Gate


@functools.cache
def io_class(name: str) -> type[Any]:
    """The CheckpointIO plugin for `lightning.pytorch` or `pytorch_lightning`."""

    def init(self: Any, before: Any = None) -> None:
        self.before = before

    base = module(f"{name}.plugins").CheckpointIO
    return type("LightningIO", (Reading, base), {"__init__": init, "__module__": __name__, "__doc__": Reading.__doc__})
