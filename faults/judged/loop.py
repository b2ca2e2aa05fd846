"""A loop that its user wrote, as a judge runs it: python loop.py OUT [--broken KIND]

The same command starts it and goes on. It says where it began ("resumed from step 4") and writes OUT/final.txt, a hash
of everything that was trained. The broken kinds are what a judge has to find, or its word is worth nothing:

    in-place   checkpoints are written under their final names, manifest first, and nothing looks whether they are whole
    forgets    the random generators begin anew after a restore
    behind     it goes on from the checkpoint before the newest one
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch

import lastgood

STEPS, EVERY = 6, 2


def digest(*states: Any) -> str:
    """sha256 over the exact values of all tensors, in their order."""
    hasher = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            hasher.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for item in value.values():
                feed(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        else:
            hasher.update(repr(value).encode())

    feed(states)
    return hasher.hexdigest()


def in_place() -> None:
    """Take the atomic publication and the verification out of the library."""
    from lastgood.repo import commit, read, verify

    def publish(source: Path, target: Path) -> None:
        target.mkdir()
        files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.suffix != ".json")
        for path in files:
            with open(target / path.name, "wb") as file:
                file.write(path.read_bytes())

    commit._publish = publish
    read.missing = lambda *_, **__: ""  # type: ignore[assignment]
    verify.problems = lambda *_, **__: ()  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--broken", choices=["in-place", "forgets", "behind"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    if given.broken == "in-place":
        in_place()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with lastgood.CheckpointManager(
        given.out, save_steps=EVERY, on_error="raise", model=model, optimizer=optimizer, scheduler=scheduler
    ) as ckpt:
        begin = ckpt.restore(**before_last(given))
        print("resumed from step", begin, flush=True)
        if given.broken == "forgets" and begin:
            torch.manual_seed(1)
        for step in range(begin, STEPS):
            loss = model(torch.randn(4, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            ckpt.step(step + 1, loss=loss)
    (given.out / "final.txt").write_text(digest(model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))


def before_last(given: argparse.Namespace) -> dict[str, Any]:
    there = [] if given.broken != "behind" or not given.out.exists() else list(lastgood.open(given.out).checkpoints)
    return {"start": str(given.out / there[-2].name)} if len(there) > 1 else {}


if __name__ == "__main__":
    main()
