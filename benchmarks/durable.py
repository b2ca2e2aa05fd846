"""Seconds until a full checkpoint is safe from a power cut, beside the same state written by other means.

Each state is saved through `CheckpointManager`, by torch.save, by safetensors in one file and as the stock Trainer does
(each with an fsync of files and directories), and its number of bytes is written by a plain loop past the page cache,
which is what the disk can do. All take turns in one process for each state; the first save of each is told apart.

    python benchmarks/durable.py [--state gpt2-125m lora small-3000] [--repeat 7]
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.progress import track

from benchmarks import figures

KINDS = ("lastgood", "torch.save + fsync", "safetensors + fsync", "stock Trainer + fsync")
RAW = "raw O_DIRECT"
STATES = ("gpt2-125m", "llama-0.5b-bf16", "lora", "small-300x7500", "small-3000", "small-20000")


class Took(NamedTuple):
    """One save: seconds by the clock, seconds of processors in this process, bytes on disk."""

    wall: float
    cpu: float
    count: int


def raw(count: int, path: Path) -> None:
    """So many bytes, in whole blocks, from one aligned buffer: no tensors, no hash."""
    from benchmarks.ways import safe

    whole = -(-count // 4096) * 4096
    memory = mmap.mmap(-1, min(8 << 20, whole))
    memory.madvise(mmap.MADV_HUGEPAGE)
    block = memoryview(memory)
    block[:] = b"\1" * len(block)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    os.posix_fallocate(handle, 0, whole)
    while whole:
        whole -= os.write(handle, block[: min(whole, len(block))])
    os.close(handle)
    safe(path)


def measured(act: Callable[[], Any], place: Path) -> Took:
    """Once, on a disk that has nothing else to write; what was written is removed."""
    os.sync()
    before = set(place.rglob("*"))
    cpu, wall = time.process_time(), time.perf_counter()
    act()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    new = [path for path in place.rglob("*") if path not in before and path.is_file()]
    took = Took(wall, cpu, sum(path.stat().st_size for path in new))
    for path in place.iterdir():
        if path not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return took


def interleaved(name: str, repeat: int, place: Path) -> dict[str, list[dict[str, float]]]:
    """Every save of one state, by kind; the first of each kind leads the list."""
    from benchmarks.states import made
    from benchmarks.ways import WAYS

    warnings.simplefilter("ignore")
    state = made(name)
    ways = {kind: WAYS[kind](state, place) for kind in KINDS}
    found: dict[str, list[Took]] = {kind: [] for kind in (*KINDS, RAW)}
    for number in range(1, repeat + 2):
        for kind, way in ways.items():
            way.step(number)
            found[kind].append(measured(lambda way=way, number=number: way.save(number), place))  # type: ignore[misc]
        count = found[KINDS[0]][-1].count
        found[RAW].append(measured(lambda count=count: raw(count, place / "raw"), place))  # type: ignore[misc]
    return {kind: [took._asdict() for took in some] for kind, some in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", nargs="+", default=list(STATES), help=f"of benchmarks/states.py: {' '.join(STATES)}")
    parser.add_argument("--repeat", type=int, default=7)
    figures.options(parser)
    args = parser.parse_args()
    figures.check(args)
    if args.repeat < 1:
        parser.error("--repeat is at least 1")

    import torch  # noqa: F401 (imported once, before the forks)

    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in track(args.state, "states"):
        place = Path(tempfile.mkdtemp(dir=args.place))
        inside = place / "run"
        inside.mkdir()
        try:
            runs[name] = figures.apart(place, lambda name=name, inside=inside: interleaved(name, args.repeat, inside))  # type: ignore[misc]
        finally:
            shutil.rmtree(place, ignore_errors=True)
    document = figures.write(args.json, "durable", repeat=args.repeat, runs=runs)
    figures.show(title(document), COLUMNS, rows(document), width=150)
    if args.plot:
        draw(document, args.plot)


COLUMNS = ("", "until durable", "first", "rate", "CPU s", "lastgood is faster by")


def title(document: dict[str, Any]) -> str:
    return f"Until durable, medians of {document['repeat']}"


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each way with each state. The ratios are of saves of the same turn."""
    table = []
    for state, kinds in document["runs"].items():
        count, ours = kinds[KINDS[0]][0]["count"], kinds[KINDS[0]][1:]
        for kind, (first, *rest) in kinds.items():
            walls = [took["wall"] for took in rest]
            ratios = [theirs["wall"] / mine["wall"] for mine, theirs in zip(ours, rest, strict=True)]
            table.append(
                (
                    f"{state}, {figures.size(count)}: {kind}" if kind == KINDS[0] else kind,
                    figures.seconds(walls),
                    figures.seconds([first["wall"]]),
                    f"{figures.size(count / figures.middle(walls))}/s",
                    f"{figures.middle(took['cpu'] for took in rest):.3f}",
                    figures.spread(ratios) if kind != KINDS[0] else "",
                )
            )
    return table


def draw(document: dict[str, Any], file: Path) -> None:
    """A panel for each state."""
    panels = [
        (f"{state}, s", {kind: [took["wall"] for took in some[1:]] for kind, some in kinds.items()}, False)
        for state, kinds in document["runs"].items()
    ]
    figures.bars(file, title(document), panels)


if __name__ == "__main__":
    main()
