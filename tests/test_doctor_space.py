"""CKS: disks and memory that run out. On disks that really are full, small ones of their own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from transformers import Trainer, TrainingArguments

from lastgood.doctor.diagnose import diagnose
from lastgood.errors import UsageError

import cli
import realruns
from sick import codes, log_of, the

Real = Callable[[str], Path]
Mount = Callable[..., Path]
ONLY: dict[str, Any] = {"select": ["CKS"]}
MANY = torch.zeros(200_000)
"""800 kB: more than any disk here has left."""


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """Small file systems of their own; only root can have them."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small disk can only be mounted by root")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> None:
    """Leave so many bytes free."""
    (place / "filler").unlink(missing_ok=True)
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place / "filler").write_bytes(bytes(max(0, free - leave)))


@contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """Files of this process can't grow beyond: `ulimit -f`. Works everywhere, without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def going_on(root: Path, **changes: Any) -> Trainer:
    """A stock Trainer that goes on with a run of realruns: 6 steps are behind it."""
    settings = {
        "max_steps": 12, "save_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
        "dataloader_pin_memory": False, "disable_tqdm": True, "optim": "adamw_torch",
    }  # fmt: skip
    data: Any = realruns.rows()
    arguments = TrainingArguments(output_dir=str(root), **{**settings, **changes})
    return Trainer(realruns.gpt2(), arguments, train_dataset=data)


def unfinished(root: Path, max_steps: int = 100) -> Path:
    """A run that is still to go on, by what its checkpoints say."""
    for file in root.glob("checkpoint-*/trainer_state.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_steps": max_steps}))
    return root


@pytest.mark.parametrize("kind", ["trainer_full", "trainer_peft", "dcp_run", "accelerate_run", "fsdp_trainer"])
def test_healthy(kind: str, real: Real) -> None:
    root = real(kind)
    assert codes(root) == []
    assert codes(unfinished(root), **ONLY) == []


def test_healthy_managed(tmp_path: Path) -> None:
    root = cli.managed(tmp_path / "run")
    assert codes(root, **ONLY) == []
    assert codes(root, args={"max_steps": 10_000, "save_steps": 200}, **ONLY) == []


# ---- a disk that is full -------------------------------------------------------------------


def test_CKS001_and_CKS002_of_a_real_run_on_a_full_disk(real: Real, mounted: Mount) -> None:
    """The Trainer goes on until the disk is full: whichever file it hits, the doctor says so, and what to do."""
    root = shutil.copytree(real("trainer_full"), mounted("size=8m") / "run")
    for leave in (8 << 10, 40 << 10, 100 << 10):  # in model.safetensors, and in optimizer.pt at two places
        shutil.rmtree(root / "checkpoint-8", ignore_errors=True)
        fill(root.parent, leave)
        trainer = going_on(root)
        log = log_of(lambda: trainer.train(resume_from_checkpoint=str(root / "checkpoint-6")))  # noqa: B023
        found = diagnose(root, log=log, **ONLY)
        assert [f.code for f in found] in (["CKS001"], ["CKS002"]), log
        said = "\n".join(found[0].evidence)
        assert "checkpoint-8 is half written" in said or "No space" in found[0].saw
        assert "free there now: " in said and "checkpoint-6, takes 144." in said
        assert "prune could free 287." in said
        assert f"lastgood -C {root} prune --keep-last 1 --now --stock" in found[0].fix
    assert found[0].code == "CKS002"
    assert cli.call("-C", root, *found[0].fix[0].split()[3:], "--yes")[0] == 0
    assert os.statvfs(root).f_bavail > 0


def test_CKS001_in_every_wording(mounted: Mount) -> None:
    place = mounted("size=300k")
    older = {"_use_new_zipfile_serialization": False}
    told = log_of(lambda: torch.save({"a": MANY}, place / "o.pt", **older))  # type: ignore[arg-type]
    assert "failed with No space" in told
    assert codes(place, log=told) == ["CKS001"]
    (place / "o.pt").unlink()
    assert codes(place, log=log_of(lambda: safetensors.torch.save_file({"a": MANY}, place / "m"))) == ["CKS001"]
    fill(place)
    assert codes(place, log=log_of(lambda: (place / "x").write_bytes(b"1"))) == ["CKS001"]
    # Another disk than the run's.
    full = mounted("size=1m,nr_inodes=1")
    found = the("CKS001", place, log=log_of((full / "cache").mkdir), **ONLY)
    assert "the file isn't in the run directory" in found.evidence[0] and "TMPDIR" in found.fix[0]


def test_CKS001_inodes(real: Real, mounted: Mount) -> None:
    root = shutil.copytree(real("trainer_full"), mounted("size=64m,nr_inodes=40") / "run")
    while os.statvfs(root).f_favail:
        (root.parent / str(os.statvfs(root).f_favail)).touch()
    for log in (
        log_of(lambda: torch.save({"a": MANY}, root / "checkpoint-6" / "new.pt")),
        log_of((root / "checkpoint-8").mkdir),
    ):
        assert "it is inodes that have run out" in str(the("CKS001", root, log=log, **ONLY).evidence)


def test_CKS001_from_the_directory_alone(real: Real, mounted: Mount) -> None:
    root = shutil.copytree(real("trainer_full"), mounted("size=8m") / "run")
    (root / "checkpoint-6" / "trainer_state.json").unlink()
    assert codes(root, **ONLY) == []
    fill(root.parent)
    found = the("CKS001", root, **ONLY)
    assert "0 B are free, and checkpoint-6 is half written" in found.saw
    assert any("--incomplete" in line for line in found.fix)


def test_CKS002_without_a_full_disk(real: Real) -> None:
    """`ulimit -f` makes torch say the same; a doctor with the directory in hand sees that there is room."""
    root = real("trainer_full")
    with no_larger_than(50_000):
        log = log_of(lambda: torch.save({"a": MANY}, root / "checkpoint-6" / "o.pt"))
    assert "unexpected pos" in log and "basic_ios::clear" in log
    found = the("CKS002", root, log=log)
    assert "there is room for a save now" in found.evidence[-1] and "ulimit -f" in found.evidence[-1]
    assert the("CKS002", log=log).evidence == ()
    assert codes(log="RuntimeError: [enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0") == ["CKS002"]
    assert codes(log="RuntimeError: PytorchStreamReader failed reading zip archive", **ONLY) == []


def test_CKS002_of_a_distributed_save(mounted: Mount) -> None:
    place = mounted("size=300k")
    with pytest.warns(UserWarning, match="single process"):
        log = log_of(lambda: dcp.save({"a": MANY}, checkpoint_id=place / "step-1"))
    found = the("CKS002", place, log=log, **ONLY)
    assert "step-1 is half written: 300.0 KiB in 1 files" in found.evidence


def test_CKS003(tmp_path: Path) -> None:
    def opened() -> None:
        with open(tmp_path / "o.pt", "wb") as file:
            torch.save({"a": MANY}, file)

    with no_larger_than(50_000):
        logs = [
            log_of(lambda: safetensors.torch.save_file({"a": MANY}, tmp_path / "m")),
            log_of(lambda: (tmp_path / "s").write_bytes(bytes(60_000))),
            log_of(opened),
        ]
    for log in logs:
        found = the("CKS003", log=log, **ONLY)
        assert "ulimit -f" in found.fix[0] and codes(log=log, **ONLY) == ["CKS003"]
    old = "RuntimeError: [enforce fail at inline_container.cc:471] . PytorchStreamWriter failed writing file data/322: "
    the("CKS003", log=f"{old}file write failed", **ONLY)


def test_CKS004(real: Real) -> None:
    root = real("trainer_full")
    for text in (
        f"OSError: [Errno 122] Disk quota exceeded: '{root}/checkpoint-8'",
        "safetensors_rust.SafetensorError: Error while serializing: I/O error: Disk quota exceeded (os error 122)",
    ):
        found = the("CKS004", root, log=text, **ONLY)
        assert found.fix[0].startswith("quota -s") and any("free there now" in line for line in found.evidence)
    after = "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    assert codes(log=f"OSError: [Errno 122] Disk quota exceeded\n{after}", **ONLY) == ["CKS004"]


# ---- a disk that will be full --------------------------------------------------------------


def test_CKS005(real: Real, mounted: Mount) -> None:
    """What is foretold is what happens: the Trainer's saves fail at the step that was named."""
    root = shutil.copytree(real("trainer_full"), mounted("size=8m") / "run")
    fill(root.parent, 400 << 10)
    assert codes(root, **ONLY) == []  # its 6 steps are done
    wanted = {"max_steps": 20, "save_steps": 2}
    found = the("CKS005", root, args=wanted, **ONLY)
    assert "the save at step 12 won't fit" in found.saw and "7 saves are still to come, up to step 20" in found.saw
    assert (found.severity, found.means) == ("warning", "after 2 more saves the disk is full")
    log_of(lambda: going_on(root, **wanted).train(resume_from_checkpoint=str(root / "checkpoint-6")))
    assert {p.name for p in root.glob("checkpoint-*/trainer_state.json") for p in [p.parent]} == {
        f"checkpoint-{step}" for step in (2, 4, 6, 8, 10)
    }
    # Each later save lets an older one go.
    shutil.rmtree(root / "checkpoint-12", ignore_errors=True)
    shutil.rmtree(root / "checkpoint-2")
    assert codes(root, args={**wanted, "save_total_limit": 2}, **ONLY) == []
    assert the("CKS005", root, args={**wanted, "save_total_limit": 9}, **ONLY).severity == "warning"
    assert codes(root, args={**wanted, "max_steps": 12}, **ONLY) == []


def test_CKS005_the_next_save(real: Real, mounted: Mount) -> None:
    root = unfinished(shutil.copytree(real("trainer_full"), mounted("size=8m") / "run"), 8)
    fill(root.parent, 100 << 10)
    found = the("CKS005", root, **ONLY)
    assert (found.severity, found.means) == ("error", "the next save fails") and "at step 8" in found.saw
    assert codes(root, args={"max_steps": 8, "save_strategy": "no"}, **ONLY) == []
    found = the("CKS005", root, args={"save_strategy": "epoch", "num_train_epochs": 2}, **ONLY)
    assert "at step 16" in found.saw  # its epochs have 16 steps


@pytest.mark.parametrize("limit", [None, 1, 3, 50, 200])
def test_CKS005_far_ahead(limit: int | None, real: Real, mounted: Mount) -> None:
    """Beyond the saves that are played through the growth is reckoned: none is forgotten, none too early."""
    root = shutil.copytree(real("trainer_full"), mounted("size=16m") / "run")
    size = 148_013
    free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    found = diagnose(root, args={"max_steps": 1000, "save_steps": 2, "save_total_limit": limit}, **ONLY)
    if limit in (None, 200):
        step = int(found[0].saw.split("step ")[1].split()[0])
        assert abs(step - (6 + 2 * (free // size + 1))) <= 4
    else:
        assert not found


def test_CKS005_of_a_managed_run(mounted: Mount) -> None:
    root = cli.managed(mounted("size=17m") / "run", last=1)
    args = {"max_steps": 2000, "save_steps": 200}
    assert codes(root, args=args, **ONLY) == []
    fill(root.parent, 12 << 20)  # less than what is held in reserve
    assert the("CKS005", root, args=args, **ONLY).severity == "error"


# ---- memory --------------------------------------------------------------------------------


def test_CKS006(real: Real) -> None:
    said = (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of "
        "79.11 GiB of which 14.94 MiB is free. Process 1 has 79.09 GiB memory in use."
    )

    def log(function: str) -> str:
        frames = f'  File "train.py", line 9, in <module>\n  File "transformers/trainer.py", line 3900, in {function}\n'
        return f"Traceback (most recent call last):\n{frames}{said}\n"

    found = the("CKS006", real("trainer_full"), log=log("_load_optimizer_and_scheduler"))
    assert "loaded" in found.saw and found.evidence[0].startswith("checkpoint-6: 144.")
    assert "SHARDED_STATE_DICT" in the("CKS006", log=log("save_fsdp_model")).fix[0]
    assert codes(log=log("training_step")) == []  # nothing that has to do with checkpoints


def test_CKS007(real: Real) -> None:
    elastic = "  exitcode  : -9 (pid: 4242)\n  error_file: <N/A>\n  traceback : Signal 9 (SIGKILL) received by PID 42\n"
    root = real("trainer_full")
    assert the("CKS007", log=elastic).severity == "warning"
    (root / "checkpoint-6" / "trainer_state.json").unlink()
    found = the("CKS007", root, log=f"Saving model checkpoint to {root}/checkpoint-6\n{elastic}", **ONLY)
    assert found.severity == "error" and "Saving model checkpoint to" in found.evidence[0]
    assert any("checkpoint-6 is half written" in line for line in found.evidence)
    the("CKS007", log=log_of(lambda: torch.empty(1 << 50)))
    the("CKS007", log=log_of(lambda: bytearray(1 << 60)))
    shared = "RuntimeError: unable to write to file </torch_77_1_0>: No space left on device (28)"
    found = the("CKS007", root, log=shared, **ONLY)
    assert "--shm-size" in found.fix[0] and "CKS001" not in codes(root, log=shared)
    the("CKS007", log="RuntimeError: DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your shared memory limit.")  # fmt: skip
    the("CKS007", log="./train.sh: line 3:  4242 Killed                  python train.py")
    assert codes(log="Killed the old job, starting\n{'loss': 1}", **ONLY) == []


def test_CKS008(real: Real, mounted: Mount) -> None:
    place = mounted("size=8m")
    root = shutil.copytree(real("trainer_full"), place / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for write in (
        lambda: torch.save({"a": MANY}, root / "checkpoint-6" / "o.pt"),
        lambda: safetensors.torch.save_file({"a": MANY}, root / "checkpoint-6" / "m"),
        lambda: os.makedirs(root / "checkpoint-8"),
    ):
        found = the("CKS008", root, log=log_of(write), **ONLY)  # type: ignore[arg-type]
        assert found.evidence[0].startswith(f"{root} is mounted read-only now")
        assert "goes on from checkpoint-6" in found.fix[0]


def test_CKS008_of_somebody_else(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    log = f"PermissionError: [Errno 13] Permission denied: '{root}/checkpoint-8'"
    found = the("CKS008", root, log=log, **ONLY)
    assert f"it belongs to user {root.stat().st_uid}" in found.evidence[0]
    assert codes(root, log="PermissionError: [Errno 13] Permission denied: '/etc/shadow'", **ONLY) == []
    assert codes(log="PermissionError: [Errno 13] Permission denied: '/etc/shadow'", **ONLY) == []
    the("CKS008", log="OSError: [Errno 107] Transport endpoint is not connected: '/content/drive/checkpoint-8'")


@pytest.mark.parametrize("value", [None, [], "x", -5, 0.3, 10**30, True])
def test_hostile_values(value: object, real: Real) -> None:
    root = real("trainer_full")
    file = root / "checkpoint-6" / "trainer_state.json"
    state = json.loads(file.read_text())
    for name in ("epoch", "max_steps", "global_step"):
        file.write_text(json.dumps({**state, name: value}))
        for args in (None, {"save_steps": 2}, {"save_strategy": "epoch"}):
            diagnose(root, args=args, **ONLY)
    file.write_text(json.dumps(state))
    for name in ("max_steps", "save_steps", "save_total_limit", "num_train_epochs"):
        with suppress(UsageError):  # what can't be a number is said to be none
            diagnose(root, args={"max_steps": 50, name: value}, **ONLY)
