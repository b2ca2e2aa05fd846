"""Whose tensors change in an optimizer's step alone, so that they may be copied while a Lightning trainer goes on."""

from __future__ import annotations

from typing import Any

from lastgood.integrations.lightning.moment import Where
from lastgood.integrations.lightning.state import averaging

KNOWN = ("lightning", "pytorch_lightning", "lastgood")
"""Packages whose hooks leave the weights alone at the beginning of a validation."""

SWAPS = ("on_validation_start", "on_validation_epoch_start", "on_validation_model_eval")
"""Hooks in which a program may put an average in the place of the weights, to evaluate that."""


def steady(trainer: Any, module: Any, where: Where) -> list[Any]:
    """Those of the trainer; none, so that all is copied at once, where something else may change the weights first.

    An average is put in their place for a validation or at the end, by Lightning's callbacks or the program's own. It
    would be found out; but the save before a validation is the one that its metric belongs to, and must not fail.
    """
    if any(averaging(callback) for callback in trainer.callbacks):
        return []
    if where == "validate" and any(_own(one, hook) for one in (module, *trainer.callbacks) for hook in SWAPS):
        return []
    return list(trainer.optimizers)


def _own(owner: Any, hook: str) -> bool:
    """Whether that hook is the program's."""
    function = getattr(owner, hook, None)
    return function is not None and getattr(function, "__module__", "").partition(".")[0] not in KNOWN
