"""A loop whose state is large enough to be copied later, and whose writer is as late as the test wants."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lastgood
from lastgood.background import Background

WIDTH = 256
"""A layer's weight has 256 KiB: more than what is copied at once."""


class Gate:
    """The writer copies no piece before it is let go; what is left is for the thread that trains."""

    def __init__(self) -> None:
        self.go, self.waiting = threading.Event(), threading.Event()

    def __call__(self, left: int) -> None:
        self.waiting.set()
        assert self.go.wait(120), "nobody let the writer go"


class Late:
    """The writer is held up before some of its pieces; the seed says before which."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, left: int) -> None:
        if self.random.random() < 0.5:
            time.sleep(self.random.random() * 0.004)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows)


def step(model: nn.Module, optimizer: Any) -> torch.Tensor:
    loss = model(torch.randn(4, WIDTH)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def manager(root: Path, pace: Callable[[int], object] | None = None, **parts: Any) -> lastgood.CheckpointManager:
    """One that saves every step in the background; pace as in `lastgood.state.lazy.Lazy`, None: before training goes
    on."""
    parts = {"save_steps": 1, "background": Background(lazy=pace is not None), "guard": "off", **parts}
    ckpt = lastgood.CheckpointManager(root, **parts)
    ckpt._steps.pace = pace
    return ckpt
