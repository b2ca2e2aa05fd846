"""lastgood plan: space, recovery and cost of a run before it starts, or of another policy for one that exists."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lastgood import units
from lastgood.cli import metric, text
from lastgood.cli.place import is_run, run_option
from lastgood.cli.table import Style, emit, emit_json, forms, terminal_width
from lastgood.errors import UsageError
from lastgood.planner.options import KEEP

if TYPE_CHECKING:
    from lastgood.planner.plan import Plan

SCHEMA = "lastgood.plan/1"


@click.command()
@click.argument("run", required=False)
@run_option
@forms
@click.option("--model", metavar="MODEL", help="13B, a well-known name, a directory or a config.json.")
@click.option("--train", type=click.Choice(["full", "lora"]), help="What is trained (full).")
@click.option("--optim", metavar="NAME", help="The optimizer, as in TrainingArguments (adamw).")
@click.option("--dtype", metavar="TYPE", help="Type of the trained weights (bf16).")
@click.option("--master", metavar="TYPE", help="fp32: the optimizer keeps a copy of the weights, and its state, so.")
@click.option("--lora-r", type=int, metavar="R", help="Rank of the adapter (16).")
@click.option("--lora-targets", metavar="NAME,...", help="Modules that get one: q_proj,v_proj (all-linear).")
@click.option("--world-size", type=int, metavar="N", help="Processes (1).")
@click.option("--shard", type=click.Choice(["none", "zero1", "zero2", "zero3", "fsdp"]), help="What they share out.")
@click.option("--max-steps", type=int, metavar="N", help="Length of the run in optimizer steps.")
@click.option("--save-steps", type=float, metavar="N", help="Steps between saves, or a share of the run (500).")
@click.option("--eval-steps", type=float, metavar="N", help="Steps between evaluations.")
@click.option("--keep-last", type=int, metavar="N", help="Keep the newest N.")
@click.option("--keep-best", type=int, metavar="N", help="Keep the best N by --monitor.")
@click.option("--keep-every", type=int, metavar="K", help="Keep those at multiples of K steps.")
@click.option("--keep-full", type=int, metavar="N", help="Full state only for the newest N.")
@click.option("--save-total-limit", type=int, metavar="N", help="N in all, the newest and the best.")
@click.option("--load-best/--no-load-best", "load_best_model_at_end", default=None, help="Of the stock Trainer.")
@click.option("--monitor", metavar="METRIC", multiple=True, help="What best means (eval_loss); of a RUN also several.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Whether a lower or a higher value is better.")
@click.option("--metrics", metavar="FILE|SHAPE", help="Values by step; or falling, overfit@1500, flat, noisy, none.")
@click.option("--crash-at", type=int, metavar="STEP", help="What is there after a crash at this step.")
@click.option("--disk", metavar="SIZE", help="Does it fit on a disk of 2TB?")
@click.option("--used", metavar="SIZE", help="What lies on that disk already.")
@click.option("--bandwidth", metavar="RATE", help="How fast a save is written: 1GB/s.")
@click.option("--step-time", metavar="TIME", help="How long a step takes: 1.2s.")
@click.option("--mtbf", metavar="TIME", help="Mean time between failures: 1d.")
@click.option("--restart", metavar="TIME", help="From a failure until training goes on: 5m.")
@click.option("--price", type=float, metavar="X", help="Of a GB-month of storage: 0.023.")
@click.option("--compare", type=click.Choice(["stock"]), help="The same with the stock Trainer.")
@click.option("--plot", metavar="FILE", help="Disk use over time: FILE.png, FILE.svg, or - for text.")
def plan(root: str | None, run: str | None, style: Style, model: str | None, plot: str | None, **options: Any) -> None:
    """What a run will put onto the disk, what a crash would find there, and how often to save.

    With RUN instead of --model: what another policy would have left of this run's checkpoints, from its journal and
    metrics. Nothing is changed. Exit status 1: it doesn't fit on --disk.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    given |= {name: value for name, value in metric.named(options["monitor"], options["mode"]).items() if value}
    if model is None:
        if plot is not None:
            raise UsageError("--plot belongs to a plan with --model", hint="`lastgood df` shows a run's disk use")
        _replayed(root, run, style, given)
        return
    if isinstance(given.get("monitor"), tuple):
        raise UsageError("several metrics have no course to plan with", hint="leave one --monitor, or plan a RUN")
    if run is not None or root is not None:
        raise UsageError("a RUN and --model are two questions", hint="leave one of them out")
    if plot not in (None, "-"):
        from lastgood.planner.figure import check

        check(Path(str(plot)))
    import lastgood.planner.plan as planning
    from lastgood.cli.planned import show

    if "metrics" in given:
        given |= _metrics(given["metrics"], given.get("monitor"))
    try:
        found = planning.plan(model, **given | _numbers(given))
    except UsageError as error:
        raise _spelled(error, given) from None
    if style.json:
        import msgspec

        emit_json(SCHEMA, {"fits": found.fits, **msgspec.to_builtins(found)})
    else:
        lines = show(found, style)
        if plot == "-":
            from lastgood.planner.chart import chart

            wide = min(100, max(60, terminal_width() or 100))
            lines += ["", *chart(found.outcomes, found.machine, wide, unicode=_unicode(), size=style.size)]
        emit(lines)
    if plot not in (None, "-"):
        _draw(str(plot), found)
    if found.fits is False:
        raise SystemExit(1)


_ABOUT = re.compile(r"(Keep\((?P<rule>\w+)\)|(?P<name>[a-z_]+))(?= |=)")
_RULES = {f"Keep({rule})": option for option, rule in KEEP.items()}


def _spelled(error: UsageError, given: dict[str, Any]) -> UsageError:
    """An error of the library with the option as it was typed, without its value as Python has it."""
    message, hint = error.message, error.hint
    about = _ABOUT.match(message)
    name = "" if about is None else _RULES.get(about[0], about[0])
    if about is not None and name in given:
        rest = message[about.end() :].lstrip(" =")
        if rest.startswith("must be "):
            expected = rest.rpartition(", not ")[0].replace(", or None", "")
            rest = f"{text.plain(str(given[name]))}: {expected}"
        message = f"--{name.replace('_', '-')} {rest}"
    elif message.startswith("overfit@"):
        message = f"--metrics {message}"
    if hint:
        hint = re.sub(r"\b(mode|monitor|metrics|save_steps|eval_steps)='?([\w@]+)'?", _option, hint)
    return UsageError(message, hint=hint, code=error.code)


def _option(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')} {match[2]}"


def _draw(plot: str, found: Plan) -> None:
    from lastgood.planner.figure import draw

    draw(found, Path(plot))
    click.echo(f"drawn: {text.plain(plot)}", err=True)


def _unicode() -> bool:
    """Whether the terminal, or whatever stdout is, can show block characters."""
    import sys

    try:
        "█░▁".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _metrics(word: str, monitor: str | None) -> dict[str, Any]:
    from lastgood.planner.history import SHAPES
    from lastgood.planner.measured import read

    if word.partition("@")[0] in SHAPES:
        return {"metrics": word}
    if not os.path.exists(word):
        raise UsageError(
            f"--metrics {text.plain(word)}: neither a file nor a known course",
            hint=f"{', '.join(SHAPES)}, overfit@1500, or a file of JSON or CSV",
        )
    name, values = read(Path(word), monitor)
    return {"metrics": values} | ({"monitor": name} if name is not None else {})


def _numbers(given: dict[str, Any]) -> dict[str, Any]:
    """Sizes, times and rates as numbers; a whole number of steps as one."""
    kinds: dict[str, tuple[Callable[[str], float], str]] = {
        "disk": (units.parse_size, "a size: 2TB, 500GiB"),
        "used": (units.parse_size, "a size: 2TB, 500GiB"),
        "bandwidth": (units.parse_rate, "a rate: 1GB/s, 200MiB/s"),
        "step_time": (units.parse_duration, "a time: 1.2s, 300ms"),
        "mtbf": (units.parse_duration, "a time: 1d, 12h"),
        "restart": (units.parse_duration, "a time: 5m, 90s"),
    }
    found: dict[str, Any] = {}
    for name, (parse, expected) in kinds.items():
        if name in given:
            try:
                found[name] = parse(given[name])
            except ValueError:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} {text.plain(given[name])!r} is not {expected}") from None
    if given.get("lora_targets", "all-linear") != "all-linear":
        found["lora_targets"] = tuple(filter(None, map(str.strip, given["lora_targets"].split(","))))
    for name in ("save_steps", "eval_steps"):
        if name in given and float(given[name]).is_integer():
            found[name] = int(given[name])
    return found


def _replayed(root: str | None, run: str | None, style: Style, given: dict[str, Any]) -> None:
    """Another policy for the run that is there."""
    from lastgood.cli import replayed
    from lastgood.cli.place import run_at

    if run is not None and not root and os.path.isdir(run) and not is_run(Path(run)) and "max_steps" in given:
        raise UsageError(f"{text.plain(run)} is not a run", hint="a model to plan for is named by --model")
    if run is None and "max_steps" in given:
        raise UsageError("the plan of which model?", hint="--model 13B, or the directory of a model")
    replayed.show(run_at(root, run), given, style)
