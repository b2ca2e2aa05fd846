"""Ways to save a training and to resume it, ours and those that people use: what the peers' lanes are about.

Each saves version 1, later version 2 beside it, keeps one, and is resumed as its documentation tells. What a resume
brought back is told by its step and a digest of model and optimizer.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import tracer

KEPT_BY_US = ".lastgood"


@dataclass(frozen=True, slots=True)
class Subject:
    """save: resume what is there, train up to this version (1 or 2), save it. resume: (step, digest), and no more."""

    name: str
    title: str
    save: Callable[[Path, int], None]
    resume: Callable[[Path], tuple[int, str]]
    ours: bool = False


def preload(subject: Subject, place: Path, log: Path) -> None:
    """Import once what every child of this subject imports: a first one does it all and tells.

    None of them shall look for garbage in that either: accelerate does at each turn.
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())  # torch is there before anything is forked
    told = place / "modules"

    def first() -> None:
        quiet()
        known, run = set(sys.modules), place / "first"
        run.mkdir()
        subject.save(run, 1)
        subject.save(run, 2)
        subject.resume(run)
        told.write_text("\n".join(sys.modules.keys() - known))

    status = tracer.run(first, log)
    assert status == 0, log.read_text()
    shutil.rmtree(place / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(told.read_text().split()):
            with suppress(ImportError):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def quiet() -> None:
    """In the child: one thread for arithmetic, so that its results are the same each time; no warnings."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


# ---- the Trainer ---------------------------------------------------------------------------------------------------


def _trainer(root: Path, stop: int | None) -> Any:
    """stop: end the training behind this step; None: at the first step that a resume gets to, with its digest."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if stop is None:
                raise Reached(state.global_step, digest(given["model"], given["optimizer"], given["lr_scheduler"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            control.should_training_stop = state.global_step == stop

    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    arguments = TrainingArguments(
        output_dir=str(root),
        max_steps=4,
        save_steps=1,
        save_total_limit=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
    )
    ids = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Stop()])


class Reached(Exception):
    """The training is where a resume has brought it."""


def _trainer_save(root: Path, version: int) -> None:
    _trainer(root, version).train(resume_from_checkpoint=version > 1)


def _trainer_resume(root: Path) -> tuple[int, str]:
    return _reached(lambda: _trainer(root, None).train(resume_from_checkpoint=True))


def _managed_save(root: Path, version: int) -> None:
    import lastgood

    lastgood.manage(_trainer(root, version), on_error="raise").train(resume_from_checkpoint="auto")


def _managed_resume(root: Path) -> tuple[int, str]:
    import lastgood

    return _reached(lambda: lastgood.manage(_trainer(root, None)).train(resume_from_checkpoint="auto"))


def _reached(train: Callable[[], object]) -> tuple[int, str]:
    try:
        train()
    except Reached as reached:
        return int(reached.args[0]), str(reached.args[1])
    raise RuntimeError("the training never got to a step")


# ---- loops ---------------------------------------------------------------------------------------------------------


def _parts() -> tuple[Any, Any]:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def _train(model: Any, optimizer: Any, step: int) -> None:
    import torch

    data = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    (model(data) - data).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _loop_save(root: Path, version: int) -> None:
    import lastgood

    model, optimizer = _parts()
    keep = lastgood.Keep(last=1)
    with lastgood.CheckpointManager(
        root, model=model, optimizer=optimizer, save_steps=1, keep=keep, on_error="raise"
    ) as ckpt:
        for step in range(ckpt.restore(), version):
            _train(model, optimizer, step)
            ckpt.step(step + 1)


def _loop_resume(root: Path) -> tuple[int, str]:
    import lastgood

    model, optimizer = _parts()
    with lastgood.CheckpointManager(root, model=model, optimizer=optimizer, keep=lastgood.Keep(last=1)) as ckpt:
        step = ckpt.restore()
        return step, digest(model, optimizer)


def _numbered(root: Path, pattern: str) -> list[Path]:
    return sorted(root.glob(pattern), key=lambda path: int(path.stem.partition("-")[2]))


def _one(root: Path) -> Path:
    return root / "ckpt.pt"


def _newest(root: Path) -> Path:
    return _numbered(root, "ckpt-*.pt")[-1]


def _torch_load(path: Path) -> tuple[Any, Any, int]:
    import torch

    model, optimizer = _parts()
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer, saved["step"]


def _torch_save(find: Callable[[Path], Path], put: Callable[[Any, Path, int], None]) -> Callable[[Path, int], None]:
    def save(root: Path, version: int) -> None:
        model, optimizer, begun = (*_parts(), 0) if version == 1 else _torch_load(find(root))
        for step in range(begun, version):
            _train(model, optimizer, step)
        put({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": version}, root, version)

    return save


def _torch_resume(find: Callable[[Path], Path]) -> Callable[[Path], tuple[int, str]]:
    def resume(root: Path) -> tuple[int, str]:
        model, optimizer, step = _torch_load(find(root))
        return step, digest(model, optimizer)

    return resume


def _over(state: Any, root: Path, version: int) -> None:
    import torch

    torch.save(state, root / "ckpt.pt")


def _beside(state: Any, root: Path, version: int) -> None:
    import torch

    torch.save(state, root / f"ckpt-{version}.pt")
    for old in _numbered(root, "ckpt-*.pt")[:-1]:
        old.unlink()


def _renamed(state: Any, root: Path, version: int) -> None:
    import torch

    torch.save(state, root / "ckpt.pt.tmp")
    os.replace(root / "ckpt.pt.tmp", root / "ckpt.pt")


# ---- torch.distributed.checkpoint ----------------------------------------------------------------------------------


def _dcp_state(model: Any, optimizer: Any, step: int) -> dict[str, Any]:
    import torch
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": torch.tensor(step)}


def _dcp_load(path: Path) -> tuple[Any, Any, int]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer = _parts()
    state = _dcp_state(model, optimizer, 0)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, optimizer, int(state["step"])


def _dcp_newest(root: Path) -> Path:
    return [path for path in _numbered(root, "step-*") if (path / ".metadata").exists()][-1]


def _dcp_one(root: Path) -> Path:
    return root / "checkpoint"


def _dcp_save(find: Callable[[Path], Path], name: str) -> Callable[[Path, int], None]:
    def save(root: Path, version: int) -> None:
        import torch.distributed.checkpoint as dcp

        model, optimizer, begun = (*_parts(), 0) if version == 1 else _dcp_load(find(root))
        for step in range(begun, version):
            _train(model, optimizer, step)
        target = root / name.format(version)
        dcp.save(_dcp_state(model, optimizer, version), checkpoint_id=target)
        for old in root.iterdir():
            if old != target:
                shutil.rmtree(old)

    return save


def _dcp_resume(find: Callable[[Path], Path]) -> Callable[[Path], tuple[int, str]]:
    def resume(root: Path) -> tuple[int, str]:
        model, optimizer, step = _dcp_load(find(root))
        return step, digest(model, optimizer)

    return resume


def digest(model: Any, optimizer: Any, scheduler: Any = None) -> str:
    """Of every tensor and number, bit for bit."""
    hasher = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                hasher.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        elif hasattr(value, "detach"):
            hasher.update(value.detach().contiguous().reshape(-1).numpy().tobytes())
        else:
            hasher.update(repr(value).encode())

    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    feed(model.state_dict())
    feed(optimizer.state_dict()["state"])
    feed([] if scheduler is None else scheduler.state_dict()["last_epoch"])
    return hasher.hexdigest()


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("trainer", "transformers Trainer", _trainer_save, _trainer_resume),
        Subject("managed", "Trainer managed by lastgood", _managed_save, _managed_resume, ours=True),
        Subject("dcp-new", "DCP, a new directory each", _dcp_save(_dcp_newest, "step-{}"), _dcp_resume(_dcp_newest)),
        Subject("dcp-over", "DCP, the same directory", _dcp_save(_dcp_one, "checkpoint"), _dcp_resume(_dcp_one)),
        Subject("loop", "CheckpointManager", _loop_save, _loop_resume, ours=True),
        Subject("torch-over", "torch.save, the same file", _torch_save(_one, _over), _torch_resume(_one)),
        Subject("torch-new", "torch.save, a new file each", _torch_save(_newest, _beside), _torch_resume(_newest)),
        Subject("torch-rename", "torch.save, renamed into place", _torch_save(_one, _renamed), _torch_resume(_one)),
    )
}
