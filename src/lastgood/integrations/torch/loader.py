"""The part that is a data loader: where the loop stands in its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lastgood.integrations.torch.exchange import Reading, Ready, Writing
from lastgood.integrations.torch.stamp import Stamp
from lastgood.state import rng
from lastgood.state.cost import Cost
from lastgood.state.position import Mark
from lastgood.state.stream import Stream, follow
from lastgood.talk import warn


def followable(thing: Any) -> bool:
    """Whether it is iterated for batches and can be followed: a DataLoader, or an iterable with a state of its own."""
    stateful = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
    return isinstance(thing, (Stream, torch.utils.data.DataLoader)) or (hasattr(thing, "__iter__") and stateful)


LONG = 60.0
"""Seconds of reading again, before a resume, that somebody should know of beforehand."""


@dataclass(slots=True)
class Data:
    """at: where the loop stood at the end of the last step, which is where a resume goes on."""

    name: str
    stream: Stream
    at: Mark
    told: bool = False

    @classmethod
    def of(cls, name: str, loader: Any) -> Data:
        stream = loader if isinstance(loader, Stream) else follow(loader)
        return cls(name, stream, stream.mark())

    @property
    def epoch(self) -> float:
        """Epochs that are complete, with the share of the one under way where the loader has a length."""
        try:
            length = len(self.stream.loader)
        except TypeError:
            length = 0
        return self.stream.epoch + (self.stream.consumed / length if length else 0.0)

    def mark(self) -> None:
        """A step is complete."""
        self.at = self.stream.mark()

    def rewind(self, mark: Mark) -> None:
        """Stand there again, between two iterations, if there were any since.

        What an evaluation went through is not gone through again by a run that resumes behind it. Worker processes
        that persist can't be put back.
        """
        course = self.stream.course
        if not isinstance(self.stream.loader, torch.utils.data.DataLoader) or course.persistent:
            return
        if mark.here is None and course.alive() is None and self.stream.epoch != mark.epoch:
            tensors: dict[str, torch.Tensor] = {}
            self.stream.load(self.stream.encode(mark, tensors, self.name), tensors, then=rng.capture())

    def write(self, out: Writing) -> None:
        if out.full:
            where = "data" if self.name == "dataloader" else self.name
            out.put(self.name, self.stream.encode(self.at, out.tensors, where))

    def prepare(self, source: Reading) -> Ready | None:
        saved = source.get(self.name)
        if saved is None:
            return None
        self.stream.check(saved)
        source.changed += self.stream.changes(saved)
        tensors = source.saved.tensors

        def ready() -> str:
            told = self.stream.load(saved, tensors, then=source.once)
            self.mark()
            return "; ".join(text for _, text in told)

        return ready

    def cost(self) -> Cost:
        """What a resume from the last step would cost; said once, where that is long."""
        cost = self.stream.cost(self.at)
        if not self.told and (cost.seconds or 0.0) > LONG:
            self.told = True
            warn(f"{self.name}: a resume from here has work to do first: {cost} (docs/data.md says how to avoid it)")
        return cost

    def estimate(self) -> int:
        return 0

    def stamp(self) -> Stamp:
        return ()
