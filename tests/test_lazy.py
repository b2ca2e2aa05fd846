"""State that is copied while training goes on: the same checkpoints, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
from lastgood.repo import journal
from lastgood.repo.read import records

from lazily import Gate, Late, Net, manager, step
from test_background_exact import content


def trained(root: Path, pace: Any, optimizer: Callable[..., Any]) -> None:
    torch.manual_seed(3)
    model = Net()
    made = optimizer(model.parameters())
    with manager(root, pace, model=model, optimizer=made) as ckpt:
        for number in range(ckpt.restore(), 6):
            ckpt.step(number + 1, loss=step(model, made))


@pytest.mark.parametrize("seed", range(3))
def test_I9_the_same_checkpoints_as_copied_at_once(seed: int, tmp_path: Path) -> None:
    for name, pace in (("a", None), ("b", Late(seed))):
        trained(tmp_path / name, pace, lambda p: torch.optim.AdamW(p, lr=1e-2))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    waits = [e["spent"] for e in journal.read(tmp_path / "b") if e["event"] == "saved"]
    assert len(waits) == 6
