"""What stays as it is, whatever the policy says: where a resumed run goes on from, and what is being evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lastgood.model import Record, going_on
from lastgood.repo import leases
from lastgood.repo.run import read_head


def protected(
    root: Path, found: Sequence[Record], run: str | None, sightings: leases.Sightings | None = None
) -> dict[str, str]:
    """id -> reason. The live run, `prune` and every listing ask this, so they agree.

    sightings: of the leases, by a process that goes on. Raises OSError if the system can't look just now.
    """
    reasons = going_on(found, read_head(root, run, sure=True))
    for id, reason in leases.in_force(root, sightings).items():
        reasons[id] = f"{reasons[id]}; {reason}" if id in reasons else reason
    return reasons
