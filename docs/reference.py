"""Prints docs/cli.md: the commands, as they describe themselves.

python docs/reference.py > docs/cli.md
"""

from __future__ import annotations

import inspect

import click

from lastgood.cli.main import ALIASES, EXITS, SECTIONS, cli
from lastgood.cli.table import Style
from lastgood.cli.table import options as listing_options

INTRODUCTION = """\
# The command line

This page is generated: `./scripts/record` writes it anew from the commands' own help.

```text
lastgood [-C DIR] VERB ...
```

`pip install` gives the command `lastgood`; `python -m lastgood` is the same. It needs no torch, except for what says
so: `diff --values`, `checkout --merge`, `--dtype` and `--format trainer`, `average`, `import`, `export`.

## Which run

`-C DIR` (before or after the verb), else `LASTGOOD_RUN`, else the run that the current directory is in. Where a verb
takes RUN or REV, the path of a run or of a checkpoint does as well: `lastgood show out/checkpoint-500`. Runs may be
managed or not: checkpoints of a stock Trainer (FSDP and DeepSpeed too), Accelerate, Lightning and
torch.distributed.checkpoint are recognised. Verbs that only look never write to the run.

## Which checkpoint

| REV | names |
|---|---|
| `latest` (`last`, `HEAD`) | the newest full checkpoint: what a recovery uses |
| `best` | the best by the run's own metric |
| `best:METRIC`, `best:METRIC:min`, `best:METRIC:max` | by another metric; `min` or `max` if it isn't well known |
| `500`, `step:500`, `checkpoint-500` | the checkpoint of that step, on the current branch if there are two |
| `REV~2` | two checkpoints before REV, on its branch; `REV~` is `REV~1` |
| a tag | see `lastgood tag` |
| `3f9a` | the beginning of an id, four digits or more |
"""

MEANINGS = {
    "NoRun": "there is no run here",
    "UsageError": "a wrong argument, option or revision",
    "NoCheckpoint": "no such checkpoint, or nothing to resume from",
    "CorruptCheckpoint": "a checkpoint is damaged",
    "NotEnoughSpace": "not enough space, or not as much can be freed as asked for",
    "Refused": "refused: it would lose a recovery point, it is held, or nobody said yes",
    "RunLocked": "a training run or another command holds the run",
    "Conflict": "somebody else changed the same thing",
}

SPECIAL = {
    0: "done",
    1: "findings (`verify`: damage; `diff --exit-code`: differences), or any other error",
    75: "`lastgood run`: stopped by a signal, its time limit or `lastgood save --stop`, and the command saved before it"
    " ended; start it again",
    130: "interrupted (Ctrl-C)",
}

VARIABLES = """\
## Environment variables

| variable | does |
|---|---|
| `LASTGOOD_RUN` | the run directory, as `-C` |
| `LASTGOOD_CACHE` | `0`: listings of runs with 500 and more checkpoints aren't remembered in the user's cache |
| `LASTGOOD_NO_INPUT` | set: never ask; what would ask is refused without `--yes` |
| `LASTGOOD_LOG` | what a training run and `lastgood run` say: DEBUG, INFO, WARNING or ERROR (INFO) |
| `NO_COLOR` | set: no colours; there are none outside a terminal either |
| `COLUMNS` | the width that tables are cut to; outside a terminal they aren't cut |
| `PAGER` | for listings longer than the terminal; empty: none |

`lastgood run` sets `LASTGOOD_RESUME` (path of the checkpoint, or empty) and `LASTGOOD_RESTARTS` for its command.

## Output

What was asked for goes to standard output, everything else to standard error. `--json` prints one object with a
versioned schema, see [json.md](json.md). Every verb with `--json` has these options; where there is no table, `--sort`,
`-o` and `-H` change nothing.

"""


def page() -> str:
    """The whole page."""
    out = [INTRODUCTION, "## Exit status\n", "| status | means |", "|---|---|"]
    meanings: dict[int, list[str]] = {code: [text] for code, text in SPECIAL.items()}
    for kind, code in EXITS:
        meanings.setdefault(code, []).append(MEANINGS[kind.__name__])
    out += [f"| {code} | {'; '.join(texts)} |" for code, texts in sorted(meanings.items())]
    out += ["", VARIABLES + "\n".join(_table(_common(), click.Context(click.Command("log"))))]
    context = click.Context(cli, info_name="lastgood")
    for section, verbs in SECTIONS.items():
        out.append(f"## {section}\n")
        for verb, (_, summary) in verbs.items():
            out += _verb(verb, summary, context)
    return "\n".join(out).rstrip() + "\n"


def _verb(verb: str, summary: str, group: click.Context) -> list[str]:
    try:
        command = cli.get_command(group, verb)
    except ModuleNotFoundError:  # listed, and not part of this version yet
        command = None
    if command is None:
        return [f"### {verb}\n", f"{summary}.\n"]
    context = click.Context(command, info_name=verb, parent=group)
    pieces = " ".join(command.collect_usage_pieces(context))
    other = [alias for alias, name in ALIASES.items() if name == verb]
    named = f" Also `{other[0]}`." if other else ""
    out = [
        f"### {verb}\n",
        f"{summary}.{named}\n",
        "```text",
        f"lastgood {verb} {pieces}",
        "```\n",
        _described(command),
    ]
    common = {parameter.name for parameter in _common()}
    listing = "as_json" in {parameter.name for parameter in command.params}
    own = [p for p in command.params if p.name != "own_root" and not (listing and p.name in common)]
    if listing:
        out.append("Also the options of every listing, see [Output](#output).\n")
    return [*out, *_table(own, context)]


def _common() -> list[click.Parameter]:
    """The options that every listing has."""

    @click.command()
    @listing_options
    def listing(style: Style) -> None: ...

    return listing.params


def _table(parameters: list[click.Parameter], context: click.Context) -> list[str]:
    rows = []
    for parameter in parameters:
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            option, text = (part.replace("|", "\\|") for part in record)
            rows.append(f"| `{option}` | {text} |")
    return ["| option | does |", "|---|---|", *rows, ""] if rows else []


def _described(command: click.Command) -> str:
    out = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        literal = paragraph.startswith("\b\n")
        out.append(f"```text\n{paragraph[2:]}\n```\n" if literal else f"{paragraph}\n")
    return "\n".join(out)


if __name__ == "__main__":
    print(page(), end="")
