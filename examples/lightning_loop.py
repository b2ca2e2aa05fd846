"""A language model of the standard library's source, trained with Lightning; kill it and start it again.

    python examples/lightning_loop.py runs/lightning

Every launch goes on from the newest good checkpoint, and the losses are those of a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import sys
import warnings

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lastgood

LENGTH = 32


class Source(Dataset):
    """Pieces of a module's source as bytes."""

    def __init__(self, module) -> None:
        self.data = torch.tensor(list(pathlib.Path(module.__file__).read_bytes()[:16_000]))

    def __len__(self) -> int:
        return len(self.data) // LENGTH - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data[index * LENGTH : (index + 1) * LENGTH + 1]


class Bytes(pl.LightningModule):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(256, width)
        self.cell = nn.GRU(width, width, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 256)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.cell(self.embed(batch[:, :-1]))[0]
        return nn.functional.cross_entropy(self.head(self.drop(hidden)).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of the checkpoints")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")

    pl.seed_everything(1, verbose=False)
    checkpoint = lastgood.LightningCheckpoint(
        options.run, monitor="val_loss", mode="min", save_top_k=2, every_n_train_steps=20, resume="auto"
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = DataLoader(Source(argparse), batch_size=16, shuffle=True)
    trainer.fit(Bytes(), train, DataLoader(Source(json), batch_size=16))
    print(f"step {trainer.global_step}, val_loss {trainer.callback_metrics.get('val_loss', float('nan')):.6f}")
    print(f"best: {checkpoint.best_model_path}")


if __name__ == "__main__":
    main(sys.argv[1:])
