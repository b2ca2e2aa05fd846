"""What is done to a run: everything that lastgood can do, each as short as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lastgood import adoption, policy
from lastgood.background import Background
from lastgood.checkout import copy, model_files
from lastgood.cli.held import held
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Decision, Keep
from lastgood.repo import adopt, after, bin, gc, leases, metrics, pins, poison, request, trail
from lastgood.repo.quarantine import quarantine
from lastgood.repo.read import records
from lastgood.store.appear import appearing
from lastgood.view import look

from faults.small import manager, save


def first_save(root: Path) -> None:
    """The first one of a run."""
    made = manager(root)
    save(made, 1)
    made.close()


def next_save(root: Path) -> None:
    """One more."""
    made = manager(root)
    save(made, 4)
    made.close()


def save_and_prune(root: Path) -> None:
    """Two stay."""
    made = manager(root, last=2)
    save(made, 4)
    made.close()


def save_and_strip(root: Path) -> None:
    """Three stay, one of them with full state."""
    made = manager(root, last=3, full=1)
    save(made, 4)
    made.close()


def save_behind(root: Path) -> None:
    """By the thread that writes while training goes on."""
    _behind(manager(root))


def save_and_prune_behind(root: Path) -> None:
    """And what it deletes."""
    _behind(manager(root, last=2))


def _behind(made: Manager) -> None:
    made.background = Background()
    try:
        save(made, 4)
        made.settle()
    finally:
        made.close()


def save_again(root: Path) -> None:
    """A step that is there already, on the same branch."""
    made = manager(root)
    save(made, 3)
    made.close()


def save_on_a_branch(root: Path) -> None:
    """From step 1 on, another step 2."""
    made = Manager(root=root, on_error="raise")
    made.open()
    made.begin_from(next(record for record in made.records() if record.step == 1))
    save(made, 2)
    made.close()


def go_back(root: Path) -> None:
    """To step 1, and no further."""
    made = Manager(root=root, on_error="raise")
    made.open()
    made.begin_from(next(record for record in made.records() if record.step == 1))
    made.close()


def start_again(root: Path) -> None:
    """A new run where an old one is."""
    made = Manager(root=root, on_error="raise")
    made.open()
    made.begin_fresh()
    save(made, 5)
    made.close()


def set_aside(root: Path) -> None:
    """One goes to the quarantine, whatever the reason."""
    made = manager(root)
    try:
        quarantine(made.door, "checkpoint-3")
    finally:
        made.close()


def recover(root: Path) -> None:
    """Open, and clean up."""
    manager(root).close()


def note_down(root: Path) -> None:
    """What a training writes between saves: the trail, the state after an evaluation, a late mark."""
    made = manager(root)
    record = save(made, 4)
    assert record is not None
    with suppress(OSError):  # a training does without
        life = trail.begin(root, run=made.run, start=3, checkpoint="")
        trail.append(root, [trail.Entry(step=4, life=life, loss=0.25)])
    after.write(root, record.id, {"format": 1})
    made.record(4, {"eval_loss": 0.5})
    made.poison(4, "a spike")
    made.close()


def nth(root: Path, index: int) -> Record:
    """One of the run's checkpoints, as every verb looks for it: sure of what it sees."""
    return records(root, sure=True)[index]


def tag(root: Path) -> None:
    """A name for step 2."""
    pins.add(root, nth(root, 1).id, "candidate")


def move_tag(root: Path) -> None:
    """From step 1 to step 3."""
    pins.add(root, nth(root, 2).id, "paper")


def untag(root: Path) -> None:
    """One of two names goes."""
    pins.remove(root, nth(root, 0).id, "paper")


def note(root: Path) -> None:
    """Another text."""
    pins.write_note(root, nth(root, 1).id, "after the spike")


def record_metric(root: Path) -> None:
    """A late value."""
    metrics.record(root, nth(root, 1).id, 2, {"mmlu": 0.6})


def mark(root: Path) -> None:
    """Step 2 was unhealthy."""
    poison.mark(root, {nth(root, 1).id: "the loss was NaN"})


def take_in(root: Path) -> None:
    """Adopt what a Trainer wrote."""
    with held(root, False):
        adopt.adopt(root, adoption.candidates(look(root, sure=True))[0])


def prune_two(root: Path) -> None:
    """By command: one stays, the others can be brought back."""
    _prune(root, Keep(last=1))


def prune_mixed(root: Path) -> None:
    """By command: one goes, one is stripped."""
    _prune(root, Keep(last=2, full=1))


def prune_now(root: Path) -> None:
    """By command, and for good."""
    with held(root, False):
        found = records(root, sure=True)
        gc.execute(root, gc.plan(found, policy.decide(found, Keep(last=1), protect=look(root, sure=True).protect)))


def strip_two(root: Path) -> None:
    """By command."""
    some = [record for record in records(root, sure=True) if record.ours and record.state == "full"][:-1]
    _by_command(root, [Decision(record, "strip", ("asked for",)) for record in some], "strip")


def undo(root: Path) -> None:
    """Bring back what the last command removed."""
    with held(root, False):
        bin.undo(root)


def empty(root: Path) -> None:
    """Free what could be brought back."""
    with held(root, False):
        bin.empty(root)


def check_out(root: Path) -> None:
    """A copy of step 2 beside the run."""
    record = nth(root, 1)
    with appearing(root / "copies" / "copy") as staging:
        copy(root / record.name, record, model_files(record), staging)


def evaluate(root: Path) -> None:
    """Hold one while it is being looked at."""
    record = nth(root, 0)
    lease = leases.take(root, record.id, record.name, 600)
    assert lease is not None
    try:
        lease.renew()
    finally:
        lease.drop()


def answer(root: Path) -> None:
    """Take the request, and save."""
    made = manager(root)
    request.Inbox(root).look(10.0, 4)
    save(made, 4)
    made.close()


def _prune(root: Path, keep: Keep) -> None:
    found = records(root, sure=True)
    _by_command(root, policy.decide(found, keep, protect=look(root, sure=True).protect), "prune")


def _by_command(root: Path, decisions: Sequence[Decision], what: str) -> None:
    with held(root, False):
        todo = gc.plan(records(root, sure=True), decisions)
        gc.execute(root, todo, undoable=bin.begin(root, what))
