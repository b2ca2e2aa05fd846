"""Which run, which checkpoint: the arguments that most verbs have."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lastgood.cli import text
from lastgood.errors import NoRun, UsageError
from lastgood.repo.layout import HIDDEN, step_of
from lastgood.store import local

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from lastgood.model import Record
    from lastgood.view import View

F = TypeVar("F", bound=Callable[..., Any])


class Rev(click.ParamType[str]):
    """A revision; completed from the checkpoints of the run."""

    name = "rev"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from lastgood.rev import words
        from lastgood.view import look

        try:
            known = words(look(find_run(_asked(ctx))).records)
        except Exception:  # a completion that fails must not spoil the prompt
            return []
        # A shell would run, or a terminal obey, what somebody put into the name of a metric.
        safe = [(word, about) for word, about in known if word == text.plain(word) and not set(word) & _SHELL]
        return [CompletionItem(word, help=text.plain(about)) for word, about in safe if word.startswith(incomplete)]


_SHELL = frozenset(" ,;&|<>$`'\"\\()*?!#")

REV = Rev()


def run_option(function: F) -> F:
    """-C/--run behind the verb as well as before it; arrives as `root`."""

    @functools.wraps(function)
    def wrapped(*args: Any, own_root: str | None, **rest: Any) -> Any:
        return function(*args, root=own_root or click.get_current_context().obj, **rest)

    option = click.option("-C", "--run", "own_root", metavar="DIR", help="The run directory.")
    return option(wrapped)  # type: ignore[return-value]


def find_run(asked: str | None) -> Path:
    """The run that was asked for, or the one that the current directory is in. Raises NoRun."""
    named = asked or os.environ.get("LASTGOOD_RUN")
    if named:
        path = Path(named)
        if not path.is_dir():
            raise NoRun(f"{text.plain(named)} is not a directory", hint="-C DIR names the directory of the checkpoints")
        if step_of(path.name) is not None and not is_run(path) and is_run(path.parent):
            return path.parent
        if not is_run(path):
            raise NoRun(
                f"there are no checkpoints in {text.plain(named)}", hint="-C DIR names the directory that they are in"
            )
        return path
    here = Path.cwd()
    if is_run(here):
        return here
    for path in here.parents:
        if _surely(path):  # above the current directory nothing else: a home directory may hold anything
            return path
    raise NoRun(
        f"no run here: neither {text.plain(os.fspath(here))} nor any directory above it holds checkpoints",
        hint="cd into the run, or name it: lastgood -C DIR ...",
    )


def is_run(path: Path) -> bool:
    """Whether a directory is managed or holds checkpoints of any tool."""
    if _surely(path):
        return True
    from lastgood.layouts.scan import holds_any

    return holds_any(path)


def _surely(path: Path) -> bool:
    try:
        return (path / HIDDEN).is_dir() or any(step_of(name) is not None for name in local.names(path))
    except OSError:  # /home/somebody-else: what can't be looked into isn't ours
        return False


def run_at(asked: str | None, word: str | None) -> Path:
    """The run of a verb that takes a directory and no revision. Raises NoRun for a word that names none.

    A word that is passed over would let `lastgood prune ouput` work on the run that happens to be here.
    """
    if word is None:
        return find_run(asked)
    if asked:
        raise UsageError(f"two runs are named: {text.plain(asked)} and {text.plain(word)}", hint="leave one out")
    if not os.path.exists(word):
        raise NoRun(f"{text.plain(word)} doesn't exist", hint="name the directory that the checkpoints are in")
    return _from_path(Path(word))[0]


def place(asked: str | None, word: str | None) -> tuple[Path, str | None]:
    """(run, revision): the word may be a revision, the path of a run or the path of a checkpoint."""
    looks_so = word and (os.sep in word or word in (".", "..") or (not asked and os.path.isdir(word)))
    if word and looks_so and os.path.exists(word):
        return _from_path(Path(word))
    return find_run(asked), word


def _from_path(path: Path) -> tuple[Path, str | None]:
    if path.is_dir() and is_run(path):
        return path, None
    absolute = Path(os.path.abspath(path))
    for parent in list(absolute.parents)[:4]:
        if is_run(parent):
            return parent, absolute.relative_to(parent).as_posix()
    raise NoRun(f"{text.plain(str(path))} is neither a run nor a checkpoint in one")


def new_place(target: Path, run: Path) -> None:
    """Raises UsageError for a place where something new would count as a checkpoint, or be deleted with one."""
    at = Path(os.path.realpath(target))
    inside = next((p for p in at.parents if step_of(p.name) is not None and _is_checkpoint(p)), None)
    if HIDDEN in at.parts:
        said = f"is inside {HIDDEN}, where lastgood deletes what it doesn't know"
    elif inside is not None:
        said = f"is inside the checkpoint {inside.name}, and would be deleted together with it"
    elif step_of(at.name) is not None and (at.parent == Path(os.path.realpath(run)) or (at.parent / HIDDEN).is_dir()):
        said = "would be taken for a checkpoint of the run that is there"
    else:
        return
    raise UsageError(f"{text.plain(os.fspath(target))} {said}", hint="choose a place outside of the run")


def _is_checkpoint(path: Path) -> bool:
    return any(os.path.lexists(path / name) for name in ("lastgood.json", "trainer_state.json"))


def pick(view: View, rev: str) -> Record:
    """The checkpoint that a revision names."""
    from lastgood.rev import resolve

    others = view.keep.monitors if view.keep is not None else ()
    return resolve(rev, view.records, monitor=view.monitor, mode=view.mode, others=others)


def adopted(view: View, record: Record, verb: str) -> Record:
    """The record, if it is one of ours. Raises UsageError for one without a manifest."""
    if not record.id or record.state == "foreign":
        raise UsageError(
            f"{record.name} has no manifest of this run, so there is nothing to {verb}",
            hint="`lastgood adopt` gives the checkpoints of a stock Trainer manifests, and changes no file of theirs",
        )
    return record


def _asked(ctx: click.Context) -> str | None:
    at: click.Context | None = ctx
    while at is not None:
        value = at.params.get("own_root") or at.params.get("root")
        if value:
            return str(value)
        at = at.parent
    return None
