"""Small real fine-tunes for the tests: real text, real models, the real Trainer and SFTTrainer."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import lastgood

LENGTH = 12


def texts(count: int) -> list[bytes]:
    """Pieces of the standard library's own documentation, as bytes."""
    pool = "\n".join(filter(None, (module.__doc__ for module in (argparse_module(), json, random, hashlib, signal))))
    data = pool.encode()
    return [data[(i * 37) % (len(data) - LENGTH) :][:LENGTH] for i in range(count)]


def argparse_module() -> Any:
    import argparse

    return argparse


class Bytes(Dataset):  # type: ignore[type-arg]
    """Byte-level language modelling; `noise` draws from a global generator in __getitem__, as augmentation does."""

    def __init__(self, count: int, noise: str = "", ragged: bool = False) -> None:
        self.rows = texts(count)
        self.noise = noise
        self.ragged = ragged

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = list(self.rows[index])
        if self.ragged:
            row = row[: 4 + index % (LENGTH - 4)]
        if "torch" in self.noise:
            row[int(torch.randint(len(row), (1,)))] = int(torch.randint(256, (1,)))
        if "python" in self.noise:
            row[random.randrange(len(row))] = random.randrange(256)
        if "numpy" in self.noise:
            row[int(np.random.randint(len(row)))] = int(np.random.randint(256))
        return {"input_ids": row, "labels": list(row)}


class Stream(IterableDataset):  # type: ignore[type-arg]
    """The same rows without a length, shuffled by a generator of its own."""

    def __init__(self, count: int) -> None:
        self.data = Bytes(count)

    def __iter__(self) -> Any:
        order = random.Random(3).sample(range(len(self.data)), len(self.data))
        return (self.data[index] for index in order)


class Pad:
    """Pads to the longest row; `noise` masks at random inside the collator."""

    def __init__(self, noise: bool = False) -> None:
        self.noise = noise

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full((len(rows), longest), -100)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
        if self.noise:
            ids[torch.rand(ids.shape) < 0.1] = 0
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def tiny_gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """About 15k parameters, dropout on."""
    set_seed(seed)
    dtype = getattr(torch, changes.pop("dtype", "float32"))
    sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})).to(dtype)  # type: ignore[no-any-return]


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    """8 steps, a save every second one."""
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    known = TrainingArguments.__dataclass_fields__
    if "train_sampling_strategy" in changes and "train_sampling_strategy" not in known:  # before transformers 5
        changes["group_by_length"] = changes.pop("train_sampling_strategy") == "group_by_length"
    return TrainingArguments(output_dir=str(out), **{**settings, **changes})


@dataclass(frozen=True)
class Case:
    """One row of the exactness matrix."""

    name: str
    rows: int = 64
    args: dict[str, Any] = field(default_factory=dict)
    noise: str = ""
    noisy_collator: bool = False
    ragged: bool = False
    lora: bool = False
    stream: bool = False
    evaluate: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    kills: tuple[int, ...] = (5,)
    options: dict[str, Any] = field(default_factory=dict)

    def trainer(self, out: Path, *callbacks: TrainerCallback) -> Trainer:
        torch.set_num_threads(1)
        model: Any = tiny_gpt2(**self.model)
        if self.lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=["c_attn"]))
        evaluation = {"eval_strategy": "steps", "eval_steps": 2} if self.evaluate else {}
        return Trainer(
            model=model,
            args=arguments(out, **{**evaluation, **self.args}),
            train_dataset=Stream(self.rows) if self.stream else Bytes(self.rows, self.noise, self.ragged),
            eval_dataset=Bytes(8) if self.evaluate else None,
            data_collator=Pad(self.noisy_collator),
            callbacks=list(callbacks),
        )


class KillAt(TrainerCallback):
    """SIGKILL to this process at the end of a step, after whatever was saved there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(case: Case, out: Path, result: Path, resume: Any = "auto", kill: int | None = None, pace: Any = None) -> None:
    """Train under lastgood and write down what came out."""
    trainer = lastgood.manage(case.trainer(out, *([] if kill is None else [KillAt(kill)])), **case.options)
    trainer.lastgood.pace = pace or trainer.lastgood.pace
    trainer.train(resume_from_checkpoint=resume)
    result.write_text(json.dumps(outcome(trainer)))


def outcome(trainer: Trainer) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    history = [
        {k: v for k, v in row.items() if not k.endswith(("runtime", "per_second"))} for row in trainer.state.log_history
    ]
    return {
        "weights": digest(trainer.model.state_dict()),
        "optimizer": digest(flat(trainer.optimizer.state_dict())),
        "scheduler": trainer.lr_scheduler.state_dict()["_last_lr"],
        "losses": {row["step"]: row["loss"] for row in history if "loss" in row},
        "evals": {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row},
        "step": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
    }


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)  # type: ignore[assignment]
    else:
        return {prefix: value}
    return {name: leaf for key, item in pairs for name, leaf in flat(item, f"{prefix}.{key}").items()}


def digest(leaves: dict[str, Any]) -> str:
    """sha256 over names and exact values."""
    hasher = hashlib.sha256()
    for name in sorted(leaves):
        leaf = leaves[name]
        hasher.update(name.encode())
        if isinstance(leaf, torch.Tensor):
            hasher.update(leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            hasher.update(repr(leaf).encode())
    return hasher.hexdigest()
