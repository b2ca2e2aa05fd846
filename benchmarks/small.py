"""Seconds until a small checkpoint is safe from a power cut: an adapter's, and others of many small tensors.

A module with so many trained tensors and the state of its AdamW (three tensors and a count for each) is saved through
`CheckpointManager`, and the same tensors by safetensors and by torch.save into one file, with an fsync of file and
directory. All take turns in one process, and the ratios are of saves of the same turn.

    python benchmarks/small.py [--state 300x7500 3000x1000 20000x100] [--repeat 15] [--place DIRECTORY]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.durable import by_safetensors, by_torch

KINDS = ("lastgood", "safetensors + fsync", "torch.save + fsync")


def trained(count: int, width: int) -> tuple[Any, Any]:
    """A module with `count` tensors of `width` numbers under names as PEFT gives them, and its AdamW after a step."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Module()
    for number in range(count):
        name = f"base_model_layers_{number // 14}_self_attn_{number % 14 // 2}_lora_{'AB'[number % 2]}"
        model.register_parameter(name, torch.nn.Parameter(torch.randn(width)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def measured(act: Callable[[], Any], place: Path) -> float:
    """Once, on a disk that has nothing else to write; what was written is removed."""
    os.sync()
    before = set(place.iterdir())
    began = time.perf_counter()
    act()
    took = time.perf_counter() - began
    for path in set(place.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return took


def interleaved(count: int, width: int, repeat: int, place: Path) -> dict[str, list[float]]:
    """Seconds of each save by kind; the first of each kind leads the list."""
    from lastgood import CheckpointManager

    model, optimizer = trained(count, width)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    manager = CheckpointManager(place, model=model, optimizer=optimizer, on_error="raise", background=False)
    manager.restore(False)
    for number in track(range(1, repeat + 2), f"{count} tensors"):
        manager.step(number)
        found[KINDS[0]].append(measured(manager.save, place))
        found[KINDS[1]].append(measured(lambda: by_safetensors(model, optimizer, place / "state.st"), place))
        found[KINDS[2]].append(measured(lambda: by_torch(model, optimizer, place / "state.pt"), place))
    manager._run.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", nargs="+", default=["300x7500", "3000x1000", "20000x100"], metavar="TENSORSxNUMBERS")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--place", type=Path, help="directory on the disk to measure (default: the temporary one)")
    args = parser.parse_args()

    warnings.simplefilter("ignore")
    for state in args.state:
        count, width = map(int, state.split("x"))
        place = Path(tempfile.mkdtemp(dir=args.place))
        try:
            show(f"{count:,} tensors of {width:,} numbers", interleaved(count, width, args.repeat, place))
        finally:
            shutil.rmtree(place, ignore_errors=True)


def show(what: str, found: dict[str, list[float]]) -> None:
    """The table. A ratio above 1: lastgood took less."""
    table = Table(title=f"{what} and their AdamW, until durable, medians of {len(found[KINDS[0]]) - 1}")
    table.add_column("")
    for column in ("milliseconds", "spread", "first", "lastgood is faster by"):
        table.add_column(column, justify="right")
    ours = found[KINDS[0]][1:]
    for kind, (first, *rest) in found.items():
        walls = sorted(1000 * wall for wall in rest)
        ratios = sorted(theirs / mine for mine, theirs in zip(ours, rest, strict=True))
        table.add_row(
            kind,
            f"{statistics.median(walls):.1f}",
            f"{walls[0]:.1f}-{walls[-1]:.1f}",
            f"{1000 * first:.1f}",
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if kind != KINDS[0] else "",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
