"""Small real Lightning runs for the tests: bytes of the standard library's own text, tiny models, the real Trainer."""

from __future__ import annotations

import os
import random
import signal
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lastgood

from training import digest, flat, texts

SIZE = 12


class Rows(Dataset):  # type: ignore[type-arg]
    """Rows of bytes; `noise` draws from all global generators in __getitem__, as augmentation does."""

    def __init__(self, count: int = 24, noise: bool = False) -> None:
        self.rows = [torch.tensor(list(text)) for text in texts(count)]
        self.noise = noise
        self.loads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loads += 1
        row = self.rows[index].clone()
        if self.noise:
            row[int(torch.randint(SIZE, (1,)))] = random.randrange(256)
            row[int(np.random.randint(SIZE))] = 7
        return row


class Flow(IterableDataset):  # type: ignore[type-arg]
    """The same rows without a length."""

    def __iter__(self) -> Any:
        return iter(Rows().rows)


class Keeper:
    """A loader that keeps its own state, in the manner of torchdata's StatefulDataLoader."""

    def __init__(self) -> None:
        self.rows, self.at = torch.stack(Rows().rows).split(4), 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        self.at %= len(self.rows)
        while self.at < len(self.rows):
            self.at += 1
            yield self.rows[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Model(pl.LightningModule):
    """Next-byte prediction with dropout, batch norm and a buffer that no state_dict holds."""

    def __init__(self, lr: float = 0.05, scheduler: str = "", draws: bool = False) -> None:
        super().__init__()
        from torchmetrics import MeanMetric

        self.save_hyperparameters()
        self.embed = nn.Embedding(256, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 256)
        self.seen = MeanMetric()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.drop(self.embed(batch[:, :-1])).transpose(1, 2)).transpose(1, 2)
        return nn.functional.cross_entropy(self.head(hidden).reshape(-1, 256), batch[:, 1:].reshape(-1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.count += 1
        self.seen(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_max", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += torch.rand(())  # after every callback's hook

    def on_train_epoch_start(self) -> None:
        if self.hparams["draws"]:
            torch.rand(3)

    def configure_optimizers(self) -> Any:
        one = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        kind = self.hparams["scheduler"]
        if kind == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(one, patience=0, threshold=0.5)
            return {"optimizer": one, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        if kind == "train-plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(one, patience=0, threshold=0.5)
            return {"optimizer": one, "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss_epoch"}}
        if kind == "several":
            step = torch.optim.lr_scheduler.OneCycleLR(one, 0.1, total_steps=40)
            epoch = torch.optim.lr_scheduler.StepLR(one, 1, 0.9)
            return [one], [{"scheduler": step, "interval": "step"}, {"scheduler": epoch, "interval": "epoch"}]
        return one


class Two(Model):
    """Manual optimization with two optimizers, which share no parameter, in the manner of a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:  # type: ignore[override]
        for one in self.optimizers():  # type: ignore[union-attr]
            loss = self.loss(batch)
            one.zero_grad()
            self.manual_backward(loss)
            one.step()
        self.log("train_loss", loss, on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        inner = torch.optim.SGD([*self.embed.parameters(), *self.norm.parameters()], lr=0.1, momentum=0.9)
        return inner, torch.optim.Adam(self.head.parameters(), lr=0.01)


class Rows2(Logger):
    """A logger that remembers every row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = version = "rows"

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Stop(Exception):
    """The interruption."""


class StopAt(pl.Callback):
    """Raises when a batch begins after so many optimizer steps."""

    def __init__(self, step: int, how: Any = None) -> None:
        self.step, self.how = step, how

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step >= self.step:
            if self.how is None:
                raise Stop
            self.how()

    def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step >= self.step:
            if self.how is None:
                raise Stop
            self.how()


class Signal(pl.Callback):
    """SIGTERM to this process while it works on a batch, counted from 1."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Case:
    """One row of the exactness matrix: 6 batches an epoch, 2 epochs."""

    name: str
    model: Any = Model
    trainer: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    data: str = "rows"
    every: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Any = None
    stops: tuple[int, ...] = (4, 7)
    validate: bool = True

    def loaders(self) -> tuple[Any, Any]:
        val = DataLoader(Rows(8), batch_size=4, num_workers=0)
        if self.data == "keeper":
            return Keeper(), val
        if self.data == "flow":
            return DataLoader(Flow(), batch_size=4), val
        if self.data == "two":
            first = DataLoader(Rows(), batch_size=4, shuffle=True)
            return {"a": first, "b": DataLoader(Rows(12), batch_size=4, shuffle=True)}, val
        settings = {"batch_size": 4, "shuffle": True, **self.loader}
        if settings.pop("own", False):
            settings["generator"] = torch.Generator().manual_seed(3)
        return DataLoader(Rows(noise=self.data == "noise"), **settings), val

    def fit(self, root: Path | None, *extra: Any, ckpt: Any = "last", stock: Any = None) -> tuple[Any, Rows2, Any]:
        """Train; (trainer, logger, callback)."""
        torch.set_num_threads(1)
        pl.seed_everything(5, verbose=False)
        module, (train, val) = self.model(), self.loaders()
        options = {"every_n_train_steps": self.every, "monitor": "val_loss", "save_top_k": -1, **self.options}
        callback = lastgood.LightningCheckpoint(root, **options) if root is not None else stock
        logger = Rows2()
        callbacks = [*(self.callbacks() if self.callbacks else ()), *extra, *([] if callback is None else [callback])]
        settings = {"max_epochs": 2, "log_every_n_steps": 1, **self.trainer}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is set, but there is no last checkpoint available.*")
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")
            warnings.filterwarnings("ignore", ".*checkpoint that ended before the epoch ended.*")
            warnings.filterwarnings("ignore", ".*but have no `val_dataloader`.*")
            trainer = pl.Trainer(
                accelerator="cpu",
                logger=logger,
                callbacks=callbacks,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=callback is not None,
                default_root_dir=root,
                num_sanity_val_steps=1,
                **settings,
            )
            trainer.fit(module, train, val if self.validate else None, ckpt_path=ckpt)
        return trainer, logger, callback


def outcome(trainer: Any) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    module = trainer.lightning_module
    return {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "weights": digest({**module.state_dict(), "count": module.count}),
        "optimizers": [digest(flat(one.state_dict())) for one in trainer.optimizers],
        "schedulers": [digest(flat(plain(c.scheduler.state_dict()))) for c in trainer.lr_scheduler_configs],
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "generators": [digest({"a": torch.get_rng_state()}), repr(random.getstate()), repr(np.random.get_state())],
    }


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not callable(value)}


def ema() -> list[Any]:
    return [EMAWeightAveraging(decay=0.9)]


def swa() -> list[Any]:
    return [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=2)]


class Pair(Model):
    """Trains on two loaders at once, the shorter of which starts again within an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(torch.cat([batch["a"], batch["b"]]), batch_idx)
