"""What saving costs a training on an accelerator: lastgood, torch.save and torch.distributed.checkpoint.async_save,
beside no saves at all, interleaved, in one process, on the same model (Llama-like, bf16 weights, AdamW).

Two figures of each: the time that the host stands still in a save, the accelerator idle before it; and what a save adds
to the time of the whole run. Both beside the time in which the bytes go into pinned memory and nothing else.
torch.save and async_save leave the bytes in the page cache; lastgood's are on the disk and hashed.

    python benchmarks/gpu.py [--out build] [--place DISK] [--minutes 6]
    python benchmarks/gpu.py --size tiny --device cpu      (its logic, on any machine)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

SIZES = {  # vocabulary, width, layers, heads, key-value heads, inner width, batch, length, steps from save to save
    "1b": (128256, 2048, 16, 32, 8, 8192, 8, 1024, 20),
    "tiny": (512, 128, 2, 4, 2, 256, 2, 16, 4),
}
SAVES = 2
"""In each run."""


class Block(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * groups * self.size, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        y = self.before(x)
        q = self.q(y).view(rows, length, self.heads, self.size).transpose(1, 2)
        k, v = self.kv(y).view(rows, length, 2, self.groups, self.size).permute(2, 0, 3, 1, 4)
        k, v = (one.repeat_interleave(self.heads // self.groups, 1) for one in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(rows, length, width))
        y = self.between(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Its sizes and layers; without positions, which cost nothing and are no weights."""

    def __init__(self, size: str) -> None:
        super().__init__()
        vocabulary, width, layers, heads, groups, inner, *_ = SIZES[size]
        self.words = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, groups, inner) for _ in range(layers))
        self.last = nn.RMSNorm(width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.last(x), self.words.weight)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@dataclass
class Arm:
    """One way to save. save: of a step; rest: what is still to be done behind the run, which isn't part of it."""

    save: Callable[[int], object]
    rest: Callable[[], object] = lambda: None
    stalls: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)
    broken: str = ""


class Bench:
    def __init__(self, size: str, device: str, place: Path) -> None:
        torch.manual_seed(0)
        self.device, self.place = device, place
        *_, self.rows, self.length, self.every = SIZES[size]
        self.vocabulary = SIZES[size][0]
        with torch.device("cpu" if device == "sim" else device):
            self.model = Llama(size)
        self.model = self.model.to(torch.bfloat16).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True if device == "cuda" else None)
        self.done = 0
        self.arms = {
            "no saves": Arm(lambda step: None),
            "lastgood": self._lastgood(),
            "torch.save": Arm(self._torch_save, self._clean),
            "dcp.async_save": self._async(),
        }

    def train(self, arm: Arm) -> None:
        """One run with its saves."""
        began = self._now()
        stalls = []
        for step in range(1, self.every * SAVES + 1):
            ids = torch.randint(self.vocabulary, (self.rows, self.length)).to(self.device)
            self.model(ids).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
            if step % self.every == self.every // 2:  # the last copy has the rest of the run to be noticed in
                before = self._now()
                arm.save(self.done)
                stalls.append(time.perf_counter() - before)
        arm.runs.append(self._now() - began)
        arm.stalls += stalls
        arm.rest()

    def _now(self) -> float:
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    @property
    def bytes(self) -> int:
        weights = list(self.model.parameters())
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in weights + state)

    def _lastgood(self) -> Arm:
        import lastgood

        ckpt = self.ckpt = lastgood.CheckpointManager(
            self.place / "lastgood", model=self.model, optimizer=self.optimizer,
            keep=lastgood.Keep(last=1), background=True, guard="off",
        )  # fmt: skip
        ckpt.restore()

        def save(step: int) -> None:
            ckpt.step(step)
            if ckpt.save() is None:
                raise RuntimeError("lastgood could not save")

        return Arm(save, ckpt.settle)

    def _torch_save(self, step: int) -> None:
        torch.save(self.state, self.place / "torch.pt")

    def _async(self) -> Arm:
        from torch.distributed import checkpoint as dcp

        waiting: list[Any] = []

        def rest() -> None:
            while waiting:
                pending = waiting.pop()
                getattr(pending, "upload_completion", pending).result()

        def save(step: int) -> None:
            rest()
            waiting.append(dcp.async_save(self.state, checkpoint_id=self.place / f"dcp-{step}"))

        def clean() -> None:
            rest()
            self._clean()

        return Arm(save, clean)

    def _clean(self) -> None:
        (self.place / "torch.pt").unlink(missing_ok=True)
        for path in self.place.glob("dcp-*"):
            shutil.rmtree(path)

    def rate(self) -> float:
        """Bytes a second from the device into pinned memory, at best; from memory to memory on the CPU."""
        count = 1 << (30 if self.device == "cuda" else 24)
        source = torch.zeros(count, dtype=torch.uint8, device=self.device)
        target = torch.zeros(count, dtype=torch.uint8, pin_memory=self.device != "cpu")
        best = 0.0
        for _ in range(6):
            before = self._now()
            target.copy_(source, non_blocking=True)
            best = max(best, count / (self._now() - before))
        return best


def measured(bench: Bench, rounds: int, minutes: float) -> dict[str, Any]:
    began, first = time.perf_counter(), {}
    for name, arm in bench.arms.items():  # compiles, allocates, pins: none of it is measured below
        try:
            bench.train(arm)
            first[name] = arm.stalls[0] if name != "no saves" else 0.0
        except Exception as error:
            arm.broken = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        arm.stalls.clear()
        arm.runs.clear()
    names = [name for name, arm in bench.arms.items() if not arm.broken]
    took = 0.0
    for number in range(rounds):
        before = time.perf_counter()
        if before - began + took > minutes * 60:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            bench.train(bench.arms[name])
        took = time.perf_counter() - before
    rate, base = bench.rate(), bench.arms["no saves"].runs
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bench.device == "cuda" else bench.device,
        "torch": torch.__version__, "bytes": bench.bytes, "rate": rate, "copy": bench.bytes / rate,
        "rounds": len(base), "step": statistics.median(base) / (bench.every * SAVES),
    }  # fmt: skip
    for name, arm in bench.arms.items():
        if arm.broken:
            found[name] = {"broken": arm.broken}
            continue
        added = [(mine - none) / SAVES for mine, none in zip(arm.runs, base, strict=True)]
        found[name] = {"first": first[name], "stalls": arm.stalls, "added": added, "runs": arm.runs}
    return found


def told(found: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{found['device']}: {found['bytes'] / 1e9:.3g} GB a save, {found['rounds']} interleaved runs")
    for column in ("", "host stands still, s", "of a bare copy", "added to the run by a save, s", "run, of no saves"):
        table.add_column(column, justify="right" if column else "left")
    none = found["no saves"]["runs"]
    for name in ("no saves", "lastgood", "torch.save", "dcp.async_save"):
        one = found[name]
        if "broken" in one:
            table.add_row(name, f"not measured: {one['broken']}")
            continue
        ratios = [mine / base for mine, base in zip(one["runs"], none, strict=True)]
        stall = statistics.median(one["stalls"])
        table.add_row(name, spread(one["stalls"]), f"{stall / found['copy']:.2f}", spread(one["added"]), spread(ratios))
    console.print(table)
    console.print(
        f"a bare copy into pinned memory: {found['copy']:.3g} s at {found['rate'] / 1e9:.3g} GB/s; a step:"
        f" {found['step']:.3g} s; lastgood's first save, which takes the memory:"
        f" {found['lastgood'].get('first', 0):.3g} s"
    )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g} to {max(values):.3g}]"


def plot(found: dict[str, Any], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    names = [name for name in ("lastgood", "torch.save", "dcp.async_save") if "broken" not in found[name]]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3))
    for axis, key, title in zip(
        axes, ("stalls", "added"), ("the host stands still, s", "added to the run, s"), strict=True
    ):
        axis.boxplot([found[name][key] for name in names])
        axis.set_xticks(range(1, len(names) + 1), names)
        axis.axhline(found["copy"], linestyle="--", color="grey")
        axis.set_title(f"{title} (dashed: a bare copy)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1b")
    parser.add_argument("--device", choices=["cuda", "sim", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each kind, if the time is enough")
    parser.add_argument("--minutes", type=float, default=6.0, help="no round begins that would end later")
    parser.add_argument("--out", type=Path, default=Path("build"), help="where gpu.json and gpu.png go")
    parser.add_argument("--place", type=Path, help="directory on the disk to measure (default: the temporary one)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no CUDA device here (--size tiny --device cpu tries the logic)")
        return 2
    if args.device == "sim":
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        import simulated

        simulated.register(simulated.built(Path(os.environ["LASTGOOD_SIMULATED"])))
    place = Path(tempfile.mkdtemp(dir=args.place))
    try:
        bench = Bench(args.size, args.device, place)
        found = measured(bench, args.rounds, args.minutes)
        bench.ckpt.close()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, args.out / "gpu.png")
    told(found, Console(width=120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
