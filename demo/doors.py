"""One small training for each front door: real text, a save at every step, random numbers in every step.

    python -m demo.doors loop OUT --steps 60

The same command starts it and goes on after a kill. What it did is in OUT.losses (a line for each step of each life),
OUT.phase (where it is: `restoring`, `training`) and, at its end, OUT.end (a hash of everything that was trained).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lastgood

LENGTH, ROWS, BATCH = 24, 200, 8


@dataclass(frozen=True)
class Life:
    """One process that trains."""

    out: Path
    steps: int

    def beside(self, what: str) -> Path:
        return self.out.with_name(f"{self.out.name}.{what}")

    def phase(self, word: str) -> None:
        part = self.beside("phase.part")
        part.write_text(word)
        part.rename(self.beside("phase"))

    def loss(self, step: int, value: Any) -> None:
        number = float(value.detach() if hasattr(value, "detach") else value)
        with self.beside("losses").open("a") as log:
            log.write(f"{step} {number.hex()}\n")

    def end(self, things: Iterable[Any]) -> None:
        part = self.beside("end.part")
        part.write_text(json.dumps({"everything": digest(things)}))
        part.rename(self.beside("end"))


def text() -> Any:
    """Rows of bytes: the documentation of the standard library."""
    import torch

    pool = "\n".join(filter(None, (module.__doc__ for module in (argparse, json, random, signal, os))))
    data = torch.tensor(list(pool.encode()))
    return torch.stack([data[(at * 31) % (len(data) - LENGTH) :][:LENGTH] for at in range(ROWS)])


def net() -> Any:
    """Two bytes -> the next one, with dropout."""
    import torch
    from torch import nn

    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(256, 32), nn.LayerNorm(32), nn.Dropout(0.1), nn.Linear(32, 256))


def loss_of(model: Any, batch: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())


def loader() -> Any:
    import torch

    return torch.utils.data.DataLoader(text(), batch_size=BATCH, shuffle=True)


def loop(life: Life) -> Iterator[Any]:
    """A plain loop: a schedule, an average of the weights, a counter, draws from every library's generator."""
    import numpy as np
    import torch

    model, data, counts = net(), loader(), {"drawn": 0.0}
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, life.steps)
    life.phase("restoring")
    with lastgood.CheckpointManager(
        life.out,
        save_steps=1,
        on_error="raise",
        keep=lastgood.Keep(last=3),
        model=model,
        average=average,
        optimizer=optimizer,
        scheduler=scheduler,
        dataloader=data,
        counts=counts,
    ) as ckpt:
        begin = ckpt.restore()
        life.phase("training")
        for step, batch in zip(range(begin, life.steps), ckpt.batches(), strict=False):
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
            counts["drawn"] += random.random() + float(np.random.rand())
            life.loss(step + 1, loss)
            ckpt.step(step + 1, loss=loss)
    yield from (model.state_dict(), average.state_dict(), optimizer.state_dict(), scheduler.state_dict(), counts)


def accelerate(life: Life) -> Iterator[Any]:
    """Accelerate with bf16, gradients accumulated over two batches, a schedule and a registered average."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    bare = net()
    rate = torch.optim.AdamW(bare.parameters(), lr=1e-2)
    model, optimizer, scheduler, data = accelerator.prepare(
        bare, rate, torch.optim.lr_scheduler.CosineAnnealingLR(rate, life.steps), loader()
    )
    average = torch.optim.swa_utils.AveragedModel(bare)
    accelerator.register_for_checkpointing(average)
    life.phase("restoring")
    with lastgood.CheckpointManager(
        life.out, accelerator=accelerator, save_steps=1, on_error="raise", keep=lastgood.Keep(last=3)
    ) as ckpt:
        step = ckpt.restore()
        life.phase("training")
        while step < life.steps:
            for batch in data:
                with accelerator.accumulate(model):
                    loss = loss_of(model, batch)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                step += 1  # every batch: a checkpoint in the middle of an accumulation holds its gradients
                if accelerator.sync_gradients:
                    average.update_parameters(bare)
                life.loss(step, loss)
                ckpt.step(step, loss=loss)
                if step >= life.steps:
                    break
    yield from (bare.state_dict(), average.state_dict(), optimizer.state_dict(), scheduler.state_dict())
    yield accelerator.step


def trainer(life: Life) -> Iterator[Any]:
    """transformers' Trainer, managed, with a tiny GPT-2."""
    import warnings

    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    class Tell(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            life.phase("training")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                life.loss(state.global_step, logs["loss"])

    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    set_seed(1)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2}
    managed = lastgood.manage(
        Trainer(
            model=GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)),
            args=TrainingArguments(
                output_dir=str(life.out),
                max_steps=life.steps,
                save_steps=1,
                save_total_limit=3,
                logging_steps=1,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                seed=1,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in text()],
            callbacks=[Tell()],
        ),
        on_error="raise",
    )
    life.phase("restoring")
    managed.train(resume_from_checkpoint="auto")
    yield from (managed.model.state_dict(), managed.optimizer.state_dict(), managed.lr_scheduler.state_dict())


def lightning(life: Life) -> Iterator[Any]:
    """Lightning with a schedule."""
    import logging
    import warnings

    import lightning.pytorch as pl
    import torch

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, number: int) -> Any:
            loss = loss_of(self.net, batch)
            life.loss(self.global_step + 1, loss)
            return loss

        def on_train_start(self) -> None:
            life.phase("training")

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, life.steps)]

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(1, verbose=False)
    checkpoint = lastgood.LightningCheckpoint(
        life.out, every_n_train_steps=1, keep=lastgood.Keep(last=3), on_error="raise", resume="auto"
    )
    run = pl.Trainer(
        accelerator="cpu",
        max_steps=life.steps,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Lit()
    life.phase("restoring")
    run.fit(model, loader())
    yield model.state_dict()
    yield from (optimizer.state_dict() for optimizer in run.optimizers)
    yield from (config.scheduler.state_dict() for config in run.lr_scheduler_configs)


DOORS: dict[str, Callable[[Life], Iterator[Any]]] = {
    "trainer": trainer,
    "loop": loop,
    "accelerate": accelerate,
    **({"lightning": lightning} if hasattr(lastgood, "LightningCheckpoint") else {}),
}
STEPS = {"trainer": 40, "loop": 60, "accelerate": 60, "lightning": 60}
"""So that one life takes a few seconds beside its imports."""


def live(door: str, out: Path, steps: int) -> None:
    """One life of this training, to its end."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    random.seed(1)
    np.random.seed(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    life = Life(out, steps)
    life.end(DOORS[door](life))


def digest(things: Iterable[Any]) -> str:
    """A hash of nested state, and of the generators."""
    import hashlib

    import numpy as np
    import torch

    hasher = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            plain = value.detach().contiguous()
            hasher.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            hasher.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                hasher.update(repr(key).encode())
                feed(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        else:
            hasher.update(repr(value).encode())

    for thing in things:
        feed(thing)
    feed([torch.get_rng_state(), random.getstate(), list(np.random.get_state()[1])])  # type: ignore[index]
    return hasher.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("door", choices=DOORS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    live(args.door, args.out, args.steps or STEPS[args.door])


if __name__ == "__main__":
    main()
