"""CKV: versions, formats, states that don't fit. Real errors of the real libraries, and silence where all is well."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lastgood.doctor.case import Case
from lastgood.doctor.diagnose import case_of, examine
from lastgood.doctor.disk import Disk
from lastgood.doctor.finding import Finding, Repair
from lastgood.state import optimizer, weights
from lastgood.state.fingerprint import live_tensors
from lastgood.state.tensors import digest

import cli
import realruns
from sick import codes, log_of, the

Real = Callable[[str], Path]


def gpt2(**sizes: Any) -> Any:
    return GPT2LMHeadModel(GPT2Config(**{**realruns.SIZES, **sizes}, bos_token_id=0, eos_token_id=0))


def trainer_of(model: Any, tmp_path: Path, **arguments: Any) -> Trainer:
    """A Trainer as it is when it begins to load a checkpoint."""
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, max_steps=6, **arguments
    )
    trainer = Trainer(model, settings)
    trainer.create_optimizer_and_scheduler(6)
    return trainer


def stepped(trainer: Any) -> None:
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()


def said_by(function: Callable[[], Any], logger: str = "transformers") -> str:
    """What a library logs meanwhile, a line each."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Kept()
    logging.getLogger(logger).addHandler(handler)
    try:
        function()
    finally:
        logging.getLogger(logger).removeHandler(handler)
    return "\n".join(lines)


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """A file of torch.save with something in it changed."""
    tree = torch.load(path, weights_only=False)
    torch.save(change(tree) or tree, path)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_versions(root: Path, **versions: str) -> tuple[Finding, ...]:
    """The findings on a machine that has other versions."""
    case: Case = case_of(Disk(root), None, None)
    case.versions = {**case.versions, **versions}
    return examine(case, select=["CKV"])


@pytest.mark.parametrize("kind", [*cli.STOCK, *cli.OTHERS, "managed"])
def test_healthy_runs(kind: str, run_of: Real) -> None:
    assert codes(run_of(kind), select=["CKV", "CKP"]) == []


def test_a_log_of_other_troubles_says_nothing() -> None:
    for text in ("KeyError: 'step_size'", "KeyError: 'momentum'", "ValueError: size mismatch", "loss 0.5\nloss 0.4"):
        assert codes(log=text, select=["CKV", "CKP"]) == []
    ours = 'Traceback (most recent call last):\n  File "train.py", line 3, in main\n    row["step"]\nKeyError: \'step\''
    assert codes(log=ours) == []


def test_CKV001(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    rng = root / "checkpoint-6" / "rng_state.pth"
    torch.save({"python": argparse.Namespace(seed=1)}, rng)
    trainer = trainer_of(gpt2(), tmp_path)
    log = log_of(lambda: trainer._load_rng_state(str(rng.parent)))
    found = the("CKV001", root, log=log)
    assert "argparse.Namespace" in found.saw and found.evidence == (
        "checkpoint-6/rng_state.pth names argparse.Namespace",
    )
    assert "add_safe_globals([argparse.Namespace])" in found.fix[0] and found.repair is None
    the("CKV001", log=log)
    torch.save({"numpy": np.random.default_rng(0)}, rng)
    assert "transformers>=4.52" in the("CKV001", log=log_of(lambda: trainer._load_rng_state(str(rng.parent)))).fix[0]


def test_CKV001_a_file_that_would_do_harm(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    checkpoint = root / "checkpoint-6"
    torch.save({"state": os.system}, checkpoint / "optimizer.pt")  # named, never called
    trainer = trainer_of(gpt2(), tmp_path)
    found = the("CKV001", root, log=log_of(lambda: trainer._load_optimizer_and_scheduler(str(checkpoint))))
    assert "runs what it names" in found.means and found.repair == Repair("quarantine", "checkpoint-6")
    assert len(found.evidence) == 1 and "add_safe_globals" not in "".join(found.fix)


def test_CKV002(real: Real) -> None:
    root = real("trainer_full")
    the("CKV002", log="ModuleNotFoundError: No module named 'numpy._core'")
    assert np.__version__.startswith("2.")
    found = with_versions(root, numpy="1.26.4")
    assert [f.code for f in found] == ["CKV002"] and found[0].where == "checkpoint-6"
    assert with_versions(root) == ()


def test_CKV003(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    config = root / "checkpoint-6" / "config.json"
    edit(config, transformers_version="5.1.0")
    log = said_by(lambda: trainer_of(gpt2(), tmp_path)._load_from_checkpoint(str(config.parent)))
    assert the("CKV003", log=log).severity == "info"
    assert "CKV003" not in codes(root)
    edit(config, transformers_version="4.44.2")
    log = said_by(lambda: trainer_of(gpt2(), tmp_path)._load_from_checkpoint(str(config.parent)))
    assert the("CKV003", log=log).severity == "warning"
    found = the("CKV003", root)
    assert found.severity == "info" and "pip install transformers==4.44.2" in found.fix[0]
    edit(config, transformers_version=[4])
    assert codes(root) == []


def test_CKV004(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    trainer = trainer_of(gpt2(vocab_size=72), tmp_path)
    log = log_of(lambda: trainer._load_from_checkpoint(str(root / "checkpoint-6")))
    found = the("CKV004", root, log=log)
    assert found.fix[0].startswith("model.resize_token_embeddings(64)") and "72" in found.saw
    assert found.evidence[0] == "checkpoint-6/config.json: vocab_size 64" and "padding" in found.evidence[1]
    assert [c for c in codes(root, log=log) if c.startswith("CK")] == ["CKV004"]
    assert "weren't" not in found.means and codes(log=log) == ["CKV004"]


def test_CKV004_as_from_pretrained_says_it(real: Real) -> None:
    checkpoint = real("trainer_full") / "checkpoint-6"
    logs: list[str] = []
    table = said_by(lambda: logs.append(log_of(lambda: GPT2LMHeadModel.from_pretrained(checkpoint, vocab_size=61))))
    found = the("CKV004", log=f"{table}\n{logs[0]}")
    assert found.fix[0].startswith("model.resize_token_embeddings(64)") and "not this time" in found.means


def test_CKV005(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    wider = trainer_of(gpt2(n_embd=32), tmp_path)
    found = the("CKV005", root, log=log_of(lambda: wider._load_from_checkpoint(str(root / "checkpoint-6"))))
    assert "n_embd is 16 in checkpoint-6/config.json; the model being built has 32" in found.evidence
    assert "transformer.wte.weight: [64, 16]" in found.saw
    state = load_file(root / "checkpoint-6" / "model.safetensors")
    found = the("CKV005", root, log=log_of(lambda: gpt2(n_layer=3).load_state_dict(state)))
    assert any(line.startswith("n_layer is 2") and line.endswith("has 3") for line in found.evidence)


def test_CKV005_in_silence(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    deeper = trainer_of(gpt2(n_layer=3), tmp_path)
    log = said_by(lambda: deeper._load_from_checkpoint(str(root / "checkpoint-6")))
    found = the("CKV005", root, log=log)
    assert "13 tensors" in found.saw and "random" in found.means
    assert codes(log=log) == ["CKV005"]


def test_CKV005_a_smaller_model_leaves_tensors_out(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    shallow = trainer_of(gpt2(n_layer=1), tmp_path)
    said = said_by(lambda: shallow._load_from_checkpoint(str(root / "checkpoint-6")))
    found = the("CKV005", root, log=said)
    assert "no place for 12 tensors" in found.saw and "transformer.h.1." in found.saw
    # The optimizer stops the resume afterwards: that is the effect, not the cause.
    log = said + log_of(lambda: shallow._load_optimizer_and_scheduler(str(root / "checkpoint-6")))
    assert codes(root, log=log)[0] == "CKV005" and "CKV007" not in codes(root, log=log)


def test_CKV005_checkpoints_of_other_models(real: Real) -> None:
    root = real("trainer_full")
    edit(root / "checkpoint-6" / "config.json", n_layer=4, vocab_size=99)
    found = the("CKV005", root)
    assert found.severity == "warning" and "vocab_size: 64, 99; n_layer: 2, 4" in found.saw


@pytest.mark.parametrize("new", ["sgd", "adafactor", "adagrad", "rmsprop"])
def test_CKV006(new: str, real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")

    def resumed() -> None:
        trainer = trainer_of(gpt2(), tmp_path, optim=new)
        trainer._load_optimizer_and_scheduler(str(root / "checkpoint-6"))
        stepped(trainer)

    log = log_of(resumed)
    found = the("CKV006", root, log=log)
    assert "checkpoint-6/optimizer.pt is the state of Adam" in found.evidence[0]
    assert found.fix[0] == "optim='adamw_torch'" and codes(log=log) == ["CKV006"]


def test_CKV006_before_it_happens(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    assert "state of Adam" in the("CKV006", root, args={"optim": "sgd"}).saw
    assert codes(root, args={"optim": "adamw_torch_fused"}, select=["CKV"]) == []
    sgd = trainer_of(gpt2(), tmp_path, optim="sgd")
    torch.save(sgd.optimizer.state_dict(), root / "checkpoint-6" / "optimizer.pt")
    assert "state of SGD" in the("CKV006", root, args={"optim": "adamw_torch"}).saw
    adam = trainer_of(gpt2(), tmp_path)
    log = log_of(lambda: (adam._load_optimizer_and_scheduler(str(root / "checkpoint-6")), stepped(adam)))
    assert "'betas'" in the("CKV006", log=log).saw


def test_CKV007(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    model = gpt2()
    model.transformer.wte.weight.requires_grad_(False)
    trainer = trainer_of(model, tmp_path)
    found = the("CKV007", root, log=log_of(lambda: trainer._load_optimizer_and_scheduler(str(root / "checkpoint-6"))))
    assert found.evidence[0].startswith("checkpoint-6/optimizer.pt: 28 parameters in groups of")
    assert "all 28 tensors of the checkpoint were trained" in found.evidence[1]
    state = torch.load(root / "checkpoint-6" / "optimizer.pt")
    log = log_of(lambda: torch.optim.AdamW(gpt2().parameters()).load_state_dict(state))
    assert "different number" in the("CKV007", log=log).saw
    torch.save(frozen_optimizer(), root / "checkpoint-6" / "optimizer.pt")
    assert "transformer.wte.weight" in the("CKV007", root, log=log).evidence[1]


def frozen_optimizer() -> Any:
    """The state of an optimizer that trained all but the embedding."""
    model = gpt2()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "wte" not in n])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def test_CKV008_a_the_optimizer_counts_no_steps(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    path = root / "checkpoint-6" / "optimizer.pt"
    changed(path, lambda tree: [entry.pop("step") for entry in tree["state"].values()] and None)
    found = the("CKV008", root)
    assert found.where == "checkpoint-6" and "28 of 28 parameters" in found.saw
    trainer = trainer_of(gpt2(), tmp_path)
    log = log_of(lambda: trainer._load_optimizer_and_scheduler(str(path.parent)))
    found = the("CKV008", root, log=log)
    assert "28 of 28" in found.evidence[0] and "torch.tensor(6.0)" in found.fix[0]
    the("CKV008", log=log)
    repaired = next(word for word in shlex.split(found.fix[0], comments=True) if word.startswith("import torch"))
    exec(repaired)
    trainer._load_optimizer_and_scheduler(str(path.parent))
    assert codes(root) == []


def test_CKV008_b_accelerate_could_not_read_the_random_states(real: Real) -> None:
    root = real("accelerate_run")
    log = (
        "Could not load random states\nTraceback (most recent call last):\n"
        '  File "train.py", line 40, in main\n    accelerator.load_state("checkpoints/checkpoint_2")\n'
        '  File "/env/site-packages/accelerate/accelerator.py", line 3152, in load_state\n'
        "    self.step = override_attributes[\"step\"]\nKeyError: 'step'\n"
    )
    found = the("CKV008", root, log=log)
    assert "accelerate>=0.34" in found.fix[0]
    assert found.evidence[0].startswith("checkpoints/checkpoint_2/random_states_0.pkl is there and readable")
    (root / "checkpoints" / "checkpoint_2" / "random_states_0.pkl").unlink()
    found = the("CKV008", root, log=log)
    assert found.evidence[0] == "checkpoints/checkpoint_2 has no random_states_*.pkl"
    assert found.evidence[1].startswith("the log says before")


def test_CKV008_c_a_parameter_that_never_got_a_gradient(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    root = tmp_path / "run"
    one, two = {"state.a.step": torch.zeros(1)}, {"state.b.step": torch.zeros(1)}
    saved = {"optim": {**one, "state.a.exp_avg": torch.zeros(2)}}
    with pytest.warns(UserWarning, match="torch.distributed is"):
        dcp.save(saved, checkpoint_id=root / "step-2")
    with pytest.warns(UserWarning, match="torch.distributed is"):
        log = log_of(lambda: dcp.load({"optim": {**one, **two}}, checkpoint_id=root / "step-2"))
    found = the("CKV008", root, log=log)
    assert "optim.state.b" in found.saw and "allow_partial_load=True" in found.fix[0]
    assert found.evidence == ("1 parameters have a step in it, this one has no state at all",)
    the("CKV008", log=log)


def test_CKV008_one_line_leaves_all_three(real: Real) -> None:
    for line in ("KeyError: 'step'", "'step' not in checkpoint"):
        found = the("CKV008", log=line)
        assert "no traceback" in found.saw and "accelerate 0.32" in found.means
    assert "accelerate" in the("CKV008", real("accelerate_run"), log="KeyError: 'step'").means


def test_CKV009(real: Real) -> None:
    root = real("trainer_full")
    path = root / "checkpoint-6" / "optimizer.pt"
    changed(path, lambda tree: [entry.update(step=int(entry["step"])) for entry in tree["state"].values()] and None)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[weight]["step"] = 3
    log = log_of(optimizer.step)
    found = the("CKV009", root, log=log)
    assert found.evidence == ("checkpoint-6/optimizer.pt: the step of 28 of 28 parameters is a number, 6",)
    assert codes(root) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is on a GPU can be loaded here")
def test_CKV010(real: Real, tmp_path: Path) -> None:
    log = log_of(lambda: torch.serialization._validate_device("cuda:0", "cuda"))
    assert "map_location" in the("CKV010", log=log).fix[0]
    one = (
        "RuntimeError: Attempting to deserialize object on CUDA device 3 but torch.cuda.device_count() is 1. Please use"
    )
    the("CKV010", log=one)
    root = real("trainer_full")
    path = root / "checkpoint-6" / "rng_state.pth"
    changed(path, lambda tree: {**tree, "cpu": tree["cpu"].float()})
    assert "is F32" in the("CKV010", root).saw
    trainer = trainer_of(gpt2(), tmp_path)
    found = the("CKV010", root, log=log_of(lambda: trainer._load_rng_state(str(path.parent))))
    assert "ByteTensor" in found.saw and "F32" in found.evidence[0]


def test_CKV011(tmp_path: Path) -> None:
    shared = log_of(lambda: save_file(gpt2().state_dict(), tmp_path / "a.safetensors"))
    assert "save_model" in the("CKV011", log=shared).fix[0]
    the("CKV011", log=log_of(lambda: save_file({"a": torch.zeros(3, 4).t()}, tmp_path / "b.safetensors")))


def test_CKV012(real: Real) -> None:
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as Lightning

    root = real("lightning_run")
    path = root / "checkpoints" / "last.ckpt"
    changed(path, lambda tree: {k: v for k, v in tree.items() if k not in ("optimizer_states", "lr_schedulers")})

    class Tuned(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    trainer = Lightning(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=7, default_root_dir=path.parent,
    )  # fmt: skip
    trainer.strategy.connect(Tuned())
    connector = trainer._checkpoint_connector
    connector.resume_start(path, weights_only=False)
    found = the("CKV012", root, log=log_of(connector.restore_optimizers_and_schedulers))
    assert "checkpoints/last.ckpt holds weights alone" in found.evidence


def test_CKV013(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    checkpoint = root / "checkpoint-6"
    log = said_by(lambda: trainer_of(gpt2(), tmp_path)._load_from_checkpoint(str(checkpoint)))
    found = the("CKV013", root, log=log)
    assert found.severity == "benign" and codes(root, log=log) == ["CKV013"]
    edit(checkpoint / "config.json", tie_word_embeddings=False)
    log = said_by(lambda: trainer_of(gpt2(tie_word_embeddings=False), tmp_path)._load_from_checkpoint(str(checkpoint)))
    assert the("CKV013", root, log=f"{log} checkpoint-6").severity == "error"


def test_what_a_managed_resume_refuses() -> None:
    model, wider = gpt2(), gpt2(vocab_size=72)
    expected = {name: digest(tensor) for name, tensor in live_tensors(model).items()}
    assert codes(log=log_of(lambda: weights.restore(wider, expected, dict))) == ["CKV004"]
    assert codes(log=log_of(lambda: weights.restore(gpt2(n_layer=3), expected, dict))) == ["CKV005"]
    assert codes(log="AssertionError: model differs after resume") == ["CKV005"]
    parameters = live_tensors(model)
    adam, sgd = torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters())
    values, tensors = optimizer.capture(adam, parameters)
    assert codes(log=log_of(lambda: optimizer.restore(sgd, parameters, values, tensors))) == ["CKV006"]
    fewer = torch.optim.AdamW(list(model.parameters())[1:])
    assert codes(log=log_of(lambda: optimizer.restore(fewer, parameters, values, tensors))) == ["CKV007"]


def test_hundreds_of_checkpoints_are_looked_at_quickly(real: Real) -> None:
    root = real("trainer_peft")
    weights_of = load_file(root / "checkpoint-6" / "adapter_model.safetensors")
    state = json.loads((root / "checkpoint-6" / "trainer_state.json").read_text())
    for step in range(8, 408, 2):
        copy = shutil.copytree(root / "checkpoint-6", root / f"checkpoint-{step}", copy_function=os.link)
        for name in ("adapter_model.safetensors", "trainer_state.json"):
            (copy / name).unlink()
        (copy / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
        save_file({name: t + step for name, t in weights_of.items()}, copy / "adapter_model.safetensors")
    disk = Disk(root)
    assert disk.good is not None  # shared by all rules: what it costs is not theirs
    case = case_of(disk, None, None)
    began = time.process_time()
    assert examine(case, select=["CKV", "CKP"]) == ()
    assert time.process_time() - began < 5


def test_hostile_files_stop_no_rule(real: Real) -> None:
    root = real("trainer_peft")
    shutil.copy(real("trainer_full") / "checkpoint-6" / "config.json", root / "checkpoint-6" / "config.json")
    contents = ("[]", '{"vocab_size": "64", "n_layer": {}, "text_config": 3}', '{"transformers_version": 5}', "{")
    trees: tuple[Any, ...] = (
        [],
        {"param_groups": 3},
        {"param_groups": [{"params": 1}, 4], "state": {1: 2}},
        {1: {2: 3}},
    )
    lines = (
        "KeyError: 'step'",
        "KeyError: 'betas'",
        "size mismatch for a.lora_A.weight: copying a",
        "ValueError: loaded state dict has a different number of parameter groups",
    )
    for content, tree in zip(contents, trees, strict=True):
        (root / "checkpoint-6" / "config.json").write_text(content)
        (root / "checkpoint-4" / "adapter_config.json").write_text(content)
        torch.save(tree, root / "checkpoint-6" / "optimizer.pt")
        torch.save(tree, root / "checkpoint-6" / "rng_state.pth")
        for line in lines:
            codes(root, log=f"checkpoint-6\n{line}", args={"optim": 3, "r": [], "target_modules": {}})
