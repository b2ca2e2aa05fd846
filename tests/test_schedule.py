"""The steps at which a run will save, against the real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from lastgood.schedule import save_points, total_steps

from training import Case


class Saves(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


@pytest.mark.parametrize(
    ("rows", "args"),
    [
        (64, {"save_steps": 3}),
        (64, {"save_steps": 0.3}),
        (64, {"save_steps": 500}),
        (6, {"save_strategy": "epoch"}),
        (6, {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}),
        (64, {"save_strategy": "no"}),
    ],
)
def test_the_schedule_is_the_real_trainers(rows: int, args: dict[str, Any], tmp_path: Path) -> None:
    saves = Saves()
    trainer = Case("schedule", rows=rows, args=args).trainer(tmp_path, saves)
    trainer.train()
    per_epoch = (rows + 1) // 2
    length = total_steps(trainer.args.max_steps, trainer.args.num_train_epochs, per_epoch)
    assert length == trainer.state.global_step
    strategy = str(args.get("save_strategy", "steps"))
    planned = save_points(strategy, trainer.args.save_steps, max_steps=length, steps_per_epoch=per_epoch)
    assert sorted(set(planned)) == sorted(set(saves.steps))
