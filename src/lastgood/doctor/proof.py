"""What `prove` found, in words and as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from lastgood.doctor.divergence import Divergence, equal, in_common, shown
from lastgood.repo.trail import Entry

AROUND = 3
"""Rows of the table before the first difference, and after it."""
NEEDS = ": its Trainer has to be managed, or take its directory from {run}"


class Row(msgspec.Struct, frozen=True):
    """One step that was recorded and repeated."""

    step: int
    was: Entry
    now: Entry
    same: bool


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """outcome: "same" or "diverged", or "failed": the command recorded no step to compare, or broke off while all
    was the same.

    compared: steps (of a log: rows) that both have, of the `steps` that were asked for and recorded. source: "trail",
    every step with its data, or "log", what the Trainer logged. status: the command's, or minus the signal that ended
    it. output: the last lines that it printed. kept: the scratch directory, if it was to stay. wrote: checkpoints of
    the run itself that were written to meanwhile.
    """

    checkpoint: str
    step: int
    outcome: Literal["same", "diverged", "failed"]
    steps: int
    compared: int
    source: Literal["trail", "log"]
    status: int
    divergence: Divergence | None = None
    rows: tuple[Row, ...] = ()
    output: tuple[str, ...] = ()
    kept: str | None = None
    wrote: tuple[str, ...] = ()
    rtol: float = 0.0

    @property
    def code(self) -> int:
        """Exit status: 0 same, 1 diverged or failed."""
        return 0 if self.outcome == "same" else 1

    def lines(self) -> tuple[str, ...]:
        """For people."""
        told = [self._verdict()]
        if self.divergence is not None:
            told += [f"  {self.divergence.means}", *self._table()]
            if not self.divergence.agreed:
                told.append("  this is the first step after the resume that was recorded")
        elif self.outcome == "same" and self.compared < self.steps:
            told.append(f"  the command ended there: {self.steps - self.compared} more were recorded")
        if self.outcome == "failed":
            told += [f"  | {line}" for line in self.output]
            if not self.compared and self.status == 0 and not self.wrote:
                told.append(f"  it trained nothing there{NEEDS}")
        if self.wrote:
            told.append(f"  the command wrote into the run itself, not into the copy: {', '.join(self.wrote)}{NEEDS}")
        if self.kept is not None:
            told.append(f"  kept: {self.kept}")
        return tuple(told)

    def _verdict(self) -> str:
        if self.outcome == "failed":
            what = f"ended with status {self.status}" if self.status >= 0 else f"was killed by signal {-self.status}"
            if not self.compared:
                return f"{self.checkpoint}: nothing to compare: the command {what} before such a step"
            return f"{self.checkpoint}: the command {what} after {self.compared} equal steps of {self.steps}"
        if self.divergence is not None:
            return f"{self.checkpoint}: {self.divergence}"
        many = f"the {self.compared} steps after it are" if self.compared != 1 else "the step after it is"
        if self.source == "log":
            many = f"the {self.compared} logged rows after it are" if self.compared != 1 else "the row after it is"
        how = f"the same within {self.rtol:g}" if self.rtol else "bit for bit the same"
        data = ", data" if any(row.was.batch and row.now.batch for row in self.rows) else ""
        return f"{self.checkpoint}: {many} {how} (loss, gradient norm{data})"

    def _table(self) -> list[str]:
        assert self.divergence is not None
        at = next(i for i, row in enumerate(self.rows) if row.step == self.divergence.step)
        cells = [("step", "loss", "now", "grad norm", "now", "batch", "now", "")]
        for row in self.rows[max(0, at - AROUND) : at + AROUND + 1]:
            cells.append(
                (
                    str(row.step),
                    shown(row.was.loss),
                    shown(row.now.loss),
                    shown(row.was.grad_norm),
                    shown(row.now.grad_norm),
                    shown(row.was.batch[:8]),
                    shown(row.now.batch[:8]),
                    "" if row.same else "differs",
                )
            )
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        return ["  " + "  ".join(map(str.rjust, line, widths)).rstrip() for line in cells]


def side_by_side(was: Sequence[Entry], now: Sequence[Entry], rtol: float) -> tuple[Row, ...]:
    """The steps that both recorded."""
    repeated = {entry.step: entry for entry in now}
    rows = []
    for old in sorted(was, key=lambda entry: entry.step):
        new = repeated.get(old.step)
        if new is not None:
            names = ("batch", "loss", "grad_norm", "lr")
            same = all(equal(getattr(old, name), getattr(new, name), rtol) for name in names)
            rows.append(Row(old.step, old, new, same))
    assert len(rows) == in_common(was, now)
    return tuple(rows)
