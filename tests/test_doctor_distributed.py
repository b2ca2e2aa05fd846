"""CKD: several processes and their shards. Real errors of torch, accelerate and the Trainer; DeepSpeed's recorded."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

import forked
import realruns
from sick import codes, log_of, the

Real = Callable[[str], Path]
# torch says that it saves and loads in a single process, which is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

KINDS = ("dcp_run", "fsdp_trainer", "fsdp_trainer_full", "deepspeed_layout", "accelerate_run")
WEIGHT = "transformer.wte.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_healthy(kind: str, real: Real) -> None:
    assert codes(real(kind)) == []


def loading(folder: Path, name: str = WEIGHT, shape: tuple[int, ...] = (64, 16), outer: str = "model") -> str:
    """The log of a script that loads one tensor from a distributed checkpoint."""
    return log_of(lambda: dcp.load({outer: {name: torch.zeros(shape)}}, checkpoint_id=folder))


def test_CKD001(real: Real) -> None:
    log = """Traceback (most recent call last):
  File "deepspeed/runtime/engine.py", line 2870, in load_checkpoint
  File "deepspeed/runtime/zero/stage_1_and_2.py", line 2331, in load_state_dict
deepspeed.runtime.zero.utils.ZeRORuntimeException: The checkpoint being loaded used a DP world size of 2 but the \
current world size is 4. Automatic adjustment of ZeRO's optimizer state partitioning with a new world size is not \
currently supported.
"""
    found = the("CKD001", real("deepspeed_layout"), log=log)
    assert "by 2 data-parallel processes, resumed by 4" in found.saw
    assert found.evidence == ("checkpoint-4 holds ZeRO optimizer files of 2 processes",)
    assert "start with 2 processes" in found.fix[0]


def test_CKD002(real: Real) -> None:
    root = real("dcp_run")
    found = the("CKD002", root, log=loading(root / "step-4", "transformer.wte.wait"))
    assert "model.transformer.wte.wait" in found.saw and f"the nearest is model.{WEIGHT}" in found.evidence[0]
    other = the(
        "CKD002", root, log=log_of(lambda: dcp.load({WEIGHT: torch.zeros(64, 16)}, checkpoint_id=root / "step-4"))
    )
    assert "only the beginning of the name differs" in other.evidence[0] and "'model.'" in other.fix[0]
    the("CKD002", log=loading(root / "step-4", "nothing"))
    # An optimizer's step that isn't there has its own rule.
    assert "CKD002" not in codes(log=loading(root / "step-4", "state.x.step", outer="optimizer"))


def test_CKD003(real: Real) -> None:
    root = real("dcp_run")
    found = the("CKD003", root, log=loading(root / "step-4", shape=(72, 16)))
    assert "saved torch.Size([64, 16]), now torch.Size([72, 16])" in found.saw
    assert found.evidence == ("step-4 has it as F32 [64, 16]",)


def test_CKD004(real: Real, tmp_path: Path) -> None:
    root = real("dcp_run")
    (root / "step-4" / ".metadata").unlink()
    found = the("CKD004", root)
    assert (found.where, found.repair is not None) == ("step-4", True) and "2 shards" in found.saw
    found = the("CKD004", root, log=loading(root / "step-4"))
    assert found.where == "log" and any("2 shards" in line for line in found.evidence)
    (root / "step-4" / ".metadata.tmp").touch()
    assert "while the index was written" in the("CKD004", root).saw
    shards = shutil.copytree(real("fsdp_trainer"), tmp_path / "copy")
    (shards / "checkpoint-4" / "pytorch_model_fsdp_0" / ".metadata").unlink()
    assert the("CKD004", shards, select=["CKD"]).saw.startswith("checkpoint-4/pytorch_model_fsdp_0 holds 2 shards")


@pytest.mark.parametrize(("kind", "folder"), [("dcp_run", "step-4"), ("fsdp_trainer", "checkpoint-4/optimizer_0")])
def test_CKD005(kind: str, folder: str, real: Real) -> None:
    root = real(kind)
    (root / folder / "__1_0.distcp").unlink()
    found = the("CKD005", root, select=["CKD"])
    assert "1 of 2 shards are missing" in found.saw and found.where == folder.partition("/")[0]
    assert found.evidence[0] == "written by rank 1; there are those of rank 0"
    if kind == "dcp_run":
        assert the("CKD005", root, log=loading(root / folder), select=["CKD"]).where == "log"


def lonely(root: Path) -> None:
    """Two processes of which only the first one saves, as under `if rank == 0:`."""
    import torch.distributed as dist

    pid = forked.start(joined, root, 1, log=root / "other")
    try:
        joined(root, 0)
    finally:
        dist.destroy_process_group()
        forked.wait(pid)


def joined(root: Path, rank: int) -> None:
    import time

    import torch.distributed as dist

    limit = datetime.timedelta(seconds=1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2, timeout=limit)
    if rank == 0:
        dcp.save({"model": {"w": torch.zeros(2)}}, checkpoint_id=root / "step-1")
    else:
        time.sleep(3)


def test_CKD006(tmp_path: Path) -> None:
    assert forked.run(lonely, tmp_path, log=tmp_path / "log") == 1
    log = (tmp_path / "log").read_text()
    assert "dcp.save" in log
    assert the("CKD006", log=log).severity == "error"
    watchdog = (
        "[rank1]:[E1121 10:00:00.123456789 ProcessGroupNCCL.cpp:632] [Rank 1] Watchdog caught collective operation "
        "timeout: WorkNCCL(SeqNum=812, OpType=ALLGATHER, NumelIn=1, NumelOut=8, Timeout(ms)=1800000) ran for 1800055 "
        "milliseconds before timing out.\n"
    )
    found = the("CKD006", log=f"Saving model checkpoint to out/checkpoint-500\n{watchdog}")
    assert found.severity == "error" and "the limit was 1800 s (ddp_timeout)" in found.evidence
    assert the("CKD006", log=f"{{'loss': 1.0}}\n{watchdog}").severity == "info"


def test_CKD007(tmp_path: Path) -> None:
    for name in ("tmp-checkpoint-50", "checkpoint-50"):
        (tmp_path / name / "inner").mkdir(parents=True)
    found = the(
        "CKD007", tmp_path, log=log_of(lambda: (tmp_path / "tmp-checkpoint-50").rename(tmp_path / "checkpoint-50"))
    )
    assert found.evidence == ("left behind: tmp-checkpoint-50",)
    the("CKD007", log=log_of(lambda: shutil.rmtree(tmp_path / "checkpoint-49")))
    assert "CKD007" not in codes(log=log_of((tmp_path / "checkpoint-49" / "model.bin").read_bytes))


def stock(tmp_path: Path, **changes: Any) -> Trainer:
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, **changes)
    return Trainer(realruns.gpt2(), arguments)


@pytest.mark.parametrize("kind", ["fsdp_trainer", "fsdp_trainer_full"])
def test_CKD008(kind: str, real: Real, tmp_path: Path) -> None:
    root = real(kind)
    found = the("CKD008", root, log=log_of(lambda: stock(tmp_path)._load_from_checkpoint(str(root / "checkpoint-4"))))
    assert "pytorch_model_fsdp" in found.evidence[0] and "export 4 --to accelerate" in found.fix[1]


def test_CKD009(tmp_path: Path) -> None:
    trainer = stock(tmp_path, save_only_model=True)

    def refused(kind: str) -> str:
        """What the Trainer checks once accelerate has told it that this is FSDP; there is no FSDP on one CPU."""
        plugin = SimpleNamespace(activation_checkpointing=False, state_dict_type=kind)
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None), gather_for_metrics=lambda: None
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformers.trainer.Accelerator", lambda **_: accelerator)
            return log_of(trainer.create_accelerator_and_postprocess)

    the("CKD009", log=refused("StateDictType.SHARDED_STATE_DICT"))
    trainer.args.load_best_model_at_end = True
    the("CKD009", log=refused("StateDictType.FULL_STATE_DICT"))
    wrong = {"save_only_model": True, "fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    both = {"eval_strategy": "steps", "metric_for_best_model": "loss", "load_best_model_at_end": True}
    select = {"select": ["CKD"]}
    the("CKD009", args=wrong, **select)
    the("CKD009", args={"save_only_model": True, "deepspeed": "ds.json", **both}, **select)
    assert codes(args={**wrong, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, **select) == []
    assert codes(args={**wrong, "save_only_model": False}, **select) == []
    assert codes(args={"save_only_model": True, **both}, **select) == []


def test_CKD010(real: Real) -> None:
    for kind in ("fsdp_trainer", "deepspeed_layout"):
        root = real(kind)
        (root / "checkpoint-4" / "rng_state_1.pth").unlink()
        found = the("CKD010", root)
        assert found.where == "checkpoint-4" and "1 of 2 random states (rng_state_0.pth ...)" in found.saw
    root = real("accelerate_run")
    states = root / "checkpoints" / "checkpoint_2" / "random_states_0.pkl"
    states.rename(states.with_name("random_states_1.pkl"))
    assert "rank 0 missing" in the("CKD010", root).saw


def test_CKD011(real: Real) -> None:
    root = real("accelerate_run")
    accelerator = Accelerator(cpu=True)
    model = realruns.gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    accelerator.prepare(model, optimizer, scheduler)
    folder = root / "checkpoints" / "checkpoint_2"
    found = the("CKD011", root, log=log_of(lambda: accelerator.load_state(str(folder))))
    assert found.saw == "1 custom objects were saved, 0 are registered now"
    assert found.evidence == ("checkpoints/checkpoint_2 holds custom_checkpoint_0.pkl",)
    gone = the("CKD011", root, log=log_of(lambda: accelerator.load_state(str(folder.with_name("checkpoint_9")))))
    assert "holds checkpoint_0, checkpoint_1, checkpoint_2" in gone.evidence[0]


@pytest.mark.parametrize("kind", ["fsdp_trainer", "dcp_run"])
def test_hostile_content(kind: str, real: Real) -> None:
    root = real(kind)
    for index in root.rglob(".metadata"):
        index.write_bytes(b"\x80\x04}q\x00.")
    for arguments in root.rglob("training_args.bin"):
        arguments.write_bytes(b"PK\x03\x04")
    (root / "checkpoint-4").mkdir(exist_ok=True)
    (root / "checkpoint-4" / f"rng_state_{'9' * 30}.pth").touch()
    codes(root, log="Missing key in checkpoint state_dict: x.")
