"""A loop whose state is copied while it goes on, and a writer that copies as late as a test wants."""

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
from lastgood.state.lazy import Lazy, Pace

WIDTH = 16
PIECE = 200
"""Bytes: a layer's weight takes six pieces."""


class Gate:
    """The writer copies so many pieces and no further one before it is let go: the rest is for whoever trains."""

    def __init__(self, free: int = 0) -> None:
        self.free, self.go, self.held = free, threading.Event(), threading.Event()

    def __call__(self, left: int) -> None:
        if self.free > 0:
            self.free -= 1
            return
        self.held.set()
        assert self.go.wait(120), "nobody let the writer go"


class Late:
    """The writer is held up before some of its pieces; the seed says before which."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, left: int) -> None:
        if self.random.random() < 0.2:
            time.sleep(self.random.random() * 0.002)


class Net(nn.Module):
    """Statistics that change in forward, tied weights, one that isn't contiguous and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.first.weight
        self.turned = nn.Parameter(torch.randn(4, WIDTH).t())
        self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(rows)) * self.frozen
        return self.second(hidden + self.tied(rows)) @ self.turned


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(4, WIDTH)).square().mean()


def step(model: nn.Module, optimizer: Any) -> torch.Tensor:
    found = loss(model)
    optimizer.zero_grad()
    found.backward()
    optimizer.step()
    return found.detach()


def manager(root: Path, wait: Callable[[int], object] | None, **parts: Any) -> lastgood.CheckpointManager:
    """One that saves every step in the background. wait: see Pace; None: copied before training goes on."""
    parts = {"save_steps": 1, "background": Background(lazy=wait is not None), **parts}
    ckpt = lastgood.CheckpointManager(root, **parts)
    ckpt._steps.pace = Pace(small=1, piece=PIECE, wait=wait)
    return ckpt


def window(ckpt: lastgood.CheckpointManager) -> Lazy | None:
    """Of the last save; None if everything was copied at once."""
    found = ckpt._run._window
    return found if isinstance(found, Lazy) and found._pieces > 0 else None
