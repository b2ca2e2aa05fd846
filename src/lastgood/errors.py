"""Every error that lastgood raises, grouped by what a caller would do about it.

    LastgoodError                      has .code (stable, append-only) and .hint (what to do next)
    |-- UsageError (ValueError)        an option or argument is wrong: correct the call
    |-- NotSupported                   this set-up can't be managed yet: do without, or change the set-up
    |-- NoCheckpoint (LookupError)     nothing there to open or resume from
    |   `-- NoRun                      ... not even a directory of checkpoints
    |-- CorruptCheckpoint              a checkpoint fails verification: use another one
    |-- Unreadable (OSError)           the system can't look just now, which says nothing of the checkpoints: try again
    |-- IncompleteRestore              a part or tensor would be left as it was: allow it by name, or don't resume
    |-- Incompatible                   what was saved doesn't fit what is running (parameters, base model)
    |-- SaveFailed (OSError)           this save came to nothing; every earlier checkpoint is intact
    |   `-- NotEnoughSpace             ... because the disk, the inodes or the quota would run out
    |-- Refused                        it would touch what isn't ours, is pinned, or needs a yes
    |-- RunLocked                      another process writes to this run
    `-- Conflict                       another writer published in between

Preempted is a SystemExit, not a LastgoodError: after the checkpoint of a preemption
is safe the process has to end, and `except Exception` must not stop it.
"""

from __future__ import annotations


class LastgoodError(Exception):
    """Base of all errors. `code` identifies the kind for programs, `hint` is the next step for people."""

    code = "error"

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        text = f"{self.message} [{self.code}]"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class UsageError(LastgoodError, ValueError):
    code = "usage"


class NotSupported(LastgoodError, NotImplementedError):
    code = "not-supported"


class NoCheckpoint(LastgoodError, LookupError):
    code = "no-checkpoint"


class CorruptCheckpoint(LastgoodError):
    code = "corrupt"


class Unreadable(LastgoodError, OSError):
    code = "unreadable"


class IncompleteRestore(LastgoodError):
    code = "incomplete-restore"


class Incompatible(LastgoodError):
    code = "incompatible"


class SaveFailed(LastgoodError, OSError):
    code = "save-failed"


class NotEnoughSpace(SaveFailed):
    code = "no-space"


class Refused(LastgoodError):
    code = "refused"


class NoRun(NoCheckpoint):
    code = "no-run"


class RunLocked(LastgoodError):
    code = "locked"


class Conflict(LastgoodError):
    code = "conflict"


class Preempted(SystemExit):
    """The run was asked to stop, its checkpoint is on disk; exit status 75 (EX_TEMPFAIL) asks for a relaunch.

    Or the grace of a SIGTERM was too short for one, which was said, or on_full="stop" and there was no room for one
    (its cause is the NotEnoughSpace then): the checkpoint before is the one that a relaunch continues from.
    """

    def __init__(self, message: str) -> None:
        super().__init__(75)
        self.message = message

    def __str__(self) -> str:
        return self.message


def wrong_type(option: str, value: object, expected: str) -> UsageError:
    """The one wording for a wrong value of an option."""
    return UsageError(f"{option} must be {expected}, not {value!r} ({type(value).__name__})")
