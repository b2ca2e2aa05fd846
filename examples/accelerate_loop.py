"""A language model of the standard library's documentation, trained with Accelerate; kill it and start it again.

    python examples/accelerate_loop.py runs/accelerate --steps 120

Every launch goes on from the newest good checkpoint, and the losses are those of a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import pkgutil
import pydoc

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

import lastgood

LENGTH = 48


def pieces() -> torch.Tensor:
    """The documentation of some modules as rows of bytes."""
    names = ("argparse", "json", "logging", "random")
    text = "\n".join(pydoc.plain(pydoc.render_doc(pkgutil.resolve_name(name))) for name in names)
    data = torch.tensor(list(text.encode()[:96_000]))
    return data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)


class Bytes(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.cell = nn.GRU(width, width, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 256)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out = self.head(self.drop(self.cell(self.embed(rows[:, :-1]))[0]))
        return nn.functional.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()

    set_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    rows = pieces()
    model = Bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    model, optimizer, schedule, train, evals = accelerator.prepare(
        model, optimizer, schedule, DataLoader(rows[64:], batch_size=16, shuffle=True), DataLoader(rows[:64], 64)
    )
    keep = lastgood.Keep(last=2, best=1, monitor="eval_loss", mode="min")
    with lastgood.CheckpointManager(args.out, accelerator=accelerator, save_steps=20, keep=keep) as ckpt:
        step = ckpt.restore()
        while step < args.steps:
            for batch in train:
                with accelerator.accumulate(model):
                    loss = model(batch)
                    accelerator.backward(loss)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                if not accelerator.sync_gradients:
                    continue
                step += 1
                ckpt.step(step, loss=loss)
                if step % 20 == 0:
                    model.eval()
                    with torch.no_grad():
                        ckpt.record(step, eval_loss=sum(float(model(batch)) for batch in evals) / len(evals))
                    model.train()
                if step == args.steps:
                    break
        best = ckpt.run.best("eval_loss")
    weights = float(sum(p.detach().double().abs().sum() for p in model.parameters()))
    print(json.dumps({"steps": step, "best": best.step, "weights": weights.hex()}))


if __name__ == "__main__":
    main()
