"""A fine-tune with transformers' Trainer, as a judge runs it: python trainer.py OUT [--stock]

The same command starts it and goes on; --stock leaves lastgood out, for comparison. It says where it began and writes
OUT/final.txt, a hash of everything that was trained.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from loop import EVERY, STEPS, digest


class Say(TrainerCallback):
    """Where training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print("resumed from step", state.global_step, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--stock", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(1)
    size = {"vocab_size": 64, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
    args = TrainingArguments(
        output_dir=str(given.out), max_steps=STEPS, save_steps=EVERY, per_device_train_batch_size=2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    rows = [{"input_ids": [(at * 7 + i) % 64 for i in range(8)]} for at in range(32)]
    trainer: Any = Trainer(
        model=GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)),
        args=args,
        train_dataset=[{**row, "labels": row["input_ids"]} for row in rows],
        callbacks=[Say()],
    )
    if given.stock:
        last = get_last_checkpoint(str(given.out)) if given.out.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
    else:
        import lastgood

        trainer = lastgood.manage(trainer)
        trainer.train(resume_from_checkpoint="auto")
    (given.out / "final.txt").write_text(digest(trainer.model.state_dict(), trainer.optimizer.state_dict()))


if __name__ == "__main__":
    main()
