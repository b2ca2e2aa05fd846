"""What the tests of the doctor do to real runs: resume from them as a script would, and let time pass."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

import realruns
from sick import log_of

OLD = time.time() - 3600


def aged(root: Path) -> Path:
    """Written an hour ago, in the order of the steps: no save can be under way."""
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            os.utime(path, (OLD, OLD + _step(path)))
    return root


def _step(path: Path) -> int:
    name = next((part for part in path.parts if part.startswith("checkpoint-")), "-0")
    return int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else 0


def trainer(root: Path, **changes: Any) -> Trainer:
    """The model of the real runs, and their data."""
    settings = {"report_to": [], "use_cpu": True, "max_steps": 6, "disable_tqdm": True, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 2, "dataloader_pin_memory": False}
    data: Any = realruns.rows()
    arguments = TrainingArguments(output_dir=str(root), **{**settings, **changes})
    return Trainer(model=realruns.gpt2(), args=arguments, train_dataset=data)


def resumed(root: Path, value: Any, **changes: Any) -> str:
    """The log of a script whose resume failed."""
    return log_of(lambda: trainer(root, **changes).train(resume_from_checkpoint=value))


def good(root: Path, step: int) -> str:
    """The fix that resumes from this step."""
    return f"trainer.train(resume_from_checkpoint='{root / f'checkpoint-{step}'}')"
