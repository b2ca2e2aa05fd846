"""lastgood run: any training command, relaunched until it is done, with its checkpoints looked after."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from lastgood.adoption import candidates
from lastgood.cli import text
from lastgood.cli.place import run_option
from lastgood.errors import NoCheckpoint, RunLocked, UsageError
from lastgood.model import TRAINERS, Record
from lastgood.pruning import Scope, plan
from lastgood.recovery import UNADOPTED
from lastgood.repo import gc, journal
from lastgood.repo.adopt import adopt
from lastgood.repo.lock import RunLock
from lastgood.repo.quarantine import quarantine
from lastgood.resumption import choose, continued
from lastgood.supervise import Limits, supervise
from lastgood.talk import say
from lastgood.units import seconds
from lastgood.view import View, look

RULES = ("last", "best", "every", "total", "full")


@click.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True)
@run_option
@click.option("--max-restarts", default=10, metavar="N", help="Crashes in a row without progress (default: 10).")
@click.option("--backoff", default=5.0, metavar="S", help="Seconds before a relaunch, doubled each time (default: 5).")
@click.option("--grace", default=60.0, metavar="S", help="Seconds between SIGTERM and SIGKILL (default: 60).")
@click.option("--time-limit", metavar="TIME", help="Stop in time before so long is over, all launches together: 3h30m.")
@click.option("--keep-last", "last", type=int, metavar="N", help="Of a stock Trainer's checkpoints keep the newest N,")
@click.option("--keep-best", "best", type=int, metavar="N", help="... and the best N by --monitor,")
@click.option("--keep-every", "every", type=int, metavar="K", help="... and those at multiples of K steps,")
@click.option("--keep-total", "total", type=int, metavar="N", help="... or N in all, the newest and the best.")
@click.option("--full", type=int, metavar="N", help="Full state only for the newest N.")
@click.option("--monitor", metavar="METRIC", help="What best means.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Whether a lower or a higher value is better.")
def run(
    root: str | None,
    command: tuple[str, ...],
    max_restarts: int,
    backoff: float,
    grace: float,
    time_limit: str | None,
    **rules: Any,
) -> None:
    """Run a training command with no change to its code, and relaunch it after a crash or a preemption.

    `{checkpoint}` in its arguments becomes the newest good checkpoint, checked; before there is one, the argument and
    its option are left out. The environment has the path as LASTGOOD_RESUME, and the seconds of --grace as
    LASTGOOD_GRACE. Exit 75, 143 and SIGTERM count as a preemption and are relaunched at once, other failures after a
    wait. What a crash left half-written is put into quarantine first. A run that was stopped by `lastgood save --stop`,
    or whose time is over, isn't launched again. With --keep-..., finished checkpoints of a stock Trainer are adopted
    and pruned as it goes on.

    \b
    lastgood -C out run --keep-last 2 -- python train.py --output_dir out --resume_from_checkpoint {checkpoint}
    """
    path = _directory(root)
    wanted = {name: value for name, value in rules.items() if value is not None}
    if any(name in wanted for name in RULES):
        plan(_view(path), wanted, scope=Scope(stock=True))  # a policy that makes no sense fails now, not in the night
    elif wanted:
        raise UsageError("--monitor and --mode say what best means; keep how many?", hint="--keep-best 2")
    alone = _Alone(path)
    code = supervise(
        command,
        choose=lambda: _choose(alone()),
        progress=lambda: max((r.step for r in _view(path).records if r.state == "full"), default=-1),
        tidy=_tidier(alone, wanted),
        limits=Limits(restarts=max_restarts, backoff=backoff, grace=grace, seconds=seconds("--time-limit", time_limit)),
        enough=lambda since: _enough(path, since),
    )
    raise click.exceptions.Exit(code)


def _enough(path: Path, since: float) -> str:
    """Why a managed run that has just left with 75 isn't to be launched again: it says so in its journal."""
    last = next((e for e in reversed(journal.read(path)) if e.get("event") == "preempted"), None)
    if last is None or not isinstance(last.get("time"), (int, float)) or last["time"] < since:
        return ""
    return {
        "request": "stopped by `lastgood save --stop`, not launched again",
        "limit": "its time limit is near, not launched again",
        "space": "the disk has no room for its checkpoints, not launched again",
    }.get(str(last.get("by")), "")


def _directory(root: str | None) -> Path:
    named = root or os.environ.get("LASTGOOD_RUN")
    if not named:
        raise UsageError(
            "which directory will the checkpoints be in?", hint="lastgood -C OUTPUT_DIR run -- python train.py ..."
        )
    path = Path(named)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{text.plain(named)} is not a directory")
    return path


class _Alone:
    """The directory, looked after by nobody else: two would put what the other's command is writing aside.

    Locked by itself, from when it is there on: a file in it would keep some scripts from starting in it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.handle = path, -1

    def __call__(self) -> Path:
        """Raises RunLocked."""
        if self.handle < 0 and os.name != "nt" and self.path.is_dir():
            import fcntl

            handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise RunLocked(
                    f"another `lastgood run` looks after {self.path}", hint="wait for it or stop it"
                ) from None
            except OSError:
                pass  # a file system that can't
            self.handle = handle
        return self.path


def _view(path: Path) -> View:
    return look(path) if path.is_dir() else View(path, (), ())


def _choose(path: Path) -> Path | None:
    """The checkpoint for the next launch, hashed or checked; husks are out of the way before."""
    if not path.is_dir():
        return None
    _quarantine(path)
    view = look(path, sure=True)
    if not any(record.state in ("full", "incomplete") for record in view.records):
        return None
    chosen, skipped = choose(view, "last", full=True)
    if chosen is not None:
        # A stock Trainer that goes on in an adopted run: back at the adopted one it would redo, and write over, these.
        chosen = continued(view, chosen)
        further = {r.name for r in view.records if r.step > chosen.step}
        skipped = [(name, why) for name, why in skipped if why != UNADOPTED or name in further]
    for name, reason in skipped:
        say(f"passed over {text.plain(name)}: {text.plain(reason)}")
    # A stock Trainer would write into them again, under a manifest that tells of other bytes.
    spoiled = [
        name for name, _ in skipped if any(r.name == name and r.id and r.layout in TRAINERS for r in view.records)
    ]
    _set_aside(path, [record for record in view.records if record.name in spoiled])
    if chosen is None:
        raise NoCheckpoint(
            f"no checkpoint in {path} is good, so nothing is launched: a run that starts afresh here would be taken"
            " for the old one",
            hint="`lastgood verify --full` says what is wrong; move the directory away to start afresh",
        )
    return view.path(chosen)


def _quarantine(path: Path) -> None:
    """Half-written directories make a stock Trainer crash at its next start; their bytes are kept for a look."""
    view = look(path, sure=True)
    husks = [r for r in view.records if r.state == "incomplete" and _theirs(r)]
    _set_aside(path, husks)


def _set_aside(path: Path, husks: Sequence[Record]) -> None:
    if not husks:
        return
    with RunLock(path) as lock:
        for record in husks:
            place = quarantine(lock.door, record.name)
            why = f"was half-written ({record.problem})" if record.problem else "is damaged"
            why = f"is poisoned ({record.poisoned})" if record.poisoned else why
            say(f"{record.name} {why}; moved to {place}")


def _theirs(record: Record) -> bool:
    """A stock Trainer's: a managed run sees to its own."""
    return record.layout in TRAINERS and not record.id


def _tidier(alone: Callable[[], Path], rules: dict[str, Any]) -> Callable[[bool], None]:
    def tidy(ended: bool) -> None:
        """Adopt what is finished, then prune: only if nobody else holds the run, so a managed one is left alone."""
        path = alone()
        if not any(name in rules for name in RULES) or not path.is_dir():
            return
        view = look(path, sure=True)
        done = _finished(view, ended)
        if not done:  # the one that is being written is not looked into again and again
            return
        try:
            with RunLock(path) as lock:
                chains, _ = candidates(view, done)
                adopt(path, chains)
                decisions = plan(look(path, sure=True), rules)
                gc.execute(lock.door, gc.plan([d.record for d in decisions], decisions))
        except RunLocked:
            return

    return tidy


def _finished(view: View, ended: bool) -> set[str]:
    """Complete stock checkpoints; of the newest nobody knows, while it runs, that its last rank has written."""
    complete = [r for r in view.records if _theirs(r) and r.state in ("full", "weights")]
    newest = max((r.step for r in view.records), default=-1)
    return {r.name for r in complete if ended or r.step < newest}
