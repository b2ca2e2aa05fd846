"""lastgood verify: is what lies there what was saved?"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lastgood.cli import text
from lastgood.cli.place import REV, pick, place, run_option
from lastgood.cli.table import Style, emit, emit_json, forms
from lastgood.errors import UsageError
from lastgood.model import Manifest, Record
from lastgood.view import View, look

SCHEMA = "lastgood.verify/1"
LOADED = (
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("adapter_config.json",),
    ("adapter_model.safetensors", "adapter_model.bin"),
)
"""What from_pretrained looks for, the first of each that is there."""


@click.command()
@click.argument("revs", metavar="[REV]...", type=REV, nargs=-1)
@run_option
@forms
@click.option("--full", is_flag=True, help="Read and hash every byte; without it sizes and headers.")
@click.option("--subset", metavar="K/N", help="With --full: only the K-th N-th of the bytes, for a scrub in turns.")
@click.option(
    "--all", "everything", is_flag=True, help="Also foreign checkpoints, and those on branches that were left."
)
def verify(
    root: str | None, revs: tuple[str, ...], style: Style, full: bool, subset: str | None, everything: bool
) -> None:
    """Check checkpoints: sizes and headers, with --full the hash of every byte.

    Checkpoints without hashes (a stock Trainer's, Lightning's ...) are checked by structure: safetensors headers cover
    their files, archives are whole (--full: every checksum), JSON parses, no shard is missing. Exit status 1 if
    anything is wrong.
    """
    path, first = place(root, revs[0] if revs else None)
    view = look(path)
    words = ((first,) if first else ()) + revs[1:]
    chosen = [pick(view, word) for word in words] or _default(view, everything)
    share = _share(subset) if subset else None
    if share is not None and not full:
        raise UsageError("--subset takes a share of what --full reads", hint="add --full")
    results = []
    total = sum(record.size for record in chosen) // (share[1] if share else 1)
    with _progress(total if full else 0) as advance:
        for record in chosen:
            started = time.perf_counter()
            part = _part(record, share)
            faults = view.problems(part, full=full, progress=advance) if part is not None else ()
            if record.id and (share is None or share[0] == 1):
                faults += instead(view.path(record), record.manifest)
            if record.state == "incomplete" and not faults:
                faults = (record.problem,)
            results.append(_result(record, faults, time.perf_counter() - started, part))
    bad = [result for result in results if result["problems"]]
    if style.json:
        emit_json(SCHEMA, {"full": full, "checkpoints": results})
    else:
        emit([_line(result, style, full) for result in results])
        if bad:
            click.echo(
                f"{len(bad)} of {len(results)} checkpoints are damaged; `lastgood resume` says what is used instead",
                err=True,
            )
    if bad:
        raise click.exceptions.Exit(1)


def instead(directory: Path, manifest: Manifest | None) -> tuple[str, ...]:
    """Files that came into a checkpoint later and that from_pretrained would load in the place of its own."""
    saved = manifest.files if manifest is not None else {}
    found = []
    for order in LOADED:
        for name in order:
            if name in saved:
                break
            if os.path.lexists(directory / name):
                found.append(f"{name} isn't part of it, and from_pretrained would load it")
                break
    return tuple(found)


def _default(view: View, everything: bool) -> list[Record]:
    return [r for r in view.records if everything or (r.state != "foreign" and (r.current or not r.ours))]


def _share(word: str) -> tuple[int, int]:
    first, _, second = word.partition("/")
    if not first.isdigit() or not second.isdigit() or not 1 <= int(first) <= int(second) <= 10000:
        raise UsageError(f"--subset {word}: give it as 1/7, 2/7 ... 7/7", hint="the first of seven nights is 1/7")
    return int(first), int(second)


def _part(record: Record, share: tuple[int, int] | None) -> Record | None:
    """The record with the files of one share alone: each file belongs to exactly one, whatever else is there."""
    if share is None or record.manifest is None:
        return record
    import zlib

    import msgspec

    number, count = share
    mine = {
        name: entry
        for name, entry in record.manifest.files.items()
        if zlib.crc32(f"{record.name}/{name}".encode()) % count == number - 1
    }
    if not record.id:  # structure is checked as a whole
        return record if zlib.crc32(record.name.encode()) % count == number - 1 else None
    return msgspec.structs.replace(record, manifest=msgspec.structs.replace(record.manifest, files=mine))


def _result(record: Record, faults: tuple[str, ...], seconds: float, part: Record | None) -> dict[str, Any]:
    return {
        "name": record.name,
        "step": record.step if record.step >= 0 else None,
        "id": record.id or None,
        "state": record.state,
        "layout": record.layout or "lastgood",
        "files": len(part.manifest.files) if part is not None and part.manifest is not None else 0,
        "bytes": part.size if part is not None else 0,
        "seconds": round(seconds, 3),
        "hashed": bool(record.id) and record.state != "foreign",
        "problems": list(faults),
    }


def _line(result: dict[str, Any], style: Style, full: bool) -> str:
    name = text.plain(result["name"])
    if result["problems"]:
        faults = "; ".join(map(text.plain, result["problems"][:4]))
        more = len(result["problems"]) - 4
        return (
            f"{name}  " + click.style("DAMAGED", fg="red") + f"  {faults}" + (f" and {more} more" if more > 0 else "")
        )
    how = ("every hash" if result["hashed"] else "structure and checksums") if full else "sizes and headers"
    speed = f" in {result['seconds']:.1f} s" if full and result["seconds"] >= 0.1 else ""
    said = f"{result['files']} files, {style.size(result['bytes'])}, {how}{speed}"
    return f"{name}  " + click.style("ok", fg="green") + f"  {said}"


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on stderr where somebody is watching; `advance(bytes)`."""
    if total < 64 << 20 or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
