"""CKR: resuming. Real errors of the real libraries on damaged copies of real runs, and silence where all is well."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as hf_logging

from damaged import OLD, aged, good, resumed, trainer
from lastgood.doctor.diagnose import case_of, chosen, diagnose
from lastgood.doctor.disk import Disk
from lastgood.doctor.named import judge

import cli
import realruns
from sick import codes, log_of, the

Real = Callable[[str], Path]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", [*realruns.RUNS, "managed"])
def test_healthy_runs(kind: str, run_of: Callable[[str], Path]) -> None:
    root = run_of(kind)
    assert codes(root, select=["CKR", "CKC"]) == []
    assert codes(root, select=["CKR", "CKC"], full=True) == []


def test_healthy_log() -> None:
    log = "  Total optimization steps = 100\n  Resuming training from checkpoint with epoch 0 and global step 40\n"
    assert codes(log=log) == []
    assert codes(log="Traceback (most recent call last):\n  File \"a.py\", line 1, in f\nKeyError: 'x'\n") == []


def test_CKR001(real: Real, tmp_path: Path) -> None:
    root = aged(real("trainer_full"))
    empty = tmp_path / "runs" / "empty"  # what is two levels up counts, so not other tests' runs
    found = the("CKR001", log=resumed(empty, True))
    assert found.saw == f"{empty} holds no checkpoint-N directory"
    assert good(root, 6) in found.fix  # the run beside it
    shutil.rmtree(root)
    assert "first launch" in the("CKR001", log=resumed(empty, True)).fix[0]


def test_CKR001_no_such_directory(real: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = aged(real("trainer_full"))
    found = the("CKR001", root, log=log_of(lambda: get_last_checkpoint(str(tmp_path / "outt"))))
    assert found.saw == f"there is no directory {tmp_path / 'outt'}" and found.fix[0] == good(root, 6)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "working directory" not in found.saw
    assert "started in" in the("CKR001", log=log_of(lambda: get_last_checkpoint("out"))).saw


def test_CKR001_checkpoint_given(real: Real) -> None:
    root = aged(real("trainer_full"))
    found = the("CKR001", log=resumed(root / "checkpoint-4", True))
    assert "is a checkpoint itself" in found.saw


def test_CKR002_absent(real: Real) -> None:
    root = aged(real("trainer_full"))
    log = resumed(root, str(root / "checkpoint-8"))
    for found in (the("CKR002", root, log=log), the("CKR002", log=log)):
        assert found.saw == f"there is no {root / 'checkpoint-8'}" and found.fix[0] == good(root, 6)
        assert any("the newest good one is checkpoint-6" in line for line in found.evidence)


def test_CKR002_step(real: Real) -> None:
    root = aged(real("trainer_full"))
    found = the("CKR002", root, log=resumed(root, "4"))
    assert "is a step" in found.saw and found.fix == (good(root, 4),)


def test_CKR002_parent(real: Real) -> None:
    root = aged(real("trainer_full"))
    for log in (resumed(root, str(root)), log_of(lambda: AutoModelForCausalLM.from_pretrained(root))):
        found = the("CKR002", log=log)
        assert "is the run directory" in found.saw and found.fix[0] == good(root, 6)


def test_CKR002_empty(real: Real) -> None:
    root = aged(real("trainer_full"))
    (root / "checkpoint-8").mkdir()
    log = resumed(root, True)
    aged(root)
    found = the("CKR002", root, log=log)
    assert "is empty" in found.saw and found.fix[0] == good(root, 6)
    assert found.repair is not None and found.repair.name == "checkpoint-8"


def test_CKR002_no_weights(real: Real) -> None:
    root = aged(real("trainer_full"))
    (root / "checkpoint-6/model.safetensors").unlink()
    aged(root)
    log = resumed(root, True)
    found = the("CKR002", root, log=log)
    assert "no weights" in found.saw and "optimizer.pt (" in "".join(found.evidence)
    assert found.fix[0] == good(root, 4)
    assert codes(root) == ["CKR002"]
    other = log_of(lambda: AutoModelForCausalLM.from_pretrained(root / "checkpoint-6"))
    assert the("CKR002", root, log=other).fix[0] == good(root, 4)


def test_CKR002_shards_without_index(real: Real) -> None:
    root = aged(real("trainer_sharded"))
    (root / "checkpoint-6/model.safetensors.index.json").unlink()
    found = the("CKR002", root, log=resumed(root, True))
    assert "no index" in "".join(found.evidence)


def test_CKR002_part_of_a_checkpoint(real: Real) -> None:
    root = aged(real("trainer_full"))
    (root / "checkpoint-6/optimizer.pt").unlink()
    log = log_of(lambda: torch.load(root / "checkpoint-6/optimizer.pt"))
    found = the("CKR002", root, log=log)
    assert found.saw == "checkpoint-6 has no optimizer.pt" and found.fix[0] == good(root, 4)


def test_CKR002_adapters(real: Real) -> None:
    root = aged(real("trainer_peft"))
    from peft import PeftModel

    found = the("CKR002", log=log_of(lambda: PeftModel.from_pretrained(realruns.gpt2(), root)))
    assert "is the run directory" in found.saw
    folder = root / "checkpoint-6"
    (folder / "policy").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).rename(folder / "policy" / name)
    log = f"ValueError: Can't find a valid checkpoint at {folder}"  # transformers before 4.38
    assert "folders of their own" in the("CKR002", root, log=log).saw


def test_CKR002_absent_model(real: Real, tmp_path: Path) -> None:
    root = aged(real("trainer_full"))
    log = log_of(lambda: AutoModelForCausalLM.from_pretrained(root / "checkpoint-9"))
    assert the("CKR002", root, log=log).fix[0] == good(root, 6)
    assert codes(log="OSError: meta/opt is not a local folder and is not a valid model identifier") == []


def test_CKR002_deepspeed(real: Real) -> None:
    root = aged(real("deepspeed_layout"))
    shutil.rmtree(root / "checkpoint-4/global_step4")
    log = (
        'Traceback (most recent call last):\n  File "transformers/integrations/deepspeed.py", line 701, in '
        f"deepspeed_load_checkpoint\nValueError: Can't find a valid checkpoint at {root / 'checkpoint-4'}\n"
    )
    assert "global_step" in the("CKR002", root, log=log).saw


def test_CKR002_other_tools(real: Real) -> None:
    root = aged(real("accelerate_run"))
    from accelerate import Accelerator

    (root / "checkpoints/checkpoint_2/model.safetensors").unlink()
    log = log_of(lambda: _prepared(Accelerator(cpu=True)).load_state(str(root / "checkpoints/checkpoint_2")))
    found = the("CKR002", root, log=log)
    assert "accelerator.load_state" in found.fix[0] and "checkpoint_1" in found.fix[0]


def _prepared(accelerator: Any) -> Any:
    accelerator.prepare(torch.nn.Linear(1, 1))
    return accelerator


def test_CKR003_interrupted(real: Real) -> None:
    root = aged(real("trainer_full"))
    for name in ("trainer_state.json", "rng_state.pth"):
        (root / "checkpoint-6" / name).unlink()
    log = resumed(root, True)
    aged(root)
    found = the("CKR003", root, log=log)
    assert "its save was interrupted" in found.saw and found.fix[0] == good(root, 4)
    assert "not there: rng_state.pth, trainer_state.json" in "".join(found.evidence)
    assert found.repair is not None and found.repair.name == "checkpoint-6"
    assert the("CKR003", log=log).fix[0] == good(root, 4)  # the log alone leads there
    assert codes(root) == ["CKR003"]


def test_CKR003_export(real: Real) -> None:
    root = aged(real("trainer_full"))
    export = root / "final"
    trainer(root).save_model(str(export))
    found = the("CKR003", root, log=resumed(root, str(export)))
    assert "holds a model alone" in found.saw and found.fix[0] == good(root, 6)


def test_CKR003_parent_with_a_final_model(real: Real) -> None:
    root = aged(real("trainer_full"))
    trainer(root).save_model(str(root))
    found = the("CKR003", log=resumed(root, str(root)))
    assert "is the run directory" in found.saw and found.fix[0] == good(root, 6)


def test_CKR003_of_another_machine(real: Real) -> None:
    root = aged(real("trainer_full"))
    (root / "checkpoint-6/trainer_state.json").unlink()
    log = (
        "FileNotFoundError: [Errno 2] No such file or directory:"
        " '/mnt/gone/trainer_full/checkpoint-6/trainer_state.json'"
    )
    assert the("CKR003", root, log=log).fix[0] == good(root, 4)
    assert "there is no" in the("CKR003", log=log).saw
    log = log.replace("checkpoint-6", "checkpoint-2")
    assert "is there now" in the("CKR003", root, log=log).saw


def test_CKR003_while_a_save_is_under_way(real: Real) -> None:
    root = aged(real("trainer_full"))
    (root / "checkpoint-6/trainer_state.json").unlink()
    found = the("CKR003", root)
    assert found.severity == "info"
    assert the("CKR003", aged(root)).severity == "error"


@pytest.mark.parametrize(("content", "word"), [(b"", "0 bytes"), (b"\0" * 99, "zero bytes"), (b'{"a": ', "isn't JSON")])
def test_CKR004(content: bytes, word: str, real: Real) -> None:
    root = aged(real("trainer_full"))
    (root / "checkpoint-6/trainer_state.json").write_bytes(content)
    log = resumed(root, True)
    aged(root)
    found = the("CKR004", root, log=log)
    assert "checkpoint-6/trainer_state.json" in found.saw and word in found.saw and found.fix[0] == good(root, 4)
    assert found.repair is not None
    assert codes(root) == ["CKR004"]
    log = log_of(lambda: json.loads("{"))
    assert codes(log=log) == []


def test_CKR004_a_file_that_the_trainer_does_not_need(real: Real) -> None:
    root = real("trainer_full")
    (root / "checkpoint-6/generation_config.json").write_bytes(b"")
    aged(root)
    found = the("CKR004", root)
    assert found.severity == "warning" and "resumes all the same" in found.means


def test_CKR004_config(real: Real) -> None:
    root = aged(real("trainer_full"))
    (root / "checkpoint-6/config.json").write_bytes(b"{")
    log = log_of(lambda: AutoModelForCausalLM.from_pretrained(root / "checkpoint-6"))
    assert "config.json" in the("CKR004", root, log=log).saw


def test_CKR005(real: Real) -> None:
    root = aged(real("trainer_full"))
    given = {"output_dir": "out", "resume_from_checkpoint": "out/checkpoint-4", "save_steps": 2, "max_steps": 20}
    assert the("CKR005", args=given).severity == "info"
    assert the("CKR005", args=given, log="***** Running training *****\n").severity == "error"
    assert codes(args={**given, "resume_from_checkpoint": None}) == []
    arguments = TrainingArguments(output_dir="out", resume_from_checkpoint="out/checkpoint-500", report_to=[])
    torch.save(arguments, root / "checkpoint-6/training_args.bin")
    assert the("CKR005", root).severity == "error"
    # A run that reads nothing of it starts afresh.
    started = trainer(root, resume_from_checkpoint=str(root / "checkpoint-4"), max_steps=1)
    started.train()
    assert started.state.global_step == 1


def test_CKR006() -> None:
    from trl import SFTTrainer

    maker: Any = SFTTrainer
    the("CKR006", log=log_of(lambda: maker(model=realruns.gpt2(), resume_from_checkpoint=True)))


def test_CKR007_another_run(real: Real) -> None:
    root = aged(real("trainer_full"))
    _other(root, 1000)
    os.utime(root / "checkpoint-1000/trainer_state.json", (OLD - 9999, OLD - 9999))
    found = the("CKR007", root)
    assert found.where == "checkpoint-1000" and found.severity == "error"
    assert found.fix[0] == good(root, 6) and "1000 steps" in "".join(found.evidence)
    os.utime(root / "checkpoint-1000/trainer_state.json", (OLD + 99, OLD + 99))
    assert the("CKR007", root).severity == "warning"


def _other(root: Path, step: int, rows: bool = True) -> None:
    folder = root / f"checkpoint-{step}"
    shutil.copytree(root / "checkpoint-6", folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    history = [{"step": 1, "loss": 9.0}] if rows else []
    (folder / "trainer_state.json").write_text(
        json.dumps({**state, "global_step": step, "max_steps": step, "log_history": history})
    )
    if not rows:
        for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
            file = root / name / "trainer_state.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "log_history": []}))
    aged(root)


def test_CKR007_without_logs(real: Real) -> None:
    root = real("trainer_full")
    _other(root, 1000, rows=False)
    assert codes(root, ignore=["CKL"]) == []  # a longer run that went on from a shorter one
    os.utime(root / "checkpoint-1000/trainer_state.json", (OLD - 9999, OLD - 9999))
    assert "beyond the end" in the("CKR007", root).saw


def test_CKR007_copied_runs_are_healthy(real: Real) -> None:
    root = real("trainer_full")
    for place, step in enumerate((6, 2, 4)):  # copied in some order, without their times
        os.utime(root / f"checkpoint-{step}/trainer_state.json", (OLD + place, OLD + place))
    assert codes(root) == []


def test_CKR007_given_up(real: Real) -> None:
    """A resume from 2 that wrote another 4: the 6 of before is still there, and has the highest number."""
    root = aged(real("trainer_full"))
    file = root / "checkpoint-4/trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"][-1]["eval_loss"] = 99.0
    file.write_text(json.dumps(state))
    assert the("CKR007", root).where == "checkpoint-6"


def test_CKR007_managed(tmp_path: Path, real: Real) -> None:
    root = cli.managed(tmp_path / "run")
    other = cli.managed(tmp_path / "other", {800: 1.0})
    shutil.copytree(other / "checkpoint-800", root / "checkpoint-800")
    assert "another run: checkpoint-800" in the("CKR007", root).saw
    shutil.rmtree(root / "checkpoint-800")
    assert "CKR007" not in codes(root)
    stock = real("trainer_full") / "checkpoint-6"
    shutil.copytree(stock, root / "checkpoint-900")
    file = root / "checkpoint-900/trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "global_step": 900}))
    assert [code for code in codes(root) if code.startswith("CKR0")] == ["CKR017"]  # said once


def test_CKR007_renamed(real: Real) -> None:
    root = aged(real("trainer_full"))
    (root / "checkpoint-2").rename(root / "checkpoint-20")
    assert "the state of step 2" in the("CKR007", root).saw


def logged(function: Callable[[], Any]) -> str:
    """What transformers logs meanwhile."""
    import io
    import logging

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = hf_logging.get_logger("transformers")
    before = hf_logging.get_verbosity()
    logger.addHandler(handler)
    hf_logging.set_verbosity_info()
    try:
        function()
    finally:
        hf_logging.set_verbosity(before)
        logger.removeHandler(handler)
    return stream.getvalue()


def test_CKR008(real: Real) -> None:
    root = aged(real("trainer_full"))
    started = trainer(root)
    log = logged(lambda: started.train(resume_from_checkpoint=str(root / "checkpoint-6")))
    assert started.state.global_step == 7  # one more than there are
    assert "6 steps, and was resumed at step 6" in the("CKR008", log=log).saw
    the("CKR008", root, args={"max_steps": 4, "save_steps": 2, "output_dir": "out"})
    assert "CKR008" not in codes(root, args={"max_steps": 6, "save_steps": 2, "output_dir": "out"})
    old = "  Total optimization steps = 1,000\n  Continuing training from global step 1000\n"
    the("CKR008", log=old)


def test_CKR009(real: Real) -> None:
    root = aged(real("trainer_full"))

    def script() -> None:
        model = AutoModelForCausalLM.from_pretrained(root / "checkpoint-4")
        other = trainer(root, max_steps=1)
        other.model = other.model_wrapped = model
        other.train()

    log = logged(script)
    assert "started at step 0" in the("CKR009", root, log=log).saw
    resumed_log = log + "  Resuming training from checkpoint with epoch 0 and global step 4\n"
    assert "CKR009" not in codes(root, log=resumed_log)
    arguments = {"model_name_or_path": "out/checkpoint-500", "output_dir": "out", "save_steps": 10, "max_steps": 100}
    assert the("CKR009", args=arguments).severity == "warning"
    assert the("CKR009", args={**arguments, "output_dir": "next"}).severity == "info"
    assert codes(args={**arguments, "model_name_or_path": "gpt2"}) == []


def test_CKR010(real: Real) -> None:
    root = aged(real("trainer_full"))
    file = root / "checkpoint-6/trainer_state.json"
    gone = "/scratch/old/checkpoint-4"
    file.write_text(json.dumps({**json.loads(file.read_text()), "best_model_checkpoint": gone}))
    found = the("CKR010", root)
    assert gone in found.saw and found.repair is not None and found.repair.kind == "relink"
    assert json.loads(found.repair.text)["best_model_checkpoint"] == str(root / "checkpoint-4")
    log = logged(lambda: trainer(root, max_steps=7).train(resume_from_checkpoint=str(root / "checkpoint-6")))
    assert "moved or renamed" in "".join(the("CKR010", root, log=log).evidence)
    started = trainer(root)
    started.state.best_model_checkpoint, started.state.best_metric = gone, 1.0
    the("CKR010", log=logged(started._load_best_model))
    the("CKR010", log=f"ValueError: '{gone}' is not in list")
    the("CKR010", log=log_of(lambda: os.path.samefile(root, gone)))
    assert codes(log="ValueError: 3 is not in list") == []


def test_CKR011_CKR012(real: Real, tmp_path: Path) -> None:
    root = aged(real("lightning_run"))
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    old = ModelCheckpoint(dirpath=root / "checkpoints", monitor="loss")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ModelCheckpoint(dirpath=tmp_path / "new", monitor="loss").load_state_dict(old.state_dict())
    log = "\n".join(f"x.py:9: {warning.message}" for warning in caught)
    assert "4 .ckpt files" in "".join(the("CKR011", root, log=log).evidence)
    started = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        connector = started._checkpoint_connector
        started.state.fn = pl.trainer.states.TrainerFn.FITTING
        connector._parse_ckpt_path(started.state.fn, "last", model_provided=True, model_connected=True)
    found = the("CKR012", root, log="\n".join(str(warning.message) for warning in caught))
    assert "last.ckpt" in found.fix[0]


def test_CKR013(real: Real) -> None:
    root = aged(real("deepspeed_layout"))
    (root / "checkpoint-4/latest").write_text("global_step9")
    assert the("CKR013", root).repair is not None
    (root / "checkpoint-4/latest").unlink()
    found = the("CKR013", root)
    assert found.repair is not None
    assert (found.repair.name, found.repair.text) == ("checkpoint-4/latest", "global_step4")
    log = (
        f"[WARNING] [engine.py:2722:load_checkpoint] Unable to find latest file at {root}/checkpoint-4/latest, if"
        " trying to load latest checkpoint please ensure this file exists or pass an explicit checkpoint tag"
    )
    assert "global_step4" in the("CKR013", root, log=log).fix[0]


def test_CKR014(real: Real) -> None:
    root = aged(real("trainer_full"))
    shutil.copytree(root / "checkpoint-6", root / "tmp-checkpoint-8")
    found = the("CKR014", aged(root))
    assert found.repair is not None and found.repair.name == "tmp-checkpoint-8"
    shutil.rmtree(root / "tmp-checkpoint-8")
    (root / "checkpoint-6/checkpoint-is-incomplete.txt").write_text("Checkpoint started at step 6 and in progress...")
    assert the("CKR014", aged(root)).where == "checkpoint-6"
    (root / "checkpoint-6/trainer_state.json").unlink()
    assert codes(aged(root)) == ["CKR014"]
    shutil.rmtree(root / "checkpoint-6")
    (root / "checkpoint-6").mkdir()
    assert "is empty" in the("CKR014", aged(root)).saw


def test_CKR014_jit(tmp_path: Path) -> None:
    from transformers.trainer_jit_checkpoint import CheckpointManager

    (tmp_path / "run").mkdir()
    started = trainer(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-0").write_text("in the way")
    log = logged(lambda: log_of(lambda: CheckpointManager(started).execute_jit_checkpoint()))
    the("CKR014", log=log)


def test_CKR015(real: Real) -> None:
    root = aged(real("trainer_full"))
    log = "SIGTERM received, will request JIT checkpoint after 3s\nImmediate JIT checkpoint completed successfully\n"
    the("CKR015", log=log)
    assert "CKR015" not in codes(root, log=log)  # it was at its end by then
    the("CKR015", args={"enable_jit_checkpoint": True, "max_steps": 100, "save_steps": 10})
    file = root / "checkpoint-6/trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_steps": 100}))
    arguments = TrainingArguments("out", enable_jit_checkpoint=True, save_steps=4, max_steps=100, report_to=[])
    torch.save(arguments, root / "checkpoint-6/training_args.bin")
    assert "step 6 of 100" in the("CKR015", root).saw


def test_CKR016(real: Real, tmp_path: Path) -> None:
    the("CKR016", args={"save_only_model": True, "max_steps": 100, "save_steps": 10})
    root = aged(real("trainer_full"))
    (root / "checkpoint-6/scheduler.pt").unlink()
    found = the("CKR016", root)
    assert found.saw == "checkpoint-6 has no scheduler.pt" and found.fix[0] == good(root, 4)
    started = trainer(root, max_steps=7)
    started.train(resume_from_checkpoint=str(root / "checkpoint-6"))  # without a word
    fresh = trainer(tmp_path / "weights", save_only_model=True, max_steps=2, save_steps=2, save_strategy="steps")
    fresh.train()
    assert "CKR016" in codes(tmp_path / "weights")


def test_hostile_content(real: Real) -> None:
    """Wrong types and huge values are no reason to crash."""
    root = aged(real("trainer_full"))
    file = root / "checkpoint-6/trainer_state.json"
    state = json.loads(file.read_text())
    for change in (
        {"log_history": 5}, {"log_history": [None, 3, {"step": "x", "loss": {}}]}, {"best_model_checkpoint": 7},
        {"best_model_checkpoint": "/\0x"}, {"max_steps": "many"}, {"max_steps": 10**400}, {"log_history": [[[[]]]]},
    ):  # fmt: skip
        file.write_text(json.dumps({**state, **change}))
        diagnose(root, select=["CKR", "CKC"], full=True)
    (root / "checkpoint-6/config.json").write_text("[]")
    (root / "checkpoint-8").symlink_to(root / "checkpoint-6")
    diagnose(root, select=["CKR", "CKC"])
    for path in ("\0", "a" * 5000, "../" * 50, "", "/dev/null", "/dev/zero/trainer_state.json"):
        diagnose(root, log=f"ValueError: Can't find a valid checkpoint at {path}")
        diagnose(root, log=f"FileNotFoundError: [Errno 2] No such file or directory: '{path}'")
        diagnose(root, log=f"ValueError: No valid checkpoint found in output directory ({path})")
        judge(Path(path))


def test_many_checkpoints(tmp_path: Path, real: Real) -> None:
    source = real("trainer_full") / "checkpoint-6"
    root = tmp_path / "many"
    for step in range(200):
        folder = root / f"checkpoint-{step + 1}"
        folder.mkdir(parents=True)
        for name in os.listdir(source):
            if name != "trainer_state.json":
                os.link(source / name, folder / name)
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": step + 1, "max_steps": 1000, "log_history": []})
        )
    disk = Disk(root)
    assert disk.close  # what every rule shares
    begin = time.process_time()
    case = case_of(disk, None, None)
    for rule in chosen(["CKR", "CKC"], []):
        if rule.run is not None:
            list(rule.run(case))
    assert time.process_time() - begin < 5  # the square of their number would take minutes


@pytest.mark.parametrize(
    "word", ["a", "FileNotFoundError: ", "checkpoint-1/", "The dirpath has changed from ", "OSError: '"]
)
def test_long_lines_take_no_long_time(word: str) -> None:
    begin = time.process_time()
    diagnose(log=word * (500_000 // len(word)), select=["CKR", "CKC"])
    assert time.process_time() - begin < 20


def test_CKR017(real: Real, tmp_path: Path) -> None:
    root = cli.managed(tmp_path / "run")
    home = root / "checkpoint-700"
    shutil.copytree(real("trainer_full") / "checkpoint-6", home)
    state = json.loads((home / "trainer_state.json").read_text())
    (home / "trainer_state.json").write_text(json.dumps({**state, "global_step": 700, "max_steps": 1000}))
    found = the("CKR017", root)
    assert "checkpoint-700 without a manifest, beyond checkpoint-600" in found.saw
    before = cli.hashes(home)
    assert cli.call("doctor", root, "--select", "CKR017", "--fix").code == 1
    assert "CKR017" not in codes(root)
    after = cli.hashes(home)
    assert before.items() <= after.items() and "lastgood.json" in after.keys() - before.keys()
