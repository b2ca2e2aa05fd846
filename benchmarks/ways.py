"""The ways of saving that `stall` puts beside each other; one that isn't installed raises ImportError in `begin`."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.states import State


def safe(path: Path) -> None:
    """A file, or a directory with all that is in it, and its name: on the disk, whatever happens to the power."""
    inside = [place for place in path.rglob("*") if not place.is_symlink()] if path.is_dir() else []
    for place in (*inside, path, path.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Way:
    """`save` returns when training may go on; `finish` when everything is safe. durable: seconds from the beginning of
    a save until it was safe from a power cut, in the order of saves; none from ways that leave that to chance.

    `step` is called after each step of training, before `save`.
    """

    def __init__(self, state: State, place: Path) -> None:
        self.state, self.place, self.durable = state, place, list[float]()
        self.begin()

    def begin(self) -> None:
        """What is done once, before training."""

    def step(self, number: int) -> None:
        """Training made a step."""

    def save(self, number: int) -> None:
        """The state after this step."""

    def finish(self) -> None:
        """Wait for what is under way."""

    def stalls(self, measured: list[float]) -> list[float]:
        """What training noticed of each save, given how long the calls took."""
        return measured

    def path(self, number: int) -> Path:
        return self.place / f"step-{number}"


class Nothing(Way):
    """No saves: what the others are compared with."""


class TorchSave(Way):
    """One pickle, as most loops write it."""

    synced = False

    def save(self, number: int) -> None:
        begun = time.perf_counter()
        self.write(self.path(number))
        if self.synced:
            safe(self.path(number))
            self.durable.append(time.perf_counter() - begun)

    def write(self, path: Path) -> None:
        model, optimizer = self.state.weights(), self.state.optimizer.state_dict()
        torch.save({"model": model, "optimizer": optimizer, "rng": torch.get_rng_state()}, path)


class TorchSaveSynced(TorchSave):
    synced = True


class Safetensors(TorchSave):
    """The same tensors in one file."""

    synced = True

    def write(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(self.state.tensors(), path)


class StockTrainer(TorchSave):
    """The files of a stock Trainer's checkpoint, by the calls it makes."""

    def write(self, path: Path) -> None:
        path.mkdir()
        if hasattr(self.state.model, "save_pretrained"):
            self.state.model.save_pretrained(path)
        else:
            from safetensors.torch import save_file

            save_file(self.state.weights(), path / "model.safetensors", metadata={"format": "pt"})
        torch.save(self.state.optimizer.state_dict(), path / "optimizer.pt")
        torch.save({"last_epoch": 0}, path / "scheduler.pt")
        rng = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.random.get_rng_state()}
        torch.save(rng, path / "rng_state.pth")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": 0, "log_history": []}))


class StockTrainerSynced(StockTrainer):
    synced = True


class Dcp(Way):
    """torch.distributed.checkpoint, which makes its files safe, but not their names."""

    def save(self, number: int) -> None:
        from torch.distributed import checkpoint

        begun = time.perf_counter()
        checkpoint.save(self.parts(), checkpoint_id=self.path(number), no_dist=True)
        safe(self.path(number))
        self.durable.append(time.perf_counter() - begun)

    def parts(self) -> dict[str, Any]:
        return {"model": self.state.weights(), "optimizer": self.state.optimizer.state_dict()}


class Behind(Way):
    """Something that goes on after `save`; a thread watches for its end and makes it safe."""

    def begin(self) -> None:
        self.watcher, self.last = ThreadPoolExecutor(1), None

    def save(self, number: int) -> None:
        begun = time.perf_counter()
        if self.last is not None:  # none of these can have two under way; lastgood waits as well
            self.last.result()
        waits = self.hand_over(number)

        def until_safe() -> None:
            waits()
            safe(self.path(number))
            self.durable.append(time.perf_counter() - begun)

        self.last = self.watcher.submit(until_safe)

    def hand_over(self, number: int) -> Callable[[], Any]:
        """Begin; what is returned waits for the end."""
        raise NotImplementedError

    def finish(self) -> None:
        if self.last is not None:
            self.last.result()
        self.watcher.shutdown()


class DcpAsync(Behind, Dcp):
    """In a thread of this process."""

    process, staged = False, False

    def begin(self) -> None:
        super().begin()
        from torch import distributed

        store = distributed.FileStore(str(self.place / "store"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def hand_over(self, number: int) -> Callable[[], Any]:
        from torch.distributed.checkpoint import async_save
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        kind = AsyncCheckpointerType.PROCESS if self.process else AsyncCheckpointerType.THREAD
        response = async_save(
            self.parts(), checkpoint_id=self.path(number), async_checkpointer_type=kind, async_stager=self.stager()
        )
        if not hasattr(response, "staging_completion"):
            return response.result  # type: ignore[no-any-return]
        # The state must not change before it is copied: training would have to wait here, at the latest.
        response.staging_completion.result()
        return response.upload_completion.result  # type: ignore[no-any-return]

    def stager(self) -> Any:
        return None

    def finish(self) -> None:
        super().finish()
        from torch import distributed

        distributed.destroy_process_group()


class DcpProcess(DcpAsync):
    """In a process of its own, through shared memory that is used again."""

    process = True

    def begin(self) -> None:
        super().begin()
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.kept = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
            )
        )

    def stager(self) -> Any:
        return self.kept


class DcpStaged(DcpAsync):
    """With staging in the background."""

    def begin(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if not torch.accelerator.is_available():
            raise ImportError("torch stages in the background from an accelerator only")
        super().begin()
        self.kept = DefaultStager(StagingOptions())

    def stager(self) -> Any:
        return self.kept


class Lightning(TorchSave):
    """Lightning's usual CheckpointIO: a pickle in memory, then a file."""

    def begin(self) -> None:
        from lightning.pytorch.plugins.io import TorchCheckpointIO

        self.io = TorchCheckpointIO()

    def write(self, path: Path) -> None:
        model, optimizer = self.state.weights(), self.state.optimizer.state_dict()
        self.io.save_checkpoint({"state_dict": model, "optimizer_states": [optimizer]}, path)


class LightningAsync(Behind):
    """Lightning's AsyncCheckpointIO around that."""

    def begin(self) -> None:
        super().begin()
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        self.io = AsyncCheckpointIO(TorchCheckpointIO())

    def hand_over(self, number: int) -> Callable[[], Any]:
        parts = {"state_dict": self.state.weights(), "optimizer_states": [self.state.optimizer.state_dict()]}
        self.io.save_checkpoint(parts, self.path(number))
        assert self.io._executor is not None
        return self.io._executor.submit(lambda: None).result  # one thread: done behind what it was given before

    def finish(self) -> None:
        super().finish()
        self.io.teardown()


class Torchsnapshot(Behind):
    def begin(self) -> None:
        import torchsnapshot

        super().begin()
        self.library = torchsnapshot

    def hand_over(self, number: int) -> Callable[[], Any]:
        state = {"state": self.library.StateDict(**self.state.tensors())}
        return self.library.Snapshot.async_take(str(self.path(number)), state).wait  # type: ignore[no-any-return]


class Moonclip(Behind):
    def begin(self) -> None:
        import moonclip

        super().begin()
        self.manager = moonclip.CheckpointManager(str(self.place))

    def hand_over(self, number: int) -> Callable[[], Any]:
        self.path(number).touch()  # its own files lie elsewhere, and flush makes them safe
        self.manager.save(step=number, model=self.state.model, optimizer=self.state.optimizer)
        return self.manager.flush  # type: ignore[no-any-return]


class Orbax(Behind):
    """Of arrays that share the tensors' memory: there is no torch in it."""

    def begin(self) -> None:
        import orbax.checkpoint

        super().begin()
        self.library = orbax.checkpoint
        self.saver = orbax.checkpoint.AsyncCheckpointer(orbax.checkpoint.StandardCheckpointHandler())

    def hand_over(self, number: int) -> Callable[[], Any]:
        arrays = {name: _array(tensor) for name, tensor in self.state.tensors().items()}
        self.saver.save(self.path(number), args=self.library.args.StandardSave(arrays))
        return self.saver.wait_until_finished  # type: ignore[no-any-return]

    def finish(self) -> None:
        super().finish()
        self.saver.close()


def _array(tensor: torch.Tensor) -> Any:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Lastgood(Way):
    """`CheckpointManager`, before training goes on."""

    background: Any = False

    def begin(self) -> None:
        import lastgood

        self.manager = lastgood.CheckpointManager(
            self.place, model=self.state.model, optimizer=self.state.optimizer, background=self.chosen(),
            on_error="raise",
        )  # fmt: skip
        self.manager.restore(False)

    def chosen(self) -> Any:
        return self.background

    def step(self, number: int) -> None:
        self.manager.step(number)

    def save(self, number: int) -> None:
        self.manager.save()

    def finish(self) -> None:
        self.manager.close()
        lines = (self.place / ".lastgood" / "journal.jsonl").read_text().splitlines()
        self.told = [event for event in map(json.loads, lines) if event["event"] == "saved"]
        self.durable = [event["seconds"] for event in self.told]

    def stalls(self, measured: list[float]) -> list[float]:
        """A step of the optimizer that waited for a copy is told by the journal, not by the call."""
        told = [event["spent"]["stall"] for event in self.told]
        return [max(pair) for pair in zip(measured, told, strict=True)]

    def path(self, number: int) -> Path:
        return self.place / f"checkpoint-{number}"


class LastgoodBackground(Lastgood):
    """A copy of the state first, unless this version can do without."""

    lazy = False

    def chosen(self) -> Any:
        import lastgood

        fields = lastgood.Background.__struct_fields__
        if "lazy" in fields:
            return lastgood.Background(lazy=self.lazy)
        if self.lazy:
            raise ImportError("this version copies before training goes on")
        return lastgood.Background()


class LastgoodLazy(LastgoodBackground):
    """The copy is made while training goes on."""

    lazy = True


WAYS: dict[str, type[Way]] = {
    "nothing": Nothing,
    "torch.save": TorchSave,
    "torch.save + fsync": TorchSaveSynced,
    "safetensors + fsync": Safetensors,
    "stock Trainer": StockTrainer,
    "stock Trainer + fsync": StockTrainerSynced,
    "dcp.save": Dcp,
    "dcp.async_save, thread": DcpAsync,
    "dcp.async_save, process": DcpProcess,
    "dcp.async_save, staged": DcpStaged,
    "Lightning": Lightning,
    "Lightning async": LightningAsync,
    "torchsnapshot": Torchsnapshot,
    "moonclip": Moonclip,
    "orbax": Orbax,
    "lastgood": Lastgood,
    "lastgood background": LastgoodBackground,
    "lastgood lazy": LastgoodLazy,
}
VENVS = {"torchsnapshot": "torchsnapshot==0.1.0", "moonclip": "moonclip==0.3.1", "orbax": "orbax-checkpoint==0.12.8"}
"""Ways that get a virtual environment of their own -> what is installed into it."""
