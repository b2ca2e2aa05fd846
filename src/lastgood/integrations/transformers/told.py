"""The report of a resume: what came back, what was passed over, what is different now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lastgood.report import Report
from lastgood.state import facts

if TYPE_CHECKING:
    from lastgood.integrations.transformers.session import Session


def told(session: Session) -> Report:
    """Of a session whose training is about to begin."""
    target, source, trainer = session.target, session.source, session.trainer
    assert target is not None
    if source is not None and not session.finished:
        source.describe_rest(trainer.state.epoch)
    changed = list(session.changed)
    notes = list(target.notes)
    manifest = None if target.record is None else target.record.manifest
    if manifest is not None:
        changed += facts.fact_changes(manifest.facts, session.facts())
        changed += facts.version_changes(manifest.environment, facts.environment())
    if session.finished:
        notes.append(f"the run is finished (step {trainer.state.global_step}): nothing left to train")
    if target.record is not None and not target.own:
        notes.append("a checkpoint of another run: its state is continued here as a new run")
    return Report(
        source=target.path.name,
        step=trainer.state.global_step,
        restored=() if source is None else tuple(source.restored),
        missing=() if source is None else tuple(source.missing),
        skipped=target.skipped,
        changed=tuple(changed),
        notes=tuple(notes),
    )
