"""A training loop of one's own, after nanoGPT: kill it whenever you like, the same command goes on.

    python examples/plain_loop.py OUT --steps 200

A small transformer learns the standard library's source, byte by byte: AdamW, warm-up and cosine, gradient clipping
and accumulation, bfloat16, dropout, an evaluation every 20 steps. `torch_save_loop.py` is the same with torch.save.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lastgood

LENGTH, WIDTH, HEADS, LAYERS = 24, 32, 2, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(self.before(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Transformer(nn.Module):
    """Bytes -> the loss of predicting each next one."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.bytes.weight
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.bytes(rows[:, :-1]) + self.places.weight
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def text() -> tuple[DataLoader[tuple[Tensor, ...]], Tensor]:
    """A loader of pieces of the standard library's source, and pieces held out for the evaluation."""
    files = sorted(Path(os.__file__).parent.glob("a*.py"))
    data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    rows = data.unfold(0, LENGTH + 1, LENGTH)
    return DataLoader(TensorDataset(rows[64:]), batch_size=4, shuffle=True, drop_last=True), rows[:64]


def endless(loader: DataLoader[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    while True:
        for (rows,) in loader:
            yield rows


def warm_up_and_cosine(steps: int) -> Callable[[int], float]:
    return lambda step: min((step + 1) / 10, 0.55 + 0.45 * math.cos(math.pi * min(step / steps, 1)))


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    loss = model(rows).item()
    model.train()
    return float(loss)


def train(out: str, steps: int) -> nn.Module:
    torch.manual_seed(1337)
    model, (loader, held_out) = Transformer(), text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_cosine(steps))
    batches = endless(loader)
    keep = lastgood.Keep(last=2, best=1, monitor="val_loss", mode="min")
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "dataloader": loader}
    with lastgood.CheckpointManager(out, save_steps=20, keep=keep, **parts) as ckpt:
        for step in range(ckpt.restore(), steps):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(next(batches)) / 2
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            ckpt.step(step + 1, loss=loss.detach() * 2)
            if (step + 1) % 20 == 0:
                ckpt.record(step + 1, val_loss=evaluate(model, held_out))
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.steps)
    best = lastgood.open(args.out).best("val_loss", "min")
    print(f"best: step {best.step}, val_loss {best.metrics['val_loss']:.4f}, in {args.out}/{best.name}")
