"""Any sequence of operations, with crashes, errors and clocks that jump, against a model of what has to be there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lastgood.policy import Keep
from lastgood.testing import Fault

from faults.trained import MONITOR
from faults.world import World

YEAR = 365.25 * 86400
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

FAULTS = st.none() | st.builds(
    Fault,
    st.integers(1, 45),
    st.sampled_from(["crash-before", "crash-torn", "crash-after", "EIO", "ENOSPC", "EDQUOT", "EMFILE"]),
    st.booleans(),
)
COUNTS = st.none() | st.integers(1, 3)
POLICIES = st.one_of(
    st.builds(Keep, last=COUNTS, best=COUNTS, every=COUNTS, full=COUNTS, **{k: st.just(v) for k, v in MONITOR.items()}),
    st.builds(Keep, total=st.integers(1, 4), full=COUNTS, **{k: st.just(v) for k, v in MONITOR.items()}),
)
NAMES = ["notes.txt", "checkpoint-best", "checkpoint-3", "checkpoint-12", "runs", "checkpoint-4.old", "7"]


class Machine(RuleBasedStateMachine):
    """Picks are numbers, which become one of the checkpoints that are there."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        root, outside = Path(self.folder.name, "run"), Path(self.folder.name, "outside")
        outside.mkdir()
        root.mkdir()
        self.world = World(root, outside)
        self.top = 0

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()
            self.folder.cleanup()

    def any(self, pick: int) -> Any:
        ours = self.world.model.ours()
        return ours[pick % len(ours)]

    def has_ours(self) -> bool:
        return hasattr(self, "world") and bool(self.world.model.ours())

    def trains(self) -> bool:
        return self.world.writer is not None

    # ---- a training ----------------------------------------------------------------------

    @rule(fault=FAULTS)
    def open(self, fault: Fault | None) -> None:
        self.world.open(fault=fault)

    @rule(fault=FAULTS)
    @precondition(lambda self: self.has_ours())
    def open_afresh(self, fault: Fault | None) -> None:
        self.world.open(fresh=True, fault=fault)

    @rule(pick=st.integers(0, 9), fault=FAULTS)
    @precondition(lambda self: any(k.full and not k.damage for k in self.world.model.ours()))
    def go_back(self, pick: int, fault: Fault | None) -> None:
        good = [k for k in self.world.model.ours() if k.full and not k.damage]
        self.world.open(back_to=good[pick % len(good)].id, fault=fault)

    @rule(fault=FAULTS)
    @precondition(lambda self: self.trains())
    def close(self, fault: Fault | None) -> None:
        self.world.close(fault)

    def ready(self) -> None:
        if not self.trains():
            self.world.open()

    @rule(ahead=st.integers(1, 3), fault=FAULTS, full=st.booleans() | st.just(True))
    def save(self, ahead: int, fault: Fault | None, full: bool) -> None:
        self.ready()
        self.world.save(self.forward(ahead), fault=fault, full=full)

    def forward(self, ahead: int) -> int:
        steps = [k.step for k in self.world.model.ours() if k.id in self.world.model.way and not k.stock]
        return max(steps, default=0) + ahead

    @rule(ahead=st.integers(1, 2), keep=POLICIES, fault=FAULTS)
    def save_and_retain(self, ahead: int, keep: Keep, fault: Fault | None) -> None:
        self.ready()
        self.world.save(self.forward(ahead), keep, fault=fault)

    @rule(pick=st.integers(0, 9), fault=FAULTS)
    @precondition(lambda self: self.has_ours())
    def save_the_same_step_again(self, pick: int, fault: Fault | None) -> None:
        self.ready()
        if self.has_ours():
            self.world.save(self.any(pick).step, fault=fault)

    @rule(fault=FAULTS, keep=st.none() | POLICIES)
    def save_a_poisoned_one(self, fault: Fault | None, keep: Keep | None) -> None:
        self.ready()
        self.world.save(self.forward(1), keep, fault=fault, poisoned="its loss is NaN")

    @rule(takeover=st.booleans())
    @precondition(lambda self: self.trains())
    def a_second_writer(self, takeover: bool) -> None:
        self.world.second_writer(takeover=takeover)

    @rule(pick=st.integers(0, 9), kind=st.sampled_from(["flipped", "cut"]))
    @precondition(lambda self: self.has_ours())
    def damage(self, pick: int, kind: str) -> None:
        if not self.any(pick).damage:  # the same bit flipped again would make it good
            self.world.damage(self.any(pick).id, kind)

    @rule(fault=FAULTS)
    def quarantine(self, fault: Fault | None) -> None:
        self.ready()
        self.world.quarantine(fault)

    # ---- commands ------------------------------------------------------------------------

    @rule(keep=POLICIES, trash=st.booleans(), fault=FAULTS)
    def prune(self, keep: Keep, trash: bool, fault: Fault | None) -> None:
        self.free()
        self.world.prune(keep, trash=trash, fault=fault)

    @rule(keep=POLICIES)
    @precondition(lambda self: self.trains())
    def prune_while_somebody_trains(self, keep: Keep) -> None:
        self.world.prune(keep)

    @rule(pick=st.integers(0, 9), trash=st.booleans(), fault=FAULTS)
    @precondition(lambda self: self.has_ours())
    def strip(self, pick: int, trash: bool, fault: Fault | None) -> None:
        self.free()
        self.world.strip(self.any(pick).id, trash=trash, fault=fault)

    @rule(fault=FAULTS)
    @precondition(lambda self: bool(self.world.model.bin))
    def undo(self, fault: Fault | None) -> None:
        self.free()
        self.world.undo(fault)

    @rule(fault=FAULTS)
    @precondition(lambda self: bool(self.world.model.bin))
    def empty(self, fault: Fault | None) -> None:
        self.free()
        self.world.empty(fault)

    @rule(count=st.integers(1, 2), fault=FAULTS)
    def adopt(self, count: int, fault: Fault | None) -> None:
        self.free()
        self.world.stock(tuple(self.top + 100 + 10 * n for n in range(count)))
        self.top += 10 * count
        self.world.adopt(fault)

    def free(self) -> None:
        if self.trains():
            self.world.close()

    # ---- others --------------------------------------------------------------------------

    @rule(pick=st.integers(0, 9), name=st.sampled_from(["pinned", "release", "v1"]), fault=FAULTS)
    @precondition(lambda self: self.has_ours())
    def name(self, pick: int, name: str, fault: Fault | None) -> None:
        self.world.name(self.any(pick).id, name, fault)

    @rule(pick=st.integers(0, 9), fault=FAULTS)
    @precondition(lambda self: any(k.names for k in self.world.model.ours()))
    def unname(self, pick: int, fault: Fault | None) -> None:
        named = [(k.id, name) for k in self.world.model.ours() for name in sorted(k.names)]
        self.world.unname(*named[pick % len(named)], fault)

    @rule(pick=st.integers(0, 9), text=st.sampled_from(["good one", "", "später"]), fault=FAULTS)
    @precondition(lambda self: self.has_ours())
    def note(self, pick: int, text: str, fault: Fault | None) -> None:
        self.world.note(self.any(pick).id, text, fault)

    @rule(pick=st.integers(0, 9), loss=st.sampled_from([0.5, 1.0, 2.0, float("inf")]), fault=FAULTS)
    @precondition(lambda self: self.has_ours())
    def record(self, pick: int, loss: float, fault: Fault | None) -> None:
        self.world.record(self.any(pick).id, loss, fault)

    @rule(pick=st.integers(0, 9), reason=st.sampled_from(["loss blew up", ""]), fault=FAULTS)
    @precondition(lambda self: self.has_ours())
    def mark(self, pick: int, reason: str, fault: Fault | None) -> None:
        self.world.mark(self.any(pick).id, reason, fault)

    @rule(pick=st.integers(0, 9), fault=FAULTS)
    @precondition(lambda self: self.has_ours())
    def lease(self, pick: int, fault: Fault | None) -> None:
        id = self.any(pick).id
        if id not in self.world.leases:
            self.world.lease(id, fault)

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: bool(self.world.leases))
    def drop(self, pick: int) -> None:
        self.world.drop(sorted(self.world.leases)[pick % len(self.world.leases)])

    @rule(stop=st.booleans())
    @precondition(lambda self: self.trains())
    def ask(self, stop: bool) -> None:
        self.world.ask(stop=stop)

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.has_ours())
    def checkout(self, pick: int) -> None:
        kept = self.any(pick)
        self.world.checkout(kept.id)

    # ---- what happens to a directory -----------------------------------------------------

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(["file", "empty", "directory", "link"]))
    def appear(self, name: str, kind: str) -> None:
        self.world.appear(name, kind)

    @rule(years=st.sampled_from([-1, 1]))
    def shift_times(self, years: int) -> None:
        self.world.shift_times(years * YEAR)

    @rule(years=st.sampled_from([-1, 1]))
    def shift_clock(self, years: int) -> None:
        self.world.shift_clock(years * YEAR)

    @invariant()
    def look(self) -> None:
        if hasattr(self, "world"):
            self.world.look()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
