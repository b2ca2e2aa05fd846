"""The loop of plain_loop.py with the checkpoints that nanoGPT writes: torch.save when the evaluation got better.

    python examples/torch_save_loop.py OUT --steps 200

To compare: after a crash it goes on, but not to where it would have come. docs/loop.md says what is lost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from plain_loop import Transformer, endless, evaluate, text, warm_up_and_cosine
from torch import nn


def train(out: str, steps: int) -> nn.Module:
    torch.manual_seed(1337)
    model, (loader, held_out) = Transformer(), text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_cosine(steps))
    batches = endless(loader)
    path, start, best = Path(out) / "ckpt.pt", 0, float("inf")
    if path.exists():
        checkpoint = torch.load(path)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        start, best = checkpoint["step"], checkpoint["best"]
    for step in range(start, steps):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(next(batches)) / 2
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if (step + 1) % 20 == 0:
            val_loss = evaluate(model, held_out)
            if val_loss < best:
                best = val_loss
                parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
                states = {name: part.state_dict() for name, part in parts.items()}
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save({**states, "step": step + 1, "best": best}, path)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.steps)
