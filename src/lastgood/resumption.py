"""What a run resumes from, looked at from outside: the checkpoint, and why not the others. Nothing is changed."""

from __future__ import annotations

from lastgood.errors import NoCheckpoint
from lastgood.layouts import trainer
from lastgood.layouts.progress import one_run
from lastgood.model import TRAINERS, Record
from lastgood.recovery import LOST_HEAD, UNADOPTED, first_good, in_order
from lastgood.repo.run import lost_head
from lastgood.rev import resolve
from lastgood.view import View

# Among a run's own checkpoints the live resume takes the same one, by the same functions. It differs where it has to:
# - it holds the lock and moves what is damaged out of the way; from outside a husk may be a save in progress;
# - it refuses an adopted checkpoint of FSDP or DeepSpeed, which the set-up that wrote it can go on from;
# - it names newer stock checkpoints unread, for reading them would delay the start;
# - it takes a step, or the best, from its own; here these may name any other too, to be resumed from by its path.

LAST = ("last", "latest", "auto")
_WEIGHTS = "only its weights were kept"


def choose(view: View, start: str, *, full: bool) -> tuple[Record | None, list[tuple[str, str]]]:
    """(the checkpoint that a resume would take, (name, reason) of those passed over): what the live resume does."""
    skipped = [(r.name, r.problem) for r in view.records if r.state == "incomplete"]
    if start not in LAST:
        candidates = _asked_for(view, start)
    elif _is_stock(view):
        return _stock(view, full)
    else:
        if lost := lost_head(view.root):
            raise NoCheckpoint(lost, hint=LOST_HEAD)
        own = in_order(view.records, "last")
        skipped += [(r.name, _WEIGHTS) for r in own if r.state == "weights"]
        candidates = [r for r in own if r.state == "full"]
    named = start not in (*LAST, "best")
    choice = first_good(
        candidates, lambda record: view.problems(record, full=full), weights=_WEIGHTS, fall_back=not named
    )
    skipped += choice.skipped
    record = choice.record
    if record is None:
        return None, skipped
    if start in LAST:
        skipped += [(r.name, UNADOPTED) for r in newer_stock(view, record)]
    steps = {r.name: r.step for r in view.records}
    return record, [(name, why) for name, why in skipped if steps.get(name, 0) >= record.step]


def newer_stock(view: View, record: Record) -> list[Record]:
    """Complete checkpoints that a Trainer wrote without lastgood, further than `record`; the newest last."""
    stock = [r for r in view.records if not r.id and r.ours and r.layout in TRAINERS and r.step > record.step]
    return sorted(stock, key=lambda r: r.step)


def continued(view: View, record: Record) -> Record:
    """The newest intact checkpoint with which a stock Trainer went on from an adopted one: else that one."""
    if record.layout not in TRAINERS:
        return record
    before = trainer.history(view.path(record))
    for later in reversed(newer_stock(view, record)):
        path = view.path(later)
        item = trainer.inspect(path)
        if not item.problems and not trainer.lacking(path) and item.history[: len(before)] == before:
            return later
    return record


def _asked_for(view: View, start: str) -> list[Record]:
    if start == "best" and view.monitor is not None and view.mode is not None:
        return list(in_order(view.records, "best", monitor=view.monitor, mode=view.mode))
    return [resolve(start, view.records, monitor=view.monitor, mode=view.mode)]


def _is_stock(view: View) -> bool:
    """Whether there is nothing to go on from but what a stock Trainer wrote; husks of managed saves don't count."""
    tools = sorted({item.layout for item in view.found.values()})
    return bool(tools) and tools[0] in TRAINERS and not any(r.id and r.ours for r in view.records)


def _stock(view: View, full: bool) -> tuple[Record | None, list[tuple[str, str]]]:
    """The newest usable one of a run that nobody manages; the older ones are only asked whether they are of that run.

    Raises NoCheckpoint where two runs share the directory.
    """
    names = {record.name: record for record in view.records}
    skipped = [(r.name, r.problem) for r in view.records if r.state == "incomplete" and r.name not in view.found]
    order = sorted((names[name] for name in view.found if names[name].layout in TRAINERS), key=lambda r: -r.step)
    for place, record in enumerate(order):
        path = view.path(record)
        reason = "; ".join(trainer.problems(path, full=full)) or trainer.lacking(path)
        if not reason:
            alone = one_run(path, [view.path(older) for older in order[place + 1 :]])
            taken = record if alone else _exactly(view)
            return taken, [(name, why) for name, why in skipped if names[name].step > taken.step]
        skipped.append((record.name, reason))
    return None, skipped


def _exactly(view: View) -> Record:
    """The same by reading everything, for some log doesn't begin like the others. Raises NoCheckpoint."""
    names = {record.name: record for record in view.records}
    stocks = [trainer.inspect(view.root / name) for name, item in view.found.items() if item.layout in TRAINERS]
    return names[trainer.choose(view.root, stocks)[0].path.name]
