"""A transformers Trainer with a LoRA adapter, and one line of lastgood: the same command starts it and continues it.

    python examples/trainer.py OUT --steps 60

The base model is a tiny GPT-2 with random weights (the same in each launch, as a downloaded one would be); it learns
the standard library's own documentation, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import subprocess

from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import lastgood

LENGTH = 32


def rows() -> list[dict[str, list[int]]]:
    said = "\n".join(filter(None, (module.__doc__ for module in (argparse, json, logging, random, subprocess))))
    data = said.encode()
    pieces = [list(data[i : i + LENGTH]) for i in range(0, len(data) - LENGTH, 8)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(out: str, steps: int) -> None:
    set_seed(0)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    lora = LoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    data = rows()
    args = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=10,
        save_steps=10,
        save_total_limit=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(get_peft_model(model, lora), args, train_dataset=data[32:], eval_dataset=data[:32])
    trainer = lastgood.manage(trainer)  # the only line added
    trainer.train(resume_from_checkpoint="auto")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=60)
    command = parser.parse_args()
    main(command.out, command.steps)
