"""How the cost of saves and restores grows: with the bytes of a state, and with the number of its tensors.

Saves before training goes on, the stall of saves in the background, verified restores from a disk that has to be asked,
and beside them the same bytes read without a look at them, torch.save with an fsync and the bare disk, each state in a
process of its own, in turn. The exponent is the slope between two sizes on
logarithmic axes: 1 is linear, less is a fixed cost that is shared out; more than that would be a cost for each pair of
things.

    python benchmarks/scaling.py [--most 1e9] [--tensors 100000] [--repeat 3]
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.progress import track

from benchmarks import figures

COSTS = ("save", "background stall", "restore", "read", "torch.save + fsync", "raw O_DIRECT")
SAVES = 3
"""In a process; the first one isn't counted."""
STEEP = 1.2
"""An exponent above this isn't linear, whatever the noise."""
FEW = 12
"""Tensors of a state whose size is varied."""
WHOLE = 1024
"""Their elements are a multiple of it, as a layer's are: a tensor that doesn't end at a multiple of 64 bytes moves the
next one away from where torch would have put it, and a restore has to move it back."""
SMALL = 64
"""Elements of a tensor where their number is varied."""


def sizes(most: float) -> list[int]:
    """10 MB, 30 MB, 100 MB ... and the largest one, in bytes."""
    steps = [round(10 ** (7 + n / 2), -6) for n in range(20)]
    return [*(int(size) for size in steps if size < most * 0.75), int(most)]


def counts(most: int) -> list[int]:
    """10, 100 ... tensors of the model."""
    return [10**n for n in range(1, 8) if 10**n <= most]


def measure(count: int, elements: int, place: Path) -> dict[str, float]:
    """Seconds of each cost for a model of so many tensors, and its AdamW."""
    import torch

    import lastgood
    from benchmarks.durable import raw
    from benchmarks.states import Small, State
    from benchmarks.ways import TorchSaveSynced

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = Small(count, elements)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found = {}
    for cost, background in (("save", False), ("background stall", True)):
        root = place / cost
        with lastgood.CheckpointManager(
            root, model=model, optimizer=optimizer, background=background, keep=lastgood.Keep(last=1), on_error="raise"
        ) as ckpt:
            ckpt.restore(False)
            times = []
            for number in range(1, SAVES + 2):
                ckpt.step(number)
                times.append(_timed(ckpt.save))
                ckpt.settle()
            found[cost] = figures.middle(times[1:])
        if background:  # the disk may not have room for all of it at the same time
            shutil.rmtree(root)
    (saved,) = (place / "save").glob("checkpoint-*")
    for cost in ("read", "restore"):
        optimizer.state.clear()  # a new process has none yet, nor memory for it
        _forget(saved)
        if cost == "read":
            found[cost] = _timed(lambda: _read(saved, model))
    back = lastgood.CheckpointManager(place / "save", model=model, optimizer=optimizer)
    found["restore"] = _timed(lambda: back.restore("last"))
    back.close()
    way, times = TorchSaveSynced(State("small", model, optimizer, model), place), []
    for number in range(SAVES):
        times.append(_timed(lambda number=number: way.save(number)))  # type: ignore[misc]
        way.path(number).unlink()
    found["torch.save + fsync"] = figures.middle(times)
    times = []
    for _ in range(SAVES):
        times.append(_timed(lambda: raw(way.state.bytes, place / "raw")))
        (place / "raw").unlink()
    found["raw O_DIRECT"] = figures.middle(times)
    return found


def _forget(directory: Path) -> None:
    """Have the system ask the disk for its files."""
    os.sync()
    for file in directory.iterdir():
        with open(file, "rb", buffering=0) as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(directory: Path, model: Any) -> None:
    """The bytes of weights and Adam's state, into the live weights and new memory."""
    import torch

    kept: list[Any] = []
    files = (directory / "model.safetensors", directory / "optimizer.safetensors")
    with open(files[0], "rb") as weights, open(files[1], "rb") as state:
        for parameter in model.parameters():
            weights.readinto(memoryview(parameter.detach().view(torch.uint8).numpy()))
            kept += [torch.empty_like(parameter), torch.empty_like(parameter)]
            for tensor in kept[-2:]:
                state.readinto(memoryview(tensor.detach().view(torch.uint8).numpy()))


def _timed(act: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def apart(act: Callable[[Path], dict[str, float]], place: Path) -> dict[str, float]:
    """What `act` returns, in a process of its own, on an empty directory."""
    inside = place / "run"
    inside.mkdir()
    try:
        return figures.apart(place, lambda: act(inside))  # type: ignore[no-any-return]
    finally:
        shutil.rmtree(inside)
        os.sync()


def exponents(points: list[tuple[float, float]]) -> list[float]:
    """The slope between each two neighbours on logarithmic axes."""
    return [math.log(y2 / y1) / math.log(x2 / x1) for (x1, y1), (x2, y2) in pairwise(points) if min(y1, y2) > 0]


def curve(document: dict[str, Any], axis: str, cost: str) -> list[tuple[float, float]]:
    """(size, median of the rounds)."""
    return [(float(x), figures.middle(run[cost] for run in runs)) for x, runs in document[axis].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--most", type=float, default=1e9, help="bytes of the largest state (8e9: 20 GB of memory, 25 of disk)"
    )
    parser.add_argument("--tensors", type=int, default=100_000, help="tensors of the model with most of them")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    figures.options(parser)
    args = parser.parse_args()
    figures.check(args)
    if args.most < 1e7 or not counts(args.tensors) or args.repeat < 1:
        parser.error("--most is at least 1e7, --tensors at least 10, --repeat at least 1")

    import torch  # noqa: F401 (imported once, before the forks)

    import lastgood  # noqa: F401
    from benchmarks import ways  # noqa: F401

    place = Path(tempfile.mkdtemp(dir=args.place))
    jobs = [("bytes", size, FEW, size // (3 * 4 * FEW) // WHOLE * WHOLE) for size in sizes(args.most)]
    jobs += [("tensors", count, count, SMALL) for count in counts(args.tensors)]
    found: dict[str, dict[str, list[dict[str, float]]]] = {"bytes": {}, "tensors": {}}
    try:
        for axis, x, count, elements in track(jobs * args.repeat, "interleaved runs"):
            run = apart(lambda inside, count=count, elements=elements: measure(count, elements, inside), place)  # type: ignore[misc]
            found[axis].setdefault(str(x), []).append(run)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    document = figures.write(args.json, "scaling", **found)
    show(document)
    if args.plot:
        draw(document, args.plot)


def rows(document: dict[str, Any], axis: str) -> list[tuple[str, ...]]:
    """A line for each size, with the exponents to the size before."""
    table, before = [], [""] * len(COSTS)
    slopes = {cost: exponents(curve(document, axis, cost)) for cost in COSTS}
    for place, (x, runs) in enumerate(document[axis].items()):
        if place:
            before = [f" ^{slopes[cost][place - 1]:.2f}" if place <= len(slopes[cost]) else "" for cost in COSTS]
        cells = [
            figures.seconds([run[cost] for run in runs]) + slope for cost, slope in zip(COSTS, before, strict=True)
        ]
        table.append((figures.size(float(x)) if axis == "bytes" else f"{int(x):,}", *cells))
    return table


def steep(document: dict[str, Any]) -> list[str]:
    """Costs that grew faster than linearly over the last decade, and their exponents."""
    told = []
    for axis in ("bytes", "tensors"):
        for cost in COSTS:
            points = curve(document, axis, cost)
            first = next((point for point in points if point[0] * 10.5 >= points[-1][0]), points[0])
            slope = exponents([first, points[-1]]) if first != points[-1] else []
            if slope and slope[0] > STEEP:
                told.append(f"{cost} by {axis}: exponent {slope[0]:.2f} over the last decade")
    return told


def draw(document: dict[str, Any], file: Path) -> None:
    axes = ("bytes", "tensors")
    panels = [(f"cost by {axis}", axis, {cost: curve(document, axis, cost) for cost in COSTS}) for axis in axes]
    figures.lines(file, "seconds of a save and of a restore", panels)


def show(document: dict[str, Any]) -> None:
    for axis in ("bytes", "tensors"):
        told = f"by {axis}: seconds, and the exponent to the line above"
        figures.show(told, (axis, *COSTS), rows(document, axis), width=150)
    for line in steep(document):
        print(f"not linear: {line}")


if __name__ == "__main__":
    main()
