"""Which of a stock Trainer's checkpoints can be adopted, in chains: those of one run belong together."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lastgood.format.manifest import safe_name
from lastgood.layouts import trainer
from lastgood.layouts.found import Found
from lastgood.model import TRAINERS
from lastgood.repo.adopt import Candidate, Chain
from lastgood.repo.layout import step_of
from lastgood.view import View


def candidates(view: View, only: Collection[str] | None = None) -> tuple[list[Chain], list[tuple[str, str]]]:
    """(chains of checkpoints to adopt, (name, reason) of those left alone); only: no others are even read."""
    skipped: list[tuple[str, str]] = []
    good: dict[Path, Found] = {}
    adopted = {view.path(r): r for r in view.records if r.ours and r.id and r.layout in TRAINERS}
    stocks = [
        trainer.Stock(path=path, step=record.step, parts=(), history=trainer.history(path), problems=())
        for path, record in adopted.items()
    ]
    for record in view.records:
        if record.name not in view.found or (only is not None and record.name not in only):
            continue
        item = view.found[record.name]
        if item.layout not in TRAINERS or step_of(item.path.name) is None:
            skipped.append((record.name, f"written by {item.layout}: `lastgood import` brings it in"))
            continue
        unsafe = [name for name in item.files if not safe_name(name)]
        stock = trainer.inspect(item.path)
        faults = (*stock.problems, *(f"{name!r} can't be the name of a file in a checkpoint" for name in unsafe))
        if faults or item.state == "incomplete":
            skipped.append((record.name, "; ".join(faults) or item.problem))
            continue
        good[item.path] = item
        stocks.append(stock)
    chains = []
    for group in sorted(trainer.chain(stocks), key=lambda group: group[-1].step):
        items = [_candidate(good[stock.path]) for stock in group if stock.path in good]
        if items:
            before = [adopted[s.path] for s in group if s.path in adopted and s.step < items[0].step]
            chains.append(Chain(items, before[-1] if before else None))
    return chains, skipped


def _candidate(item: Found) -> Candidate:
    return Candidate(
        path=item.path,
        step=item.step,
        layout=item.layout,
        parts=item.parts if item.state == "full" else {"model": tuple(item.files)},
        files=list(item.files),
        created=item.created,
        metrics=item.metrics,
        arguments=trainer.arguments(item.path),
        loss=item.loss,
    )
