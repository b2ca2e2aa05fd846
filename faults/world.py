"""What people and other processes do to a run beside its training: the rest of the world."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from lastgood import adoption, policy, pruning
from lastgood.checkout import copy, model_files
from lastgood.cli.held import held
from lastgood.errors import LastgoodError, RunLocked
from lastgood.policy import Decision, Keep
from lastgood.repo import bin, gc, leases, poison, request
from lastgood.repo.adopt import adopt
from lastgood.repo.read import records
from lastgood.run import open as open_run
from lastgood.testing import Fault
from lastgood.view import look

from faults import looking, staged
from faults.model import Model
from faults.trained import MONITOR, NEW, Trained, Wrong, settled

_now = time.time


class World(Trained):
    """The world with its command line, its evaluators, and what else happens on a disk."""

    def command(self, act: Callable[[], None], after: Model, fault: Fault | None) -> str:
        """A command that changes checkpoints; one that meets a running training leaves all as it is."""
        if self.writer is not None:
            before = settled(self.root)
            try:
                with held(self.root, False):
                    raise Wrong("I15: a command has the run that a training has")
            except RunLocked:
                if settled(self.root) != before:
                    raise Wrong("I15: who was refused changed something") from None
            return "failed"

        def alone() -> None:
            with held(self.root, False):
                act()

        done = self.go(alone, after, fault)
        if done == "crashed" or self.hindered:
            self.die()
        return done

    def prune(self, keep: Keep, *, trash: bool = True, fault: Fault | None = None) -> str:
        """By command; the newest that stays is hashed first."""
        after, bad = self.model.copy(), set()
        while (latest := next((k for k in after.mine() if k.full and k.id not in bad), None)) and latest.damage:
            bad.add(latest.id)
        if latest is None or keep.unlimited:
            return "failed"
        gone, light = after.fate(keep, frozenset(bad))
        tip = after.tip()
        if tip in gone:  # it goes or stays, by what the head says
            return "failed"
        if gone or light:
            after.remove(gone, light, undoable=trash)
        rules: dict[str, Any] = dict.fromkeys(policy.OPTIONS) | keep.options()

        def act() -> None:
            view = look(self.root)
            decisions = pruning.plan(view, rules)
            if any(d.action != "keep" for d in decisions):
                view, decisions = pruning.proven(view, rules, decisions, lambda *_: None)
            todo = gc.plan([d.record for d in decisions], decisions)
            if todo.items:
                gc.execute(self.root, todo, undoable=bin.begin(self.root, "prune") if trash else None)

        return self.command(act, after, fault)

    def strip(self, id: str, *, trash: bool = True, fault: Fault | None = None) -> str:
        """By command: neither the newest good one nor one that is held."""
        after = self.model.copy()
        kept, good = after.there[id], after.last()
        if not good or id in (good.id, after.tip()) or after.held(kept) or not kept.full or kept not in after.ours():
            return "failed"
        after.remove(set(), {id}, undoable=trash)

        def act() -> None:
            view = look(self.root)
            if (found := pruning.last_good(view, full=True)) is None or found.id != good.id:
                raise Wrong("I10: another one is taken for the last good one")
            decisions = [Decision(r, "strip", ("asked for",)) for r in view.records if r.id == id]
            todo = gc.plan(view.records, decisions)
            gc.execute(self.root, todo, undoable=bin.begin(self.root, "strip") if trash else None)

        return self.command(act, after, fault)

    def undo(self, fault: Fault | None = None) -> str:
        after = self.model.copy()
        if not after.bin:
            return "failed"
        after.undo()

        def act() -> None:
            bin.undo(self.root)

        return self.command(act, after, fault)

    def empty(self, fault: Fault | None = None) -> str:
        after = self.model.copy()
        after.bin = ()

        def act() -> None:
            bin.empty(self.root)

        return self.command(act, after, fault)

    def stock(self, steps: tuple[int, ...]) -> None:
        """A Trainer without lastgood saves."""
        for step in steps:
            self.foreign |= staged.stock(self.root, step)

    def adopt(self, fault: Fault | None = None) -> str:
        """Take in what a Trainer wrote."""
        after = self.model.copy()
        known = {record.name: record for record in records(self.root)}
        fresh = sorted(r.step for r in known.values() if f"{r.name}/trainer_state.json" in self.foreign)
        if not fresh:
            return "failed"
        if not after.run:
            after.run = NEW
        ours = after.ours()
        on_way = [k for k in ours if k.id in after.way]
        before = [k for k in ours if k.stock and k.step < fresh[0]]
        parent = max(before, key=lambda k: k.step, default=None)
        moves = not on_way or (parent is not None and parent.order == max(k.order for k in on_way))
        way = parent.way if parent else frozenset()
        for step in fresh:
            way = after.add(f"{NEW}-{step}", step, way, stock=True, loss=1 / step).way
        if moves:
            after.way = way
        there = set(self.model.there)

        def act() -> None:
            adopt(self.root, adoption.candidates(look(self.root))[0])

        done = self.command(act, after, fault)
        for kept in self.model.there.values():
            if kept.id not in there:
                name = f"checkpoint-{kept.step}"
                files = [file for file in self.foreign if file.startswith(f"{name}/")]
                self.bytes[kept.id] = {f.partition("/")[2]: self.foreign.pop(f) for f in files}  # type: ignore[misc]
                self.foreign.pop(name, None)
        return done

    # ---- what others add, whether somebody trains or not ---------------------------------

    def name(self, id: str, name: str, fault: Fault | None = None) -> str:
        """A pin ("pinned") or a tag."""
        after = self.model.copy()
        after.name(id, name, moves=name != "pinned")
        handle = self.handle(id)
        return self.go(handle.pin if name == "pinned" else lambda: handle.tag(name), after, fault)

    def unname(self, id: str, name: str, fault: Fault | None = None) -> str:
        after = self.model.copy()
        after.change(id, names=after.there[id].names - {name})
        handle = self.handle(id)
        return self.go(handle.unpin if name == "pinned" else lambda: handle.untag(name), after, fault)

    def note(self, id: str, text: str, fault: Fault | None = None) -> str:
        handle = self.handle(id)

        def act() -> None:
            handle.note(text)
            if handle.note() != text:
                raise Wrong("the note isn't there")

        return self.go(act, self.model.copy(), fault)

    def record(self, id: str, loss: float, fault: Fault | None = None) -> str:
        """A metric that comes late."""
        after = self.model.copy()
        after.change(id, loss=loss)
        handle = self.handle(id)
        return self.go(lambda: handle.record(eval_loss=loss), after, fault)

    def mark(self, id: str, reason: str, fault: Fault | None = None) -> str:
        """Poisoned, or healthy after all."""
        after = self.model.copy()
        after.change(id, poisoned=reason)
        return self.go(lambda: poison.mark(self.root, {id: reason}), after, fault)

    def lease(self, id: str, fault: Fault | None = None) -> str:
        """Somebody evaluates it. Taken in one second, dropped much later."""
        after = self.model.copy()
        after.leased |= {id}
        handle = self.handle(id)

        def act() -> None:
            taken = leases.take(self.root, id, handle.name, 86400.0)
            if taken is None:
                raise Wrong("a checkpoint that is there can't be held")
            self.leases[id] = taken

        return self.go(act, after, fault)

    def drop(self, id: str) -> None:
        self.leases.pop(id).drop()
        self.model.leased = frozenset(leases.in_force(self.root))

    def ask(self, *, stop: bool) -> None:
        """A save is asked for from outside; the training takes the request once."""
        request.ask(self.root, stop=stop)
        inbox = request.Inbox(self.root)
        word = request.STOP if stop else request.SAVE
        if (inbox.look(1e9, 1), inbox.look(2e9, 1)) != (word, ""):
            raise Wrong("what was asked for isn't heard once")

    def checkout(self, id: str) -> None:
        """A copy of its weights: what was saved, or an error."""
        kept, handle = self.model.there[id], self.handle(id)
        self.counter += 1
        target = self.outside / f"copy-{self.counter}"
        target.mkdir(parents=True)
        try:
            copy(handle.path, handle.found, model_files(handle.found), target)
        except LastgoodError as error:
            if not kept.damage:
                raise Wrong(f"I16: a good one can't be checked out: {error}") from error
            return
        if kept.damage or (target / "model.safetensors").read_bytes() != self.bytes[id]["model.safetensors"]:
            raise Wrong("I16: damaged weights were handed out")

    # ---- what happens to a directory -----------------------------------------------------

    def damage(self, id: str, kind: str) -> None:
        """Flip a bit of its weights, or cut them short."""
        place = self.handle(id).path / "model.safetensors"
        data = bytearray(place.read_bytes())
        data[-1] ^= 4
        place.write_bytes(data if kind == "flipped" else data[:-1])
        self.bytes[id]["model.safetensors"] = place.read_bytes()
        self.model.change(id, damage=kind)

    def appear(self, name: str, kind: str) -> None:
        """Something that isn't ours: a file, an empty directory, one with a file in it, or a link."""
        place = self.root / name
        if os.path.lexists(place):
            return
        if kind == "link":
            place.symlink_to(self.outside)
            self.foreign[name] = os.readlink(place)
        elif kind == "file":
            place.write_bytes(b"mine")
            self.foreign[name] = b"mine"
        else:
            place.mkdir()
            self.foreign[name] = None
            if kind == "directory":
                (place / "notes.txt").write_bytes(b"mine")
                self.foreign[f"{name}/notes.txt"] = b"mine"

    def shift_times(self, seconds: float) -> None:
        """Every file is from another year."""
        for path in self.root.rglob("*"):
            status = os.lstat(path)
            when = max(0.0, status.st_mtime + seconds)
            os.utime(path, (when, when), follow_symlinks=False)

    def shift_clock(self, seconds: float) -> None:
        """Somebody sets the clock of the machine."""
        self.ahead += seconds
        time.time = lambda: _now() + self.ahead

    # ---- looking -------------------------------------------------------------------------

    def look(self) -> None:
        """What everybody is told is what the model says, and asking changes nothing (I1, I6, I18)."""
        before = looking.snapshot(self.root)
        looking.answers(self.root, self.model, Keep(**MONITOR))
        if looking.snapshot(self.root) != before:
            raise Wrong("I6: looking changed something")

    def handle(self, id: str) -> Any:
        return next(found for found in open_run(self.root).checkpoints if found.id == id)

    def end(self) -> None:
        """Let go of everything."""
        time.time = _now
        for taken in self.leases.values():
            taken.drop()
        if self.writer is not None:
            self.writer.close()
            self.die()
