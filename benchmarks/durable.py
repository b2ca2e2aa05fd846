"""Seconds until a full checkpoint is safe from a power cut, beside the same state written by other means.

A GPT-2 with the state of its AdamW is saved through `CheckpointManager`, by torch.save and by safetensors (each
with an fsync of file and directory), and its number of bytes is written by a plain loop past the page cache, which is
what the disk can do. All take turns in one process; the first save of each is told apart.

    python benchmarks/durable.py [--size 125] [--repeat 7] [--place DIRECTORY] [--json FILE] [--plot FILE]
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

KINDS = ("lastgood", "torch.save + fsync", "safetensors + fsync", "raw O_DIRECT")


class Took(NamedTuple):
    """One save: seconds by the clock, seconds of processors in this process, bytes on disk."""

    wall: float
    cpu: float
    count: int


def trained(millions: float) -> tuple[Any, Any]:
    """A GPT-2 with about so many million parameters, and its AdamW after a step."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    width, words = (768, 50257) if millions >= 60 else (256, 8192)
    layers = max(1, round((millions * 1e6 - (words + 1024) * width) / (12 * width * width)))
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=words, n_embd=width, n_layer=layers, n_head=width // 64, bos_token_id=0, eos_token_id=0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def safe(path: Path) -> None:
    """The file and its name."""
    for place in (path, path.parent):
        handle = os.open(place, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def by_torch(model: Any, optimizer: Any, path: Path) -> None:
    """As most loops do, and made durable."""
    import torch

    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    safe(path)


def by_safetensors(model: Any, optimizer: Any, path: Path) -> None:
    """The same tensors in one file, and made durable."""
    from safetensors.torch import save_file

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{names[id(parameter)]}.{key}": value for key, value in state.items()}
    save_file(tensors, path)
    safe(path)


def raw(count: int, path: Path) -> None:
    """So many bytes from one aligned buffer: no tensors, no hash."""
    block = memoryview(mmap.mmap(-1, 8 << 20))
    block[:] = b"\1" * len(block)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    os.posix_fallocate(handle, 0, count)
    left = count - count % 4096
    while left:
        left -= os.write(handle, block[: min(left, len(block))])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=125, help="million parameters (fp32; AdamW has twice as many)")
    parser.add_argument("--repeat", type=int, default=7)
    figures.options(parser)
    args = parser.parse_args()
    figures.check(args)

    from lastgood import CheckpointManager

    warnings.simplefilter("ignore")
    model, optimizer = trained(args.size)
    place = Path(tempfile.mkdtemp(dir=args.place))
    found: dict[str, list[Took]] = {kind: [] for kind in KINDS}
    try:
        manager = CheckpointManager(place, model=model, optimizer=optimizer, on_error="raise")
        manager.restore(False)
        for number in track(range(1, args.repeat + 2), "interleaved saves"):
            manager.step(number)
            found[KINDS[0]].append(measured(manager.save, place))
            count = found[KINDS[0]][-1].count
            found[KINDS[1]].append(measured(lambda: by_torch(model, optimizer, place / "state.pt"), place))
            found[KINDS[2]].append(measured(lambda: by_safetensors(model, optimizer, place / "state.st"), place))
            found[KINDS[3]].append(measured(lambda count=count: raw(count, place / "raw"), place))  # type: ignore[misc]
        manager._run.close()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    runs = {kind: [took._asdict() for took in some] for kind, some in found.items()}
    document = figures.write(args.json, "durable", size=args.size, runs=runs)
    figures.show(title(document), COLUMNS, rows(document), width=120)
    if args.plot:
        draw(document, args.plot)


COLUMNS = ("", "until durable", "first", "rate", "CPU s", "lastgood is faster by")


def title(document: dict[str, Any]) -> str:
    runs = document["runs"][KINDS[0]]
    return f"{figures.size(runs[0]['count'])} until durable, medians of {len(runs) - 1}"


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each way. The ratios are of saves of the same turn."""
    count = document["runs"][KINDS[0]][0]["count"]
    ours, table = document["runs"][KINDS[0]][1:], []
    for kind, (first, *rest) in document["runs"].items():
        walls = [took["wall"] for took in rest]
        ratios = [theirs["wall"] / mine["wall"] for mine, theirs in zip(ours, rest, strict=True)]
        table.append(
            (
                kind,
                figures.seconds(walls),
                figures.seconds([first["wall"]]),
                f"{figures.size(count / figures.middle(walls))}/s",
                f"{figures.middle(took['cpu'] for took in rest):.2f}",
                figures.spread(ratios) if kind != KINDS[0] else "",
            )
        )
    return table


def draw(document: dict[str, Any], file: Path) -> None:
    walls = {kind: [took["wall"] for took in some[1:]] for kind, some in document["runs"].items()}
    figures.bars(file, title(document), [("seconds until durable", walls, False)])


if __name__ == "__main__":
    main()
