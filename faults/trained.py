"""A run directory and the model beside it: each operation is done to both, and what is on disk has to agree.

An operation that was cut short, by a crash or an error, may have done any part of its work: each thing that it changes
is as it was, or as it would be. Whatever else is there stays as it is, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lastgood.errors import LastgoodError, NoCheckpoint, RunLocked
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import leases, poison
from lastgood.repo.layout import HIDDEN
from lastgood.testing import Crash, Fault, Faulty, using

from faults import looking, staged
from faults.model import Model

NEW = "new"
"""What an operation brings is called so, with its step, until its id is known."""
MONITOR: dict[str, Any] = {"monitor": "eval_loss", "mode": "min"}


class Wrong(AssertionError):
    """What is on disk is not what was promised."""


class Trained:
    """One run. Operations return "done", "failed" (an error that lastgood names) or "crashed"; Wrong is raised."""

    def __init__(self, root: Path, outside: Path) -> None:
        self.root, self.outside = root, outside
        self.model = Model()
        self.writer: Manager | None = None
        self.bytes: dict[str, dict[str, bytes]] = {}
        self.foreign: dict[str, bytes | str | None] = {}
        self.leases: dict[str, leases.Held] = {}
        self.calls = self.counter = 0
        self.ahead = 0.0
        self.hindered = False
        """Whether a fault got into the last operation."""

    # ---- doing both ----------------------------------------------------------------------

    def go(
        self, act: Callable[[], None], after: Model, fault: Fault | None, ways: Iterable[frozenset[str]] = ()
    ) -> str:
        """Do it, with this fault, and compare the disk with what must be there."""
        outcome = "done"
        self.counter += 1
        disk = Faulty(fault, seed=str(self.counter))
        with using(disk):
            try:
                act()
            except Crash:
                outcome = "crashed"
            except (LastgoodError, OSError) as error:
                outcome = "failed"
                if not disk.struck:
                    raise Wrong(f"it failed without a fault: {error!r}") from error
        self.calls, self.hindered = len(disk.calls), disk.struck
        if outcome == "crashed":
            self.die()
        self.settle(after, exact=not disk.struck, ways=ways)
        return outcome

    def die(self) -> None:
        """The process is gone, and its lock with it."""
        if self.writer is not None and self.writer._lock is not None:
            self.writer._lock._lock.release(force=True)  # as the kernel does; whatever it wrote of itself stays
        self.writer = None

    def settle(self, after: Model, *, exact: bool, ways: Iterable[frozenset[str]] = ()) -> None:
        """Compare, and take what is there for what was meant from now on."""
        self.model = looking.compare(self.root, self.model, after, exact=exact, ways=ways)
        looking.bytes_are(self.root, self.model, self.bytes)
        looking.foreign_is(self.root, self.foreign)

    # ---- a writer ------------------------------------------------------------------------

    def open(self, *, back_to: str | None = None, fresh: bool = False, fault: Fault | None = None) -> str:
        """Become the writer (a new process) and go on: from the newest good one, from another one, or afresh."""
        after = self.model.copy()
        done = self.go(self._opening(after, back_to, fresh), after, fault)
        if done != "done":
            self.die()
        if not self.hindered:
            looking.swept(self.root, self.model)
        return done

    def _opening(self, after: Model, back_to: str | None, fresh: bool) -> Callable[[], None]:
        start = after.last() if back_to is None else after.there[back_to]
        fresh = fresh or start is None
        if start is None or fresh:
            after.run, after.way = NEW, frozenset()
        else:
            after.way = start.way

        def act() -> None:
            if self.writer is not None:
                self.writer.close()
            self.writer = Manager(root=self.root, keep=Keep(**MONITOR), on_error="raise")
            self.writer.open()
            if fresh:
                self.writer.begin_fresh()
            else:
                named = next((r for r in self.writer.records() if r.id == back_to), None)
                self.writer.begin_from(named or self.writer.find("last").record)

        return act

    def train(
        self, step: int, keep: Keep | None = None, *, back_to: str | None = None, fault: Fault | None = None
    ) -> str:
        """A whole process: open, quarantine what is damaged, go on, save, let a policy decide, close."""
        after = self.model.copy()
        opening = self._opening(after, back_to, False)
        self._quarantined(after)
        ways = [after.way]
        saving, weights = self._saving(after, step, keep, {})

        def act() -> None:
            opening()
            assert self.writer is not None
            _clear(self.writer)
            saving(self.writer)
            self.writer.close()

        before = self.model
        done = self.go(act, after, fault, ways)
        self.die()
        self._saved(before, weights, full=True)
        return done

    def close(self, fault: Fault | None = None) -> str:
        assert self.writer is not None
        done = self.go(self.writer.close, self.model.copy(), fault)
        self.die()
        return done

    def save(self, step: int, keep: Keep | None = None, fault: Fault | None = None, **facts: Any) -> str:
        """Save, and let a policy decide what stays. facts: full, poisoned, of the model."""
        assert self.writer is not None
        after, writer, before = self.model.copy(), self.writer, self.model
        saving, weights = self._saving(after, step, keep, facts)
        done = self.go(lambda: saving(writer), after, fault)
        self._saved(before, weights, full=facts.get("full", True))
        return done

    def _saving(
        self, after: Model, step: int, keep: Keep | None, facts: dict[str, Any]
    ) -> tuple[Callable[[Manager], None], int]:
        weights = self.counter + 1
        after.save(f"{NEW}-{step}", step, **facts)
        if keep is not None:
            after.remove(*after.fate(keep), undoable=False)
        full, sick = facts.get("full", True), facts.get("poisoned", "")

        def act(writer: Manager) -> None:
            told = {poison.FACT: sick} if sick else {}
            stage = staged.writer(weights, full=full)
            writer.save(step, stage, estimate=1, environment={}, arguments={}, facts=told)
            if keep is not None:
                writer.keep = keep
                writer.retain()

        return act, weights

    def _saved(self, before: Model, weights: int, *, full: bool) -> None:
        new = [k for k in self.model.there if k not in before.there]
        if not new and (before.there.keys() - self.model.there.keys()):
            raise Wrong("I3, I10: a save that came to nothing let others go")
        for id in new:
            self.bytes[id] = staged.content(weights, full=full)

    def quarantine(self, fault: Fault | None = None) -> str:
        """What fails verification when the newest is looked for goes out of the way."""
        assert self.writer is not None
        after, writer = self.model.copy(), self.writer
        self._quarantined(after)
        return self.go(lambda: _clear(writer), after, fault)

    def _quarantined(self, after: Model) -> None:
        good = after.last()
        newer = [k for k in after.mine() if k.damage == "flipped" and k.full and (not good or k.order > good.order)]
        cut = [k for k in after.there.values() if k.damage == "cut"]
        for kept in [*newer, *cut] if good else []:
            if kept.run == after.run:
                del after.there[kept.id]

    def second_writer(self, *, takeover: bool) -> None:
        """Another process wants the run: it is refused, or fences off the one that has it."""
        assert self.writer is not None
        first, before = self.writer, settled(self.root)
        second = Manager(root=self.root, keep=Keep(**MONITOR), on_error="raise")
        if not takeover:
            try:
                second.open()
            except RunLocked:
                if settled(self.root) != before:
                    raise Wrong("I15: who was refused changed something") from None
                return
            raise Wrong("I15: two writers at once")
        second.open(takeover=True)
        for act in (first.retain, lambda: first.save(1, _nothing, estimate=1, environment={}, arguments={}, facts={})):
            try:
                act()
            except RunLocked:
                continue
            raise Wrong("I15: who was fenced off goes on")
        first.close()
        self.writer = second
        after = self.model.copy()
        start = after.last()
        if start is None:
            after.run, after.way = NEW, frozenset()
            second.begin_fresh()
        else:
            after.way = start.way
            second.begin_from(second.find("last").record)
        self.settle(after, exact=True)

    # ---- commands, without a writer ------------------------------------------------------


def _clear(writer: Manager) -> None:
    with suppress(NoCheckpoint):
        writer.quarantine(writer.find("last").damaged)


def _nothing(_: object) -> None:
    raise Wrong("I15: who was fenced off writes")


def settled(root: Path) -> looking.Snapshot:
    """All but the time of the hidden directory: whoever tries the lock makes a directory there and removes it."""
    return {name: what for name, what in looking.snapshot(root).items() if name != HIDDEN}
