"""Real checkpoint directories, written by the real tools: tiny models, on the CPU, in a few seconds each.

Every function makes one run under `root`. Tests call `make`, which runs the function in a process of its own, so that
neither warnings nor process groups nor patched settings reach the test process. Weights are the same in every run;
timings, paths and process names in the bookkeeping files are not.
"""

from __future__ import annotations

import datetime
import os
import random
import shutil
import subprocess
import sys
import tempfile
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
ROWS, LENGTH = 32, 8


def make(name: str, root: Path, cache_dir: Path) -> Path:
    """The run `name` at `root`, copied from `cache_dir`, where it is made on first use.

    Absolute paths inside the files (training_args.bin, adapter_config.json, trainer_state.json) go on naming the
    cache, as they name the old place in every run that somebody moved.
    """
    from filelock import FileLock

    home = cache_dir / name
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{name}.lock"):  # several test processes share one cache
        if not (home / "done").exists():
            shutil.rmtree(home / "run", ignore_errors=True)
            command = [sys.executable, __file__, name, str(home / "run")]
            child = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
            if child.returncode:
                raise RuntimeError(f"{name} ended with {child.returncode}\n{child.stdout}\n{child.stderr}")
            (home / "done").touch()
    shutil.copytree(home / "run", root, dirs_exist_ok=True)
    return root


def environment() -> dict[str, str]:
    """No accelerator, no hub, no settings left over from a launcher, one thread: the same files everywhere."""
    prefixes = ("ACCELERATE_", "FSDP_", "HF_", "TORCHELASTIC_")
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(prefixes) and key not in launcher}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def rows() -> list[dict[str, Any]]:
    import torch

    ids = torch.randint(SIZES["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def gpt2() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))


def train(model: Any, root: Path, **changes: Any) -> None:
    """The stock Trainer, 6 steps, a save and an evaluation every second one."""
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": None,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 7,
    }
    arguments = TrainingArguments(output_dir=str(root), **{**settings, **changes})
    data: Any = rows()
    Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:8]).train()


def trainer_full(root: Path) -> None:
    """transformers.Trainer, all weights."""
    train(gpt2(), root)


def trainer_peft(root: Path) -> None:
    """transformers.Trainer, a LoRA adapter on a base model that lies beside the run."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel, set_seed

    base = root.parent / "base"
    gpt2().save_pretrained(base)
    set_seed(0)
    adapter = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    train(get_peft_model(GPT2LMHeadModel.from_pretrained(base), adapter), root)


def trainer_sharded(root: Path) -> None:
    """transformers.Trainer, the weights in several files with an index, as large models have them."""
    import functools

    model = gpt2()
    # Set on the instance: a subclass would put its own name into config.json.
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="16KB")
    train(model, root)


def trainer_bin(root: Path) -> None:
    """transformers.Trainer on a model that is no PreTrainedModel: there is no config.json to go by."""
    import torch

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(SIZES["vocab_size"], SIZES["n_embd"])
            self.norm = torch.nn.BatchNorm1d(SIZES["n_embd"])  # buffers, one of them an integer
            self.head = torch.nn.Linear(SIZES["n_embd"], SIZES["vocab_size"])

        def forward(self, input_ids: Any, labels: Any = None) -> dict[str, Any]:
            hidden = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
            logits = self.head(hidden)
            return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    torch.manual_seed(0)
    train(Plain(), root)


def accelerate_run(root: Path) -> None:
    """A hand-written loop with accelerate: three save_state() calls, named by accelerate itself."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, set_seed

    class Tally:
        def __init__(self) -> None:
            self.seen = 0

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen, "mean": torch.tensor([float(self.seen)])}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["seen"]

    set_seed(7)
    project = ProjectConfiguration(project_dir=str(root), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    data: Any = rows()
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    tally = Tally()
    accelerator.register_for_checkpointing(tally)
    for step, batch in enumerate(loader, 1):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tally.seen += len(batch["input_ids"])
        if step % 2 == 0:
            accelerator.save_state()
        if step == 6:
            break


def lightning_run(root: Path) -> None:
    """lightning.pytorch: every second step is kept, the newest a second time as last.ckpt."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Tuned(pl.LightningModule):
        def __init__(self, rate: float = 1e-2, width: int = 16) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = gpt2()

        def training_step(self, batch: Any, _index: int) -> Any:
            loss = self.model(**batch).loss
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, _index: int) -> None:
            self.log("val_loss", self.model(**batch).loss)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["rate"])
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    pl.seed_everything(7, verbose=False)
    # A metric of training: a save at a step comes before the validation of that step.
    saver = ModelCheckpoint(
        dirpath=root / "checkpoints", every_n_train_steps=2, save_top_k=-1, save_last=True, monitor="train_loss"
    )
    trainer = pl.Trainer(
        default_root_dir=root,
        max_steps=6,
        accelerator="cpu",
        devices=1,
        callbacks=[saver],
        val_check_interval=2,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = rows()
    load = torch.utils.data.DataLoader
    trainer.fit(Tuned(), load(data, batch_size=2, shuffle=True), load(data[:8], batch_size=4))


def dcp_run(root: Path) -> None:
    """torch.distributed.checkpoint, two processes, each with its part of every tensor."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as meeting:  # a file instead of a port: nothing to collide with
        mp.spawn(_dcp_rank, args=(str(root), str(Path(meeting) / "store")), nprocs=2)


def _dcp_rank(rank: int, root: str, store: str) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    # The timeout ends processes that wait for each other in vain.
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    mesh = init_device_mesh("cpu", (2,))
    model = gpt2()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = rows()
    for step in range(1, 5):
        batch = data[2 * step + rank]
        model(input_ids=batch["input_ids"][None], labels=batch["labels"][None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=f"{root}/step-{step}")
    _leave()


def _leave() -> None:
    """End a process of a group. Under load gloo's threads may outlive it, and torch then aborts a finished process."""
    import torch.distributed as dist

    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def fsdp_trainer(root: Path) -> None:
    """transformers.Trainer under FSDP2 on two processes; every process writes its own part."""
    _launch("SHARDED_STATE_DICT", root)


def fsdp_trainer_full(root: Path) -> None:
    """The same, the first process writes all of it."""
    _launch("FULL_STATE_DICT", root)


def _launch(kind: str, root: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, __file__, kind, str(root)], env=environment(), check=True)


def _fsdp_rank(kind: str, root: Path) -> None:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    # accelerate turns FSDP on for a list of devices, and the CPU is not on it, although everything behind that list
    # works there. The saving is left as it is.
    prepare = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            # As accelerate does itself: every later AcceleratorState() copies the type from here.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp  # type: ignore[method-assign]
    train(
        gpt2(),
        root,
        max_steps=4,
        ddp_backend="gloo",
        ddp_timeout=60,  # processes that wait for each other in vain end by themselves
        fsdp=True,
        fsdp_config={"version": 2, "state_dict_type": kind, "transformer_layer_cls_to_wrap": ["GPT2Block"]},
    )
    _leave()


def deepspeed_layout(root: Path) -> None:
    """What the Trainer leaves behind under DeepSpeed, ZeRO stage 2 in bf16 on two processes.

    Written by hand, because the tests do without DeepSpeed: names and keys as in DeepSpeed's engine.save_checkpoint.
    Its optimizer files hold objects of its own classes, so stand-ins with those names are pickled; whoever reads the
    files has no such module, like most who look at a checkpoint on another machine.
    """
    import numpy as np
    import torch
    from transformers import TrainerState, TrainingArguments

    model = gpt2().to(torch.bfloat16)
    weights = OrderedDict((name, tensor.detach().clone()) for name, tensor in model.state_dict().items())
    shapes = OrderedDict((name, tensor.shape) for name, tensor in model.named_parameters())
    flat = torch.cat([tensor.detach().float().flatten() for tensor in model.parameters()])
    flat = torch.nn.functional.pad(flat, (0, len(flat) % 2))
    settings = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    version = "0.18.2"
    for step in (2, 4):
        # Not next to the stand-ins: transformers takes them for an installed DeepSpeed.
        model.save_pretrained(root / f"checkpoint-{step}")
        arguments = TrainingArguments(output_dir=str(root), report_to=[], use_cpu=True, bf16=True)
        torch.save(arguments, root / f"checkpoint-{step}" / "training_args.bin")
    fragment = _stand_in("deepspeed.utils.tensor_fragment", "fragment_address", numel=len(flat) // 2, start=0)
    scaler = _stand_in("deepspeed.runtime.fp16.loss_scaler", "LossScaler", cur_scale=1.0, dynamic=False)
    for step in (2, 4):
        home = root / f"checkpoint-{step}"
        folder = home / f"global_step{step}"
        folder.mkdir()
        torch.save(
            {
                "module": weights,
                "buffer_names": [],
                "optimizer": None,
                "param_shapes": [shapes],
                "frozen_param_shapes": None,
                "shared_params": {"lm_head.weight": "transformer.wte.weight"},
                "frozen_param_fragments": None,
                "lr_scheduler": None,
                "data_sampler": None,
                "random_ltd": None,
                "sparse_tensor_module_names": set(),
                "skipped_steps": 0,
                "global_steps": step,
                "global_samples": 4 * step,
                "dp_world_size": 2,
                "mp_world_size": 1,
                "ds_config": settings,
                "ds_version": version,
            },
            folder / "mp_rank_00_model_states.pt",
        )
        for rank, part in enumerate(flat.chunk(2)):
            moments = {"step": torch.tensor(float(step)), "exp_avg": part * 0.1, "exp_avg_sq": part**2}
            groups = [{"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}]
            torch.save(
                {
                    "optimizer_state_dict": {
                        "loss_scaler": scaler,
                        "dynamic_loss_scale": False,
                        "overflow": False,
                        "clip_grad": 1.0,
                        "base_optimizer_state": {"state": {0: moments}, "param_groups": groups},
                        "single_partition_of_fp32_groups": [part.clone()],
                        "zero_stage": 2,
                        "group_paddings": [0],
                        "partition_count": [2],
                        "ds_version": version,
                        "param_slice_mappings": [OrderedDict({"transformer.wte.weight": fragment})],
                    },
                    "ds_config": settings,
                    "ds_version": version,
                },
                folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
            random.seed(rank)
            np.random.seed(rank)
            torch.manual_seed(rank)
            states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
            torch.save(states, home / f"rng_state_{rank}.pth")
        (home / "latest").write_text(folder.name)
        (home / "zero_to_fp32.py").write_text("#!/usr/bin/env python\n# DeepSpeed copies its converter here.\n")
        torch.save({"base_lrs": [1e-2], "last_epoch": step, "_step_count": step + 1}, home / "scheduler.pt")
        TrainerState(global_step=step, max_steps=4, epoch=step / 8, save_steps=2).save_to_json(
            str(home / "trainer_state.json")
        )


def _stand_in(module: str, name: str, **values: Any) -> Any:
    """An object that pickles as one of a class that is not installed."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        sys.modules[package] = types.ModuleType(package)
    kind = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, kind)
    value = kind()
    value.__dict__.update(values)
    return value


RUNS: dict[str, Callable[[Path], None]] = {
    run.__name__: run
    for run in (
        trainer_full,
        trainer_peft,
        trainer_sharded,
        trainer_bin,
        accelerate_run,
        lightning_run,
        dcp_run,
        fsdp_trainer,
        fsdp_trainer_full,
        deepspeed_layout,
    )
}


def main(name: str, root: str) -> None:
    if name in RUNS:
        RUNS[name](Path(root))
    else:
        _fsdp_rank(name, Path(root))  # what `_launch` starts


if __name__ == "__main__":
    main(*sys.argv[1:])
