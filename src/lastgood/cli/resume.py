"""lastgood resume: which checkpoint a run would continue from, and why not the others."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from lastgood.cli import text
from lastgood.cli.place import run_at, run_option
from lastgood.cli.table import Style, emit, emit_json, forms
from lastgood.errors import NoCheckpoint
from lastgood.model import Record
from lastgood.resumption import choose
from lastgood.store import local
from lastgood.view import View, look

SCHEMA = "lastgood.resume/1"


@click.command()
@click.argument("run", required=False)
@run_option
@forms
@click.option("--from", "start", default="last", metavar="last|best|STEP", help="Where to resume from (default: last).")
@click.option("--check", is_flag=True, help="Hash every byte, as a resume does; without it sizes and headers.")
@click.option("--print-path", is_flag=True, help="Print the path alone, for scripts.")
def resume(root: str | None, run: str | None, style: Style, start: str, check: bool, print_path: bool) -> None:
    """Which checkpoint this run would resume from, what was passed over and why, and what it holds.

    Nothing is changed: a damaged checkpoint is quarantined when a run really resumes. Exit status 3 if there is none.
    """
    path = run_at(root, run)
    view = look(path, sure=True)
    started = time.perf_counter()
    chosen, skipped = choose(view, start, full=check)
    seconds = time.perf_counter() - started
    if print_path:
        if chosen is None:
            raise _none(view, start, skipped)
        click.echo(str(view.path(chosen)))
        return
    if style.json:
        content = None if chosen is None else {"name": chosen.name, "step": chosen.step, "path": str(view.path(chosen))}
        passed = [{"name": name, "reason": reason} for name, reason in skipped]
        emit_json(SCHEMA, {"checked": "full" if check else "quick", "checkpoint": content, "passed_over": passed})
        if chosen is None:
            raise click.exceptions.Exit(3)
        return
    wide = max((text.width(name) for name in [n for n, _ in skipped] + ([chosen.name] if chosen else [])), default=0)
    out = [f"{_pad(name, wide)}  {click.style('PASSED OVER', fg='yellow')}  {text.plain(why)}" for name, why in skipped]
    if chosen is None:
        emit(out)
        raise _none(view, start, [])
    files = len(chosen.manifest.files) if chosen.manifest is not None else 0
    how = "hashed" if check and chosen.id else "checked"
    took = f" in {seconds:.1f} s" if check else ", sizes and headers; --check hashes them"
    out.append(
        f"{_pad(chosen.name, wide)}  {click.style('OK', fg='green')}           {files} files, "
        f"{style.size(chosen.size)} {how}{took}   <- would resume here"
    )
    out += [f"  {text.plain(part):<10} {text.plain(what)}" for part, what in contents(view, chosen)]
    redo = [r.step for r in view.records if r.current and r.step > chosen.step and r.state in ("incomplete", "full")]
    if redo and start == "last":
        out.append(f"  at least {max(redo) - chosen.step} steps have to be redone")
    emit(out)


def _none(view: View, start: str, skipped: list[tuple[str, str]]) -> NoCheckpoint:
    listing = "".join(f"\n  {name}: {reason}" for name, reason in skipped)
    return NoCheckpoint(
        f"no checkpoint in {view.root} can be resumed from ({start}){listing}",
        hint="`lastgood verify --full` says what is damaged; a fresh start leaves everything as it is",
    )


def contents(view: View, record: Record) -> list[tuple[str, str]]:
    """(part, what it holds), read without torch."""
    if record.manifest is None:
        return []
    if record.layout:
        return [(part, text.files(len(names))) for part, names in record.manifest.parts.items() if names]
    try:
        saved: dict[str, Any] = json.loads(local.read(view.path(record) / "resume.json", 1 << 30))
    except (OSError, ValueError, RecursionError):
        return []
    rows = [("model", text.files(len(record.manifest.parts.get("model", ()))))]
    optimizer, scheduler, data = (saved.get(part) for part in ("optimizer", "scheduler", "data"))
    if isinstance(optimizer, dict):
        kind = str(optimizer.get("class", "?")).rpartition(".")[2]
        rows.append(("optimizer", f"{kind}, {len(optimizer.get('state') or ())} parameters"))
    if isinstance(scheduler, dict):
        rates: Any = scheduler.get("_last_lr")
        rows.append(("scheduler", f"learning rate {rates[0]:.4g}" if _numbers(rates) else "yes"))
    if isinstance(saved.get("rng"), dict):
        rows.append(("rng", "python, numpy, torch" + ("" if not saved["rng"].get("devices") else " and devices")))
    if isinstance(data, dict):
        rows.append(("data", f"batch {data.get('consumed', '?')} of the epoch"))
    if saved.get("scaler") is not None:
        rows.append(("scaler", "yes"))
    return rows


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], (int, float))


def _pad(name: str, wide: int) -> str:
    return text.plain(name) + " " * (wide - text.width(text.plain(name)))
