"""lastgood show: everything that is known of one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from lastgood.cli import text
from lastgood.cli.place import REV, pick, place, run_option
from lastgood.cli.table import Column, Style, choose, emit, emit_json, lines, options, ordered, terminal_width
from lastgood.errors import CorruptCheckpoint
from lastgood.format import archive
from lastgood.format.tensors import read_header
from lastgood.layouts import dcp
from lastgood.model import Record
from lastgood.repo import journal
from lastgood.view import View, look

SCHEMA = "lastgood.show/1"

_TENSORS = (
    Column("name", "TENSOR", str, shrink=True),
    Column("dtype", "DTYPE", str),
    Column("shape", "SHAPE", lambda shape: "×".join(map(str, shape)) or "scalar"),
    Column("bytes", "BYTES", str, right=True),
    Column("file", "FILE", str, shrink=True),
)


@click.command()
@click.argument("rev", type=REV, default="latest")
@run_option
@options
@click.option("--tensors", "list_tensors", is_flag=True, help="Every tensor: dtype, shape, bytes.")
@click.option("--args", "list_arguments", is_flag=True, help="The training arguments, all of them.")
@click.option("--why", is_flag=True, help="Why it is kept, and its history.")
def show(root: str | None, rev: str, style: Style, list_tensors: bool, list_arguments: bool, why: bool) -> None:
    """One checkpoint: parts, files, tensors, arguments, environment and lineage. REV is `latest` if left out."""
    path, word = place(root, rev)
    view = look(path)
    record = pick(view, word or "latest")
    found, problems = tensors(view, record)
    if style.json:
        emit_json(SCHEMA, {"checkpoint": _content(view, record), "tensors": found, "problems": problems})
        return
    if list_tensors:
        known = choose(_TENSORS, [c.key for c in _TENSORS], style)
        emit(lines(known, ordered(found, _TENSORS, style), style, columns_wide=terminal_width()))
        return
    if list_arguments:
        emit(_pairs(dict(sorted(view.arguments(record).items()))))
        return
    emit([*_card(view, record, style, found), *(_history(view, record) if why else []), *_faults(problems)])


def tensors(view: View, record: Record) -> tuple[list[dict[str, Any]], list[str]]:
    """(one row per tensor, what could not be read), from headers alone: no tensor is loaded."""
    rows: list[dict[str, Any]] = []
    problems = []
    base = view.path(record)
    for name in record.manifest.files if record.manifest is not None else ():
        path = base if base.is_file() else base / name
        try:
            if name.endswith(".safetensors"):
                for tensor, slot in read_header(path).slots.items():
                    rows.append(_tensor(tensor, slot.dtype, slot.shape, slot.end - slot.begin, name))
            elif name.rpartition("/")[2] == dcp.METADATA:
                rows += [
                    _tensor(n, dtype, shape, None, name) for n, (dtype, shape) in dcp.read(path.parent).tensors.items()
                ]
            elif name.endswith((".pt", ".pth", ".bin", ".ckpt", ".pkl")) and not _guard(record, name):
                rows += [_tensor(n, r.dtype, r.shape, r.bytes, name) for n, r in archive.tensors(archive.load(path))]
        except CorruptCheckpoint as error:
            problems.append(error.message)
        except (ValueError, RecursionError):  # keys that have no name
            problems.append(f"{name} holds things that can't be named")
    return rows, problems


def _tensor(name: str, dtype: str, shape: tuple[int, ...], size: int | None, file: str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape), "bytes": size, "file": file}


def _guard(record: Record, name: str) -> bool:
    """optimizer.pt and scheduler.pt of ours hold nothing but a message for the stock Trainer."""
    return not record.layout and name in ("optimizer.pt", "scheduler.pt")


def _content(view: View, record: Record) -> dict[str, Any]:
    manifest = record.manifest
    facts: Mapping[str, object] = manifest.facts if manifest is not None else {}
    return {
        "name": record.name,
        "step": record.step,
        "state": record.state,
        "layout": record.layout or "lastgood",
        "id": record.id or None,
        "run": manifest.run if manifest is not None else None,
        "parent": manifest.parent if manifest is not None else None,
        "lineage": manifest.lineage if manifest is not None else (),
        "current": record.current,
        "created": manifest.created if manifest is not None else None,
        "problem": record.problem or None,
        "poisoned": record.poisoned or None,
        "metrics": dict(record.metrics),
        "tags": list(record.pinned),
        "note": view.notes.get(record.id),
        "parts": {k: list(v) for k, v in manifest.parts.items()} if manifest is not None else {},
        "files": {
            name: {"size": entry.size, "xxh3": entry.xxh3 or None, "blake3": entry.blake3 or None}
            for name, entry in (manifest.files.items() if manifest is not None else ())
        },
        "arguments": dict(view.arguments(record)),
        "environment": dict(manifest.environment) if manifest is not None else {},
        "facts": dict(facts),
        "why": next((list(d.reasons) for d in view.decisions() if d.record.name == record.name), []),
    }


def _card(view: View, record: Record, style: Style, found: list[dict[str, Any]]) -> list[str]:
    manifest = record.manifest
    out = [click.style(text.plain(record.name), bold=True)]
    named = f", {', '.join(map(text.plain, record.pinned))}" if record.pinned else ""
    out.append(f"  state      {record.state}{named}" + (f": {text.plain(record.problem)}" if record.problem else ""))
    if record.poisoned:
        out.append(f"  {click.style('poisoned', fg='red')}   {text.plain(record.poisoned)}")
    if record.layout:
        out.append(f"  written by {text.plain(record.layout)}" + (" (adopted)" if record.id else ""))
    if manifest is None:
        return out
    if record.id:
        ids = f"{record.id}   run {manifest.run}   parent {manifest.parent or 'none'}"
        out.append(f"  id         {text.plain(ids)}")
    if manifest.created:
        out.append(f"  saved      {text.moment(manifest.created)} ({text.age(manifest.created)} ago)")
    if view.notes.get(record.id):
        out.append(f"  note       {text.plain(view.notes[record.id])}")
    values = {**({"loss": manifest.facts["loss"]} if "loss" in manifest.facts else {}), **record.metrics}
    if values:
        out.append(
            "  metrics    "
            + "  ".join(f"{text.plain(k)}={_value(v)}" for k, v in values.items() if not text.is_timing(k))
        )
    out.append(click.style(f"parts ({style.size(record.size)})", bold=True))
    for part, names in manifest.parts.items():
        total = sum(manifest.files[name].size for name in names)
        count = [row for row in found if row["file"] in names]
        what = f", {len(count)} tensors" if count else ""
        some = ", ".join(map(text.plain, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        out.append(f"  {text.plain(part):<10} {style.size(total):>10}  {text.files(len(names))}{what}: {some}")
    sections: tuple[tuple[str, Mapping[str, object]], ...] = (
        ("environment", manifest.environment),
        ("facts", {k: v for k, v in manifest.facts.items() if k != "loss"}),
        ("arguments", _notable(view.arguments(record))),
    )
    for title, pairs in sections:
        if pairs:
            out.append(click.style(title, bold=True))
            out += [text.fit(f"  {line}", 240) for line in _pairs(pairs)]
    return out


NOTABLE = (
    "output_dir", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "optim",
    "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "seed", "save_strategy",
    "save_steps", "save_total_limit", "eval_strategy", "eval_steps", "metric_for_best_model", "greater_is_better",
)  # fmt: skip
"""The arguments that a card shows; --args shows all."""


def _notable(arguments: Mapping[str, object]) -> dict[str, object]:
    return {name: arguments[name] for name in NOTABLE if arguments.get(name) is not None}


def _pairs(values: Mapping[str, object]) -> list[str]:
    wide = max((len(str(key)) for key in values), default=0)
    return [f"{text.plain(str(key)):<{wide}}  {text.plain(str(value))}" for key, value in values.items()]


def _value(value: object) -> str:
    return text.number(float(value)) if isinstance(value, (int, float)) else text.plain(str(value))


def _history(view: View, record: Record) -> list[str]:
    out = [click.style("why", bold=True)]
    reasons = next((d.reasons for d in view.decisions() if d.record.name == record.name), ())
    out += [f"  kept: {text.plain(reason)}" for reason in reasons]
    for event in journal.read(view.root):
        if record.id and event.get("id") == record.id:
            when = text.moment(event.get("time"))
            rest = {k: v for k, v in event.items() if k not in ("time", "event", "id", "step")}
            out.append(f"  {when}  {text.plain(str(event.get('event')))}  " + text.plain(str(rest) if rest else ""))
    return out


def _faults(problems: list[str]) -> list[str]:
    return [click.style(f"  can't be read: {text.plain(problem)}", fg="red") for problem in problems]
