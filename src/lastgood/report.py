"""The restore report: what a resume brought back, what it didn't, and what is different now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting that differs between the save and this run, and which of the two takes effect."""

    what: str
    saved: object
    now: object
    effect: str

    def __str__(self) -> str:
        return f"{self.what}: {self.saved} -> {self.now} ({self.effect})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything there is to say about one resume; `lines()` is what is shown."""

    source: str  # checkpoint-500
    step: int  # the global step that training continues from
    restored: tuple[tuple[str, str], ...] = ()  # part, detail
    missing: tuple[str, ...] = ()  # parts that were not in the checkpoint and were allowed to be missing
    skipped: tuple[tuple[str, str], ...] = ()  # newer checkpoints that were not used, and why
    changed: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line per fact, the most important first."""
        lines = [f"skipped {name}: {reason}" for name, reason in self.skipped]
        lines.append(f"resuming from {self.source} at step {self.step}")
        lines += [f"  {part:<10} restored  {detail}".rstrip() for part, detail in self.restored]
        lines += [f"  {part:<10} MISSING   starts afresh, as allowed" for part in self.missing]
        lines += [f"  changed since the save: {change}" for change in self.changed]
        lines += [f"  {note}" for note in self.notes]
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())
