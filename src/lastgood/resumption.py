"""What a run resumes from, looked at from outside: the checkpoint, and why not the others. Nothing is changed.

A live run decides by the same order with `Manager.find`, which also moves what is damaged out of the way.
"""

from __future__ import annotations

from lastgood import policy
from lastgood.layouts import trainer
from lastgood.layouts.progress import one_run
from lastgood.manager import UNADOPTED
from lastgood.model import TRAINERS, Record
from lastgood.rev import resolve
from lastgood.view import View

LAST = ("last", "latest", "auto")


def choose(view: View, start: str, *, full: bool) -> tuple[Record | None, list[tuple[str, str]]]:
    """(the checkpoint that a resume would take, (name, reason) of those passed over): what the live resume does."""
    skipped = [(r.name, r.problem) for r in view.records if r.state == "incomplete"]
    if start not in LAST:
        candidates = _asked_for(view, start)
    elif view.layout in TRAINERS and not any(r.id and r.ours for r in view.records):
        return _stock(view, full)
    else:
        own = sorted((r for r in view.records if r.ours and r.current), key=lambda r: -r.seq)
        skipped += [(r.name, "only its weights were kept") for r in own if r.state == "weights"]
        candidates = [r for r in own if r.state == "full"]
    for record in candidates:
        faults = ("only its weights were kept",) if record.state == "weights" else view.problems(record, full=full)
        if not faults:
            newer = {r.name: r.step for r in view.records}
            skipped += [(r.name, UNADOPTED) for r in newer_stock(view, record)] if start in LAST else []
            return record, [s for s in skipped if newer.get(s[0], 0) >= record.step]
        skipped.append((record.name, "; ".join(faults[:3])))
    return None, skipped


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
        return list(policy.ranking(view.records, view.monitor, view.mode))
    return [resolve(start, view.records, monitor=view.monitor, mode=view.mode)]


def _stock(view: View, full: bool) -> tuple[Record | None, list[tuple[str, str]]]:
    """The newest usable one of a run that nobody manages; the older ones are only asked whether they are of that run.

    Raises NoCheckpoint where two runs share the directory.
    """
    order = sorted((r for r in view.records if r.layout in TRAINERS), key=lambda r: -r.step)
    skipped: list[tuple[str, str]] = []
    for place, record in enumerate(order):
        path = view.path(record)
        reason = "; ".join(trainer.problems(path, full=full)) or trainer.lacking(path)
        if not reason:
            if one_run(path, [view.path(older) for older in order[place + 1 :]]):
                return record, skipped
            return _exactly(view)
        skipped.append((record.name, reason))
    return None, skipped


def _exactly(view: View) -> tuple[Record | None, list[tuple[str, str]]]:
    """The same by reading everything: some log doesn't begin like the others."""
    names = {record.name: record for record in view.records}
    stocks = [trainer.inspect(view.root / name) for name in view.found if names[name].layout in TRAINERS]
    newest, skipped = trainer.choose(view.root, stocks)
    return names[newest.path.name], [s for s in skipped if names[s[0]].step > newest.step]
