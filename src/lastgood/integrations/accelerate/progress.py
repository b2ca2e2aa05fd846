"""The part that is the Accelerator itself: where it is in an accumulation of gradients, and those gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lastgood.errors import Incompatible, UsageError
from lastgood.integrations.accelerate.prepared import identity, listed
from lastgood.integrations.torch.exchange import Reading, Ready, Writing
from lastgood.integrations.torch.stamp import Stamp, version
from lastgood.state import tree
from lastgood.state.match import some
from lastgood.talk import warn


@dataclass(slots=True)
class Progress:
    """things: what was prepared and registered when the CheckpointManager was made."""

    accelerator: Any
    name: str = "accelerator"
    things: dict[str, Any] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.things = dict(listed(self.accelerator))

    def late(self) -> list[str]:
        """What was prepared or registered since then: `save_state` would save it, and this run doesn't know it."""
        held = {identity(thing) for thing in self.things.values()}
        return [name for name, thing in listed(self.accelerator) if identity(thing) not in held]

    def mark(self) -> None:
        """A step is complete. Raises UsageError if it was trained on a loader that nobody follows."""
        active = self.accelerator.gradient_state.active_dataloader
        if active is None or any(active is thing for thing in self.things.values()):
            return
        inner = getattr(
            getattr(active, "batch_sampler", None), "batch_sampler", None
        )  # of accelerate's SkipBatchSampler
        source = identity(active) if inner is None else id(inner)
        if source in {identity(thing) for name, thing in self.things.items() if name.startswith("dataloader")}:
            raise UsageError(
                "the loop iterates what accelerator.skip_first_batches made, whose position isn't known",
                hint="iterate the prepared loader itself: restore() has put it where the run stands",
            )

    def write(self, out: Writing) -> None:
        fresh = sorted(set(self.late()) - self._told)
        if fresh:
            self._told.update(fresh)
            warn(
                f"{', '.join(fresh)} of the accelerator came after the CheckpointManager was made:"
                " no checkpoint of this run holds it"
            )
        if out.full:
            waiting = {name: p.grad for name, p in out.live.items() if p.grad is not None} if self._inside else {}
            value = {
                "step": int(self.accelerator.step),
                "registered": self._registered(),
                "gradients": tree.encode(waiting, out.tensors, f"{self.name}.grad"),
            }
            out.put(self.name, value)

    def prepare(self, source: Reading) -> Ready | None:
        late = self.late()
        if late:
            raise UsageError(
                f"{', '.join(late)} of the accelerator came after the CheckpointManager was made",
                hint="prepare and register everything first, then CheckpointManager(accelerator=accelerator, ...)",
            )
        saved = source.get(self.name)
        if saved is None:
            return None
        here = self._registered()
        if saved["registered"] != here and not set(saved["registered"]) ^ set(here):
            raise Incompatible(
                f"objects were registered in another order: {saved['registered']} when it was saved, {here} here",
                hint="register_for_checkpointing them in the order of the saved run",
            )
        tensors = {name: tensor for name, tensor in source.saved.tensors.items() if name.startswith(f"{self.name}.")}
        gradients = tree.decode(saved["gradients"], tensors)
        lost = [name for name, grad in gradients.items() if getattr(source.live.get(name), "shape", None) != grad.shape]
        if lost:
            raise Incompatible(
                f"gradients were being accumulated for tensors that this run doesn't have: {some(lost)}",
                hint="resume from a checkpoint at the end of an accumulation, or allow_missing=['accelerator']",
            )

        def ready() -> str:
            self.accelerator.step = saved["step"]
            for name, grad in gradients.items():
                live = source.live[name]
                live.grad = grad.to(live.device, copy=True)
            if gradients:
                self.accelerator.gradient_state._set_sync_gradients(False)
            return f"step {saved['step']} of its accumulation" + (f", {len(gradients)} gradients" if gradients else "")

        return ready

    def estimate(self) -> int:
        return sum(grad.numel() * grad.element_size() for grad in self._gradients())

    def stamp(self) -> Stamp:
        return tuple(version(grad) for grad in self._gradients())

    @property
    def _inside(self) -> bool:
        """Whether gradients of a part of a step are waiting for the rest of it."""
        return not self.accelerator.sync_gradients

    def _gradients(self) -> Iterator[torch.Tensor]:
        if self._inside:
            for name, thing in self.things.items():
                if isinstance(thing, torch.nn.Module) and name.startswith("model"):
                    yield from (p.grad for p in thing.parameters() if p.grad is not None)

    def _registered(self) -> dict[str, str]:
        return {name: type(thing).__qualname__ for name, thing in self.things.items() if name.startswith("custom")}
