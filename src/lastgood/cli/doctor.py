"""lastgood doctor: what is wrong, what it means, how to fix it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lastgood.cli import text
from lastgood.cli.place import find_run, run_at, run_option
from lastgood.cli.table import Style, emit, emit_json, forms
from lastgood.errors import LastgoodError, NoRun, UsageError
from lastgood.repo.layout import step_of

if TYPE_CHECKING:
    from lastgood.doctor.disk import Disk
    from lastgood.doctor.finding import Finding
    from lastgood.doctor.fix import Step
    from lastgood.doctor.log import Log
    from lastgood.doctor.rule import Rule

SCHEMA = "lastgood.doctor/1"
COLOURS = {"error": "red", "warning": "yellow", "info": "cyan", "benign": "green"}
SHOWN = 3
"""Findings of one rule that are shown in full; the others are counted."""


@click.command(context_settings={"allow_interspersed_args": True})
@click.argument("words", metavar="[RUN|-] [-- CMD...]", nargs=-1)
@run_option
@forms
@click.option("--log", metavar="FILE|-", help="A traceback or log; `-` (or a bare -) reads standard input.")
@click.option("--args", "arguments", metavar="FILE", help="Training arguments: JSON, YAML or training_args.bin.")
@click.option("--fix", is_flag=True, help="Mend what can be mended safely: quarantine, relink, adopt; never delete.")
@click.option("--select", metavar="CODE,...", default="", help="Only rules whose codes begin so: CKR, CKS001.")
@click.option("--ignore", metavar="CODE,...", default="", help="Not these.")
@click.option("--full", is_flag=True, help="Look at every checkpoint closely, and read every byte.")
@click.option("--rules", is_flag=True, help="List the rules; with --select, explain them.")
@click.option("--prove", type=int, metavar="STEP", help="Resume from STEP in a copy, by CMD, and compare step by step.")
@click.option("--steps", type=click.IntRange(1), default=20, metavar="N", help="With --prove: so many (default: 20).")
@click.option(
    "--rtol",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    metavar="R",
    help="With --prove: tolerate R of a value.",
)
def doctor(root: str | None, words: tuple[str, ...], style: Style, **o: Any) -> None:
    """What is wrong with a run, its settings or its log: what was seen, what it means and how to fix it.

    Without arguments the run here is examined. Exit status 1 if there are errors or warnings.

    \b
    python train.py 2>&1 | lastgood doctor -
    lastgood doctor out --log train.log --args config.yaml
    lastgood doctor out --prove 500 -- python train.py
    """
    select, ignore = _codes(o["select"]), _codes(o["ignore"])
    if o["rules"]:
        _list(select, ignore, style)
        return
    run, command, log = _words(words, o["log"], o["prove"])
    if o["prove"] is not None:
        _prove(run_at(root, run), o["prove"], command, o["steps"], o["rtol"], style)
        return
    from lastgood.doctor.arguments import load
    from lastgood.doctor.diagnose import case_of, examine, serious
    from lastgood.doctor.disk import Disk
    from lastgood.doctor.fix import execute, steps
    from lastgood.doctor.log import read

    started = time.time()
    said = None if log is None else read(_read(log, style))
    given = None if o["arguments"] is None else load(o["arguments"])
    place = _place(root, run, optional=said is not None or given is not None, said="" if said is None else said.text)
    if place is None and said is None and given is None:
        raise NoRun("there is nothing to look at", hint="name a run directory, --log FILE or --args FILE")
    disk = None if place is None else Disk(place, full=o["full"])
    found = examine(case_of(disk, said, given), select=select, ignore=ignore)
    todo: tuple[Step, ...] = ()
    done: list[str] = []
    stopped: LastgoodError | None = None
    if o["fix"]:
        if disk is None:
            raise UsageError("--fix mends a run directory", hint="lastgood doctor RUN --fix")
        since = started if log == "-" and not sys.stdin.isatty() else None
        todo = steps(disk, found, since=since)
        stopped = _do(execute(disk, todo, since=since), done)
    if style.json:
        emit_json(SCHEMA, _json(disk, found, todo, done))
    else:
        emit(_report(disk, found, looked_at=_looked(disk, said is not None, given is not None), unknown=_unknown(said)))
        for step in todo:
            if step.why_not:
                click.echo(str(step), err=True)
        for line in done:
            click.echo(f"fixed  {text.plain(line)}", err=True)
        if o["fix"] and not todo:
            why = "see the fix of each finding" if found else "nothing is wrong"
            click.echo(f"nothing here can be mended by --fix: {why}", err=True)
    if stopped is not None:
        raise stopped
    if serious(found):
        raise click.exceptions.Exit(1)


def _do(repairs: Iterator[str], done: list[str]) -> LastgoodError | None:
    """Carry them out; what stops that is told after the findings, which are worth as much without it."""
    try:
        done += repairs
    except OSError as error:
        why = f"--fix stopped: {error.strerror or error}"
        return LastgoodError(why, hint="what it had done is listed above, the rest is as it was")
    except LastgoodError as error:
        return error
    return None


def _codes(word: str) -> tuple[str, ...]:
    return tuple(code.strip() for code in word.split(",") if code.strip())


def _words(words: Sequence[str], log: str | None, prove: int | None) -> tuple[str | None, tuple[str, ...], str | None]:
    """(run, command, log): a bare - is the log on standard input, a command needs --prove."""
    rest = list(words)
    run = None
    if rest and rest[0] == "-":
        if log not in (None, "-"):
            raise UsageError("two logs are named: - and --log", hint="leave one out")
        rest.pop(0)
        log = "-"
        if rest and prove is None:
            run = rest.pop(0)
    elif rest and (prove is None or Path(rest[0]).is_dir()):
        run = rest.pop(0)
        if rest and rest[0] == "-":
            rest.pop(0)
            log = "-"
    if rest and prove is None:
        raise UsageError(f"what is {text.plain(rest[0])}?", hint="a command is run with --prove STEP alone")
    if prove is not None and not rest:
        raise UsageError("--prove needs the command that trains", hint="... --prove 500 -- python train.py")
    return run, tuple(rest), log


def _read(log: str, style: Style) -> str:
    """The text of the log. What comes through a pipe is shown as it comes: the training's output isn't swallowed."""
    from lastgood.doctor.log import LIMIT

    if log != "-":
        try:
            with open(log, "rb") as file:
                file.seek(max(0, file.seek(0, 2) - LIMIT))
                return file.read().decode("utf-8", "replace")
        except OSError as error:
            raise UsageError(f"{text.plain(log)} can't be read: {error.strerror or error}") from error
    kept: list[str] = []
    size = 0
    for raw in sys.stdin.buffer:
        line = raw.decode("utf-8", "replace")
        if not sys.stdin.isatty():
            click.echo(line, nl=False, err=style.json)
        kept.append(line)
        size += len(line)
        while size > 2 * LIMIT and len(kept) > 1:
            size -= len(kept.pop(0))
    return "".join(kept)


def _place(root: str | None, run: str | None, *, optional: bool, said: str) -> Path | None:
    """The run to look at: the one named, the one here, or the one that the log speaks of."""
    if run is not None or root or not optional:
        return run_at(root, run)
    try:
        return find_run(root)
    except NoRun:
        pass
    for word in reversed(said.replace("'", " ").replace('"', " ").split()):
        parts = Path(word.rstrip(":,.;)")).parts
        for at, part in enumerate(parts):
            if step_of(part) is not None and at and Path(*parts[: at + 1]).is_dir():
                return Path(*parts[:at])
    return None


def _unknown(said: Log | None) -> str:
    """What a log without any finding has to say all the same; "" if nothing."""
    if said is None:
        return ""
    if not said.text.strip():
        return "the log is empty: with `2>&1 |` the errors come through the pipe, too"
    last = next((raised for raised in said.raised if raised.frames and raised.kind), None)
    if last is None:
        return ""
    what = next((line for line in reversed(last.text.splitlines()) if line.startswith(last.kind)), last.kind)
    return f"no rule knows the log's last error: {text.plain(what[:200])}"


def _looked(disk: Disk | None, log: bool, arguments: bool) -> str:
    words = []
    if disk is not None:
        count = len(disk.records)
        words = [f"{count} checkpoint{'' if count == 1 else 's'} in {text.plain(str(disk.root))}"]
    words += ["the log"] * log + ["the arguments"] * arguments
    return ", ".join(words)


def _report(disk: Disk | None, found: Sequence[Finding], looked_at: str, unknown: str) -> list[str]:
    from lastgood.doctor.finding import SERIOUS

    good = ""
    if disk is not None:
        good = f"; a resume would take {disk.good.name}" if disk.good else "; there is nothing to resume from"
    explained = any(finding.where == "log" and finding.severity in SERIOUS for finding in found)
    last = [unknown] if unknown and not explained else []
    if not found:
        healthy = "" if last else f"{click.style('healthy', fg='green')}: "
        return [f"{healthy}nothing found in {looked_at}{good}", *last]
    out: list[str] = []
    shown: dict[str, int] = {}
    for finding in found:
        shown[finding.code] = shown.get(finding.code, 0) + 1
        if shown[finding.code] <= SHOWN:
            out += [*_lines(finding), ""]
    more = {code: count - SHOWN for code, count in shown.items() if count > SHOWN}
    out += [f"{code}: {count} more like these (--json has them all)" for code, count in more.items()]
    counts = [f"{n} {_many(s, n)}" for s in COLOURS if (n := sum(f.severity == s for f in found))]
    return [*out, f"{', '.join(counts)} in {looked_at}{good}", *last]


def _many(severity: str, count: int) -> str:
    return f"{severity}s" if count > 1 and severity in ("error", "warning") else severity


def _lines(finding: Finding) -> list[str]:
    colour = COLOURS[finding.severity]
    where = "" if finding.where in ("log", "arguments") else f"{text.plain(finding.where)}: "
    out = [f"{click.style(f'{finding.code} {finding.severity}', fg=colour)}  {where}{text.plain(finding.title)}"]
    out += _part("saw", [finding.saw])
    out += _part("evidence", finding.evidence)
    out += _part("means", [finding.means])
    return out + _part("fix", finding.fix)


def _part(name: str, texts: Sequence[str]) -> list[str]:
    lines = [line for one in texts for line in one.splitlines() if line.strip()]
    return [f"  {name if at == 0 else '':<9} {text.plain(line)}" for at, line in enumerate(lines)]


def _json(disk: Disk | None, found: Sequence[Finding], todo: Sequence[Step], done: Sequence[str]) -> dict[str, Any]:
    from lastgood.doctor.diagnose import plain

    return {
        "run": None if disk is None else str(disk.root),
        "resume": None if disk is None or disk.good is None else disk.good.name,
        "findings": [plain(finding) for finding in found],
        "left": [{"step": str(step), "why": step.why_not} for step in todo if step.why_not],
        "fixed": list(done),
    }


def _list(select: Sequence[str], ignore: Sequence[str], style: Style) -> None:
    from lastgood.doctor.diagnose import chosen

    rules = chosen(select, ignore)
    if style.json:
        keys = ("code", "title", "severity", "means", "cause", "fix", "source")
        emit_json("lastgood.rules/1", {"rules": [{key: getattr(rule, key) for key in keys} for rule in rules]})
    elif select:
        emit([line for rule in rules for line in (*_explained(rule), "")][:-1])
    else:
        emit([f"{rule.code}  {rule.severity:<7}  {rule.title}" for rule in rules])


def _explained(rule: Rule) -> list[str]:
    out = [f"{click.style(f'{rule.code} {rule.severity}', fg=COLOURS[rule.severity])}  {rule.title}"]
    for name, texts in (
        ("means", (rule.means,)),
        ("cause", (rule.cause,)),
        ("fix", rule.fix),
        ("source", (rule.source,)),
    ):
        out += _part(name, texts)
    return out


def _prove(root: Path, step: int, command: Sequence[str], steps: int, rtol: float, style: Style) -> None:
    from lastgood.doctor.prove import prove

    click.echo(f"resuming from step {step} in a copy: {shlex.join(command)}", err=True)
    proof = prove(root, step, command, steps=steps, rtol=rtol)
    if style.json:
        import msgspec

        emit_json("lastgood.proof/1", msgspec.to_builtins(proof))
    else:
        emit([text.plain(line) for line in proof.lines()])
    if proof.code:
        raise click.exceptions.Exit(proof.code)
