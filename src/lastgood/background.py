"""Saves in the background: whether, with how much memory, and what a save does that finds the last one under way."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from lastgood.errors import wrong_type
from lastgood.units import parse_size

OnBusy = Literal["wait", "skip"]


class Background(msgspec.Struct, frozen=True, kw_only=True):
    """Training goes on as soon as a copy of the state is in memory; a thread writes it.

    on_busy: a save that is due while the last one is still being written "wait"s for it, or is left out ("skip").
    memory: bytes ("20GB") that the copy may take; None: as much as is free, with a quarter of that to spare. A save
    that needs more is written before training goes on.
    lazy: weights and the state of optimizers are copied while training goes on, until the next optimizer step at the
    latest, where that can be shown to be safe (docs/decisions/023); False: before training goes on.
    """

    on_busy: OnBusy = "wait"
    memory: int | str | None = None
    lazy: bool = True

    def __post_init__(self) -> None:
        if self.on_busy not in ("wait", "skip"):
            raise wrong_type("Background(on_busy)", self.on_busy, "'wait' or 'skip'")
        if not isinstance(self.lazy, bool):
            raise wrong_type("Background(lazy)", self.lazy, "True or False")
        if isinstance(self.memory, str):
            try:
                msgspec.structs.force_setattr(self, "memory", parse_size(self.memory))
            except ValueError:
                raise _no_size(self.memory) from None
        if self.memory is not None and (
            isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 0
        ):
            raise _no_size(self.memory)

    @property
    def budget(self) -> int | None:
        """`memory` in bytes."""
        return self.memory if isinstance(self.memory, int) else None


Wanted = bool | Literal["auto"] | Background
"""What the option `background` takes."""


def checked(value: Any) -> None:
    """Raise UsageError for anything else."""
    if not isinstance(value, (bool, Background)) and value != "auto":
        raise wrong_type("background", value, "True, False, 'auto' or lastgood.Background(...)")


def chosen(value: Wanted, *, accelerated: bool) -> Background | None:
    """How to save; None: before training goes on.

    accelerated: whether what is trained lies on an accelerator. "auto" means only then: on the CPU the thread takes
    from training about the time that it spares it (docs/decisions/022).
    """
    if isinstance(value, Background):
        return value
    return Background() if (accelerated if value == "auto" else value) else None


def _no_size(value: object) -> Exception:
    return wrong_type("Background(memory)", value, "a number of bytes, a size such as '20GB', or None")
