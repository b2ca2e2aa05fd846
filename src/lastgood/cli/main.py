"""`lastgood`: finds the verb, runs it, and turns errors into a message, a hint and an exit code."""

from __future__ import annotations

import gc
import importlib
import io
import os
import sys
from typing import Any

import click

from lastgood import __version__
from lastgood.errors import (
    Conflict,
    CorruptCheckpoint,
    LastgoodError,
    NoCheckpoint,
    NoRun,
    NotEnoughSpace,
    Refused,
    RunLocked,
    UsageError,
)

SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "See": {
        "log": ("log", "The checkpoints of a run, and why each is kept"),
        "show": ("show", "One checkpoint: parts, files, tensors, arguments"),
        "diff": ("diff", "What differs between two checkpoints"),
        "df": ("df", "Space per kind of checkpoint, and when the disk is full"),
        "du": ("df", "Space per checkpoint and part"),
        "watch": ("watch", "A live table of a running run"),
    },
    "Trust": {
        "verify": ("verify", "Check that checkpoints are what was saved"),
        "doctor": ("doctor", "What is wrong, what it means, how to fix it"),
        "resume": ("resume", "Which checkpoint a run would resume from, and why"),
        "run": ("run", "Run a training command, and relaunch it after crashes"),
        "save": ("save", "Ask a run that is training for a checkpoint now"),
        "bisect": ("bisect", "Find the last healthy checkpoint, mark the others"),
    },
    "Space": {
        "plan": ("plan", "What a run will put onto the disk, before it starts"),
        "prune": ("prune", "Delete checkpoints by policy, plan first"),
        "strip": ("strip", "Full to weights-only: drop what only a resume needs"),
        "undo": ("strip", "Bring back what the last prune or strip removed"),
    },
    "Name": {
        "pin": ("names", "Hold a checkpoint: it is never deleted"),
        "unpin": ("names", "Let go of it again"),
        "tag": ("names", "Give a checkpoint a name of its own"),
        "untag": ("names", "Take the name away"),
        "note": ("names", "Write a line about a checkpoint"),
        "record": ("names", "Add metrics to a checkpoint, from anywhere"),
    },
    "Move": {
        "checkout": ("checkout", "A plain copy of a checkpoint in a directory of its own"),
        "average": ("average", "The average of several checkpoints' weights"),
        "adopt": ("adopt", "Take a run written without lastgood under management"),
        "import": ("transfer", "Bring in a Lightning, Accelerate or DCP checkpoint"),
        "export": ("transfer", "Write a checkpoint for Lightning, Accelerate or DCP"),
    },
    "Set up": {"completion": ("completion", "Shell completion for bash, zsh or fish")},
}
"""Section -> verb -> (module in lastgood.cli, summary). A verb's module is imported when it is run."""

MODULES = {verb: entry[0] for section in SECTIONS.values() for verb, entry in section.items()}
ALIASES = {"ls": "log", "fsck": "verify"}

EXITS: tuple[tuple[type[BaseException], int], ...] = (
    (NoRun, 10),
    (UsageError, 2),
    (NoCheckpoint, 3),
    (CorruptCheckpoint, 4),
    (NotEnoughSpace, 5),
    (Refused, 6),
    (RunLocked, 11),
    (Conflict, 11),
)
"""What a shell script sees, the first that matches; any other error is 1."""


class Verbs(click.Group):
    """Loads a verb's module when it is called, so that every verb starts as fast as the smallest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        verb = ALIASES.get(name, name)
        if verb not in MODULES:
            return None
        module = importlib.import_module(f"lastgood.cli.{MODULES[verb]}")
        found = getattr(module, f"{verb}_" if verb == "import" else verb)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in ALIASES and args[0] not in MODULES and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], MODULES, n=1)
            hint = f"did you mean `lastgood {near[0]}`?" if near else "`lastgood --help` lists the verbs"
            raise UsageError(f"there is no verb {args[0]!r}", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, verbs in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(verb, summary) for verb, (_, summary) in verbs.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "-C", "--run", "root", metavar="DIR", help="The run directory; else LASTGOOD_RUN, else found by walking up."
)
@click.version_option(__version__, prog_name="lastgood", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, root: str | None) -> None:
    """See, trust, prune and move the checkpoints of any training run.

    Works on what lastgood, transformers' Trainer, Accelerate, Lightning or torch.distributed.checkpoint wrote. Verbs
    that only look never write. A checkpoint is named by its step, `latest`, `best`, `best:METRIC`, `latest~1`, a tag
    or the beginning of its id.
    """
    ctx.obj = root


def main(arguments: list[str] | None = None) -> None:
    """Entry point: never returns."""
    gc.disable()  # a short life with many small objects: collecting them costs a third of a long listing
    stdout = sys.stdout
    for stream in (stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal in Latin-1 has no ellipsis
            stream.reconfigure(errors="backslashreplace")
    colour = False if os.environ.get("NO_COLOR") else None
    try:
        code = cli.main(arguments, prog_name="lastgood", standalone_mode=False, color=colour)
        sys.stdout.flush()
    except click.exceptions.Exit as leave:
        code = leave.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; what was done until then is complete, the rest is untouched", err=True)
        code = 130
    except BrokenPipeError:
        code = _nobody_reads()
    except SystemExit as leave:
        # Where click meets the broken pipe first, it puts something in the place of stdout and exits with 1.
        code = _nobody_reads() if sys.stdout is not stdout else leave.code
    except LastgoodError as error:
        code = _explain(error, colour)
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        code = 5 if error.errno in (28, 122) else 1
    except RecursionError:
        code = _explain(
            CorruptCheckpoint("a file is nested too deeply to be read", hint="`lastgood verify` says which"), colour
        )
    sys.exit(code if isinstance(code, int) else 0)


def _nobody_reads() -> int:
    """`lastgood log | head` is no failure."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def _explain(error: LastgoodError, colour: bool | None) -> int:
    from lastgood.cli.text import plain

    click.echo(click.style("error: ", fg="red", bold=True) + plain(error.message, keep="\n"), err=True, color=colour)
    if error.hint:
        click.echo(click.style("help: ", fg="cyan") + plain(error.hint, keep="\n"), err=True, color=colour)
    return next((code for kind, code in EXITS if isinstance(error, kind)), 1)


def verb_help() -> dict[str, Any]:
    """verb -> click command, all loaded: for the reference page."""
    context = click.Context(cli, info_name="lastgood")
    return {verb: cli.get_command(context, verb) for verb in MODULES}
