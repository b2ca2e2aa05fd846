"""The guard of one training: what the losses say, what is marked, what a save has to carry. Without torch.

A checkpoint saved while the run is unhealthy carries the reason in its manifest; those that were saved before anybody
could know are marked when it is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lastgood import checkup
from lastgood.health import Sample, Sick, Watch
from lastgood.manager import Manager
from lastgood.repo import trail
from lastgood.repo.poison import FACT
from lastgood.talk import say, warn


@dataclass(slots=True)
class Guard:
    """on: False for guard="off". reason: why the state, as it is now, is poisoned; "" for a healthy one.

    not_finite: the name of a live parameter that is no number, "" if all are; asked only where the losses say so.
    """

    on: bool = False
    not_finite: Callable[[], str] = lambda: "?"
    reason: str = ""
    watch: Watch = field(default_factory=Watch)

    def begin(self, manager: Manager, checkpoint: str) -> None:
        """Training begins, from the checkpoint with this id ("" for a fresh run): know how it was until there."""
        self.reason, self.watch = "", Watch()
        if self.on and checkpoint:
            self.watch = checkup.watch(checkup.before(trail.read(manager.root), checkpoint))

    def hear(self, samples: Iterable[Sample]) -> None:
        """The next steps."""
        if self.on:
            self.watch.add(samples)

    def judge(self, manager: Manager) -> str:
        """The verdict on the state as it is now: "" or the reason. Marks what was saved since it went wrong."""
        sick = self._confirmed(self.watch.sick)
        if sick is None:
            if self.reason:
                say("the run is healthy again: checkpoints from here on are good ones")
            self.reason = ""
            return ""
        if sick.reason != self.reason:
            self.reason = sick.reason
            marked = manager.poison(sick.first, sick.reason)
            names = f" {', '.join(record.name for record in marked)} too." if marked else ""
            warn(
                f"POISONED: {sick.reason}. Checkpoints from here on are marked: no resume takes them.{names}"
                f" `lastgood -C {manager.root} bisect` finds the last healthy one"
            )
        return self.reason

    def facts(self) -> dict[str, object]:
        """What the manifest of a save made now has to say."""
        return {FACT: self.reason} if self.reason else {}

    def _confirmed(self, sick: Sick | None) -> Sick | None:
        """Numbers that are none may have been kept from the weights, by a callback or an optimizer: they are asked."""
        if sick is None or not sick.spoiled:
            return sick
        return sick if self.not_finite() else None
