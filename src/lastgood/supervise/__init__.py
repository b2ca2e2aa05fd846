"""`lastgood run -- CMD...`: launch a training command, and launch it again when it crashes or is preempted.

The command needs no change: it is told where to resume by `{checkpoint}` in its arguments
and by LASTGOOD_RESUME. What a status means:

    0                            done
    75, 143, killed by SIGTERM   preempted: again at once
    2, at once, at first         the command line is wrong: no second try
    126, 127                     it can't be executed or isn't there: no second try
    anything else                a crash: again after a wait, until too many in a row brought no progress

The command gets a session of its own. So Ctrl-C reaches the supervisor alone, which passes
it on: once, to every process of the command. A process outside the session of a terminal
may still read from it, which one in a background group of the session could not.
"""

from lastgood.supervise.command import PLACE, Launch, Limits, described, fill
from lastgood.supervise.loop import supervise

__all__ = ["PLACE", "Launch", "Limits", "described", "fill", "supervise"]
