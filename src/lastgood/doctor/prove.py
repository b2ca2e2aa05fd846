"""The proof of a resume: repeat the steps after a checkpoint in a scratch directory, compare with what was recorded.

The real run is read and nothing else. The command finds LASTGOOD_PROVE in its environment: a
managed Trainer then works in the scratch directory, repeats the steps and ends the process.
Any other gets the directory through `{run}` in its arguments.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lastgood import policy
from lastgood.doctor import recorded
from lastgood.doctor.divergence import first_divergence, following
from lastgood.doctor.proof import Proof, side_by_side
from lastgood.doctor.scratch import place_for
from lastgood.errors import CorruptCheckpoint, NoCheckpoint, NotSupported, UsageError
from lastgood.format import manifest as codec
from lastgood.model import TRAINERS, Record, checkpoint_name
from lastgood.repo import trail
from lastgood.repo.layout import hidden
from lastgood.repo.run import start_run
from lastgood.repo.trail import Entry
from lastgood.store import local
from lastgood.store.checksum import NOW
from lastgood.supervise import PLACE, Limits, supervise
from lastgood.view import View, look

RUN, STEPS = "{run}", "{steps}"
"""What stands in the command for the scratch directory, and for the number of the last step to repeat."""
TAIL = 12
"""Lines of a command's output that are shown when it fails."""


@dataclass(frozen=True, slots=True)
class _Reference:
    """What was recorded after the checkpoint. logged: the same from the Trainer's log."""

    entries: tuple[Entry, ...]
    logged: tuple[Entry, ...]

    def until(self, last: int) -> _Reference:
        return _Reference(
            tuple(entry for entry in self.entries if entry.step <= last),
            tuple(entry for entry in self.logged if entry.step <= last),
        )

    @property
    def last(self) -> int:
        return max((entry.step for entry in (*self.entries, *self.logged)), default=-1)


class _Enough(Exception):
    """The command has written all that is needed; it may train on for days."""


def prove(
    run: View | Path,
    step: int,
    command: Sequence[str],
    *,
    steps: int = 20,
    rtol: float = 0.0,
    keep: Path | None = None,
    poll: float = 1.0,
) -> Proof:
    """Repeat up to `steps` steps after the checkpoint of `step` with `command`, and compare.

    rtol: numbers may differ by this share of the larger one; 0: not at all. keep: a new directory for the scratch run,
    which then stays. poll: seconds between looks at what an unmanaged command has saved (five at a time).

    Raises NoCheckpoint where there is no such full checkpoint, UsageError where nothing is recorded to compare with
    or the command would write into the real run, CorruptCheckpoint where a file isn't what was saved.
    """
    view = run if isinstance(run, View) else look(run)
    if steps < 1 or not 0 <= rtol < 1:
        raise UsageError(f"steps={steps} and rtol={rtol}: at least one step, and a share below 1")
    record = _chosen(view, step)
    managed = bool(record.id) and not record.layout
    if not managed and not any(RUN in argument for argument in command):
        raise UsageError(
            f"{record.name} was not written by a managed run: the command would write into {view.root} itself",
            hint=f"put {RUN} where the output directory is named: -- python train.py --output_dir {RUN}"
            f" --resume_from_checkpoint {PLACE}",
        )
    reference = _reference(view, record)
    if reference.last <= step:
        raise UsageError(
            f"nothing is recorded of the steps after {record.name}: there is nothing to compare with",
            hint="prove an earlier checkpoint, or this one when the run has gone on",
        )
    last = min(step + steps, reference.last)
    with place_for(view.root, record, keep) as place:
        scratch, before = place / "run", _files(view)
        copied = _copy(view, record, scratch)
        status, output = _repeat(command, scratch, copied, last, place / "output.log", poll)
        proof = _judge(record, reference.until(last), scratch, status, rtol)
        written = {name for (name, file), what in _files(view).items() if before.get((name, file)) != what}
        wrote = tuple(record.name for record in view.records if record.name in written)
        return msgspec.structs.replace(proof, output=output, kept=None if keep is None else str(place), wrote=wrote)


def _files(view: View) -> dict[tuple[str, str], tuple[int, int]]:
    """(checkpoint, file) -> size and time of those that nobody has a reason to write any more.

    A run that trains meanwhile may still be writing the newest, and strips older ones.
    """
    names = sorted((record.step, record.name) for record in view.records)[:-1]
    found = {}
    for _, name in names:
        for file in local.names(view.root / name):
            if file != codec.NAME:
                with suppress(OSError):
                    status = os.lstat(view.root / name / file)
                    found[name, file] = (status.st_size, status.st_mtime_ns)
    return found


def _chosen(view: View, step: int) -> Record:
    found = policy.at_step(view.records, step) or tuple(r for r in view.records if r.step == step)
    if not found:
        there = ", ".join(str(r.step) for r in view.records if r.state == "full") or "none"
        raise NoCheckpoint(f"{view.root} has no checkpoint of step {step}; full ones: {there}")
    record = next((r for r in found if r.state == "full"), found[0])
    if record.state != "full":
        raise NoCheckpoint(f"{record.name} can't be resumed from: {record.problem or 'it holds the weights alone'}")
    if record.layout and record.layout not in TRAINERS:
        raise NotSupported(f"{record.name} was written by {record.layout}: only resumes of a Trainer can be proven")
    return record


def _reference(view: View, record: Record) -> _Reference:
    entries = following(trail.read(view.root), record.id or record.name)
    fresh = not record.id or bool(record.layout)
    return _Reference(
        tuple(entry for entry in entries if entry.step > record.step),
        recorded.log_after(view.root, view.path(record), record.step, fresh_window=fresh),
    )


def _copy(view: View, record: Record, scratch: Path) -> Path:
    """The checkpoint, alone in a run directory of its own, checked against its hashes if it has any."""
    assert record.manifest is not None
    source, target = view.path(record), scratch / checkpoint_name(record.step)
    if record.id:
        local.make_dirs(hidden(scratch))
        start_run(scratch, record.manifest.run)
    # The manifest last, as in a save: it isn't a checkpoint before.
    names = [*record.manifest.files, *([codec.NAME] if record.id else [])]
    for name in names:
        local.make_dirs((target / name).parent)
        entry = record.manifest.files.get(name)
        try:
            copied = local.clone(source / name, target / name, entry.kind if entry is not None else NOW)
        except FileNotFoundError:
            raise NoCheckpoint(f"{record.name} went while it was copied", hint="pin it, or prove another one") from None
        if entry is not None and entry.hash and copied != entry:
            raise CorruptCheckpoint(
                f"{name} of {record.name} is not what was saved", hint="`lastgood verify --full` says what else is"
            )
    return target


def _repeat(
    command: Sequence[str], scratch: Path, checkpoint: Path, last: int, log: Path, poll: float
) -> tuple[int, tuple[str, ...]]:
    """Status of the command and the last lines that it printed."""
    filled = [argument.replace(RUN, str(scratch)).replace(STEPS, str(last)) for argument in command]
    environment = {
        "LASTGOOD_PROVE": str(scratch),
        "LASTGOOD_PROVE_UNTIL": str(last),
        "LASTGOOD_RUN": str(scratch),
        "WANDB_MODE": "disabled",  # a tracker would take the repeated steps for the run's own
    }

    def look_in(ended: bool) -> None:
        if not ended and recorded.step_reached(scratch) >= last:
            raise _Enough

    local.write(log, [], sync=False)
    with open(log, "ab", buffering=0) as output:
        try:
            status = supervise(
                filled,
                choose=lambda: checkpoint,
                progress=lambda: -1,
                tidy=look_in,
                limits=Limits(restarts=0, preemptions=0, grace=10.0),
                poll=poll,
                environment=environment,
                output=output,
            )
        except _Enough:
            status = 0
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    told = log.read_bytes()[-(1 << 16) :].decode(errors="replace").splitlines()
    return status, tuple(line for line in told if line.strip())[-TAIL:]


def _judge(record: Record, was: _Reference, scratch: Path, status: int, rtol: float) -> Proof:
    """The trails if both have one, else the logs."""
    now = tuple(entry for life in trail.read(scratch) for entry in life.entries)
    rows = side_by_side(was.entries, now, rtol)
    source = "trail" if rows else "log"
    reference = was.entries if rows else was.logged
    if not rows:
        now = recorded.newest_log(scratch, record.step)
        rows = side_by_side(reference, now, rtol)
    divergence = first_divergence(reference, now, rtol=rtol, after=record.step)
    wanted = len(reference) or len(was.entries)
    cut = status != 0 and len(rows) < wanted
    return Proof(
        checkpoint=record.name,
        step=record.step,
        outcome="diverged" if divergence is not None else "failed" if cut or not rows else "same",
        steps=wanted,
        compared=len(rows),
        source="trail" if source == "trail" else "log",
        status=status,
        divergence=divergence,
        rows=rows,
        rtol=rtol,
    )
