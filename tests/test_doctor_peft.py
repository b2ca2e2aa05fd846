"""CKP: adapters. Real errors of peft and the Trainer, and silence where all is well."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from lastgood.errors import Incompatible
from lastgood.state import weights
from lastgood.state.fingerprint import live_tensors
from lastgood.state.tensors import digest
from lastgood.weights.adapter import Adapter
from lastgood.weights.check import check
from test_doctor_version import edit, gpt2, said_by, trainer_of

import cli
from sick import codes, log_of, the

Real = Callable[[str], Path]


def adapted(model: Any = None, **changes: Any) -> Any:
    """The adapter of the real run, or another one."""
    options: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    return get_peft_model(model or gpt2(), LoraConfig(**{**options, **changes}, task_type="CAUSAL_LM"))


@pytest.fixture
def root(real: Real, tmp_path: Path) -> Path:
    """The real run of an adapter, with a base of its own beside it."""
    run = real("trainer_peft")
    written = json.loads((run / "checkpoint-6" / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = shutil.copytree(written, tmp_path / "base")
    for config in run.glob("*/adapter_config.json"):
        edit(config, base_model_name_or_path=str(base))
    return run


def printed(model: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """What a script prints before it trains."""
    capsys.readouterr()
    model.print_trainable_parameters()
    return capsys.readouterr().out


def adapter(root: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """The newest adapter with other tensors."""
    path = root / "checkpoint-6" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_a_healthy_run(root: Path) -> None:
    assert codes(root, full=True) == codes(root) == []
    assert codes(root, args={"lora_r": 2, "lora_target_modules": ["c_attn"]}, select=["CKP"]) == []


def test_CKP001(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = PeftModel.from_pretrained(gpt2(), root / "checkpoint-6")
    before, trainer = printed(model, capsys), trainer_of(model, tmp_path)
    log = log_of(lambda: trainer._load_optimizer_and_scheduler(str(root / "checkpoint-6")))
    found = the("CKP001", root, log=before + log)
    assert "is_trainable=True" in found.fix[0] and codes(root, log=before + log) == ["CKP001"]
    # Without that line nothing tells an adapter for inference from one with other targets: both are said.
    found = the("CKV007", root, log=log)
    assert "is_trainable" in found.fix[0] and "target_modules c_attn" in found.evidence[-1]
    assert codes(root, log=log) == ["CKV007"]
    ids = torch.zeros(1, 4, dtype=torch.long)
    log = before + log_of(model(input_ids=ids, labels=ids).loss.backward)
    assert codes(root, log=log) == ["CKP001"]


def test_CKP001_nothing_was_trained(root: Path) -> None:
    shutil.copy(root / "checkpoint-4" / "adapter_model.safetensors", root / "checkpoint-6")
    found = the("CKP001", root)
    assert found.where == "checkpoint-6" and "step 4 to 6" in found.means
    state = {"state": {}, "param_groups": [{"params": []}, {"params": []}]}
    torch.save(state, root / "checkpoint-6" / "optimizer.pt")
    assert the("CKP001", root).evidence == ("checkpoint-6/optimizer.pt has no parameters in it",)


def test_CKP002(root: Path, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(r=8), tmp_path)
    log = log_of(lambda: trainer._load_from_checkpoint(str(root / "checkpoint-6")))
    found = the("CKP002", root, log=log)
    assert "rank 2 in the checkpoint, 8 in the model" in found.saw and found.fix[0].startswith(
        "LoraConfig(r=2, lora_alpha=4"
    )
    assert codes(root, log=log) == codes(log=log) == ["CKP002"]
    assert "rank 8" in the("CKP002", root, args={"lora_r": 8}).saw
    edit(root / "checkpoint-6" / "adapter_config.json", r=4)
    assert "r: 2, 4" in the("CKP002", root).saw


def test_CKP002_another_base_has_other_outer_sizes(root: Path, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(gpt2(n_embd=32)), tmp_path)
    found = the("CKP002", root, log=log_of(lambda: trainer._load_from_checkpoint(str(root / "checkpoint-6"))))
    assert "another base model" in found.means


def test_CKP003(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(target_modules=["c_attn", "c_proj"])
    before, trainer = printed(model, capsys), trainer_of(model, tmp_path)
    log = before + log_of(lambda: trainer._load_optimizer_and_scheduler(str(root / "checkpoint-6")))
    found = the("CKP003", root, log=log)
    assert "are trained now, 256 are in the adapter" in found.saw and "target_modules c_attn" in found.evidence[0]
    assert codes(root, log=log) == ["CKP003"]
    edit(root / "checkpoint-6" / "adapter_config.json", target_modules=["c_proj", "c_attn"])
    assert "target_modules: c_attn, c_attn, c_proj" in the("CKP003", root).saw
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(gpt2(), root / "checkpoint-6")
    log = "\n".join(f"peft_model.py:642: UserWarning: {warning.message}" for warning in caught)
    assert "4 tensors" not in log and "for c_proj" in the("CKP003", log=log).saw


def test_CKP003_modules_to_save_that_were_not(root: Path, tmp_path: Path) -> None:
    more = trainer_of(adapted(modules_to_save=["lm_head"], ensure_weight_tying=True), tmp_path)
    log = log_of(lambda: more._load_from_checkpoint(str(root / "checkpoint-6")))
    assert "KeyError: 'base_model.model." in log
    assert "modules_to_save" in the("CKP003", root, log=log).fix[0]
    the("CKP003", log=log)


def test_CKP003_the_arguments_name_others(root: Path) -> None:
    found = the("CKP003", root, args={"lora_target": "c_attn,c_fc", "output_dir": "x"})
    assert found.saw == "the arguments name c_attn, c_fc, adapter_config.json has c_attn"


def test_CKP004(root: Path, tmp_path: Path) -> None:
    log = log_of(lambda: trainer_of(gpt2(), tmp_path)._load_from_checkpoint(str(root / "checkpoint-6")))
    assert "get_peft_model" in the("CKP004", root, log=log).fix[0]
    state = load_file(root / "checkpoint-6" / "adapter_model.safetensors")
    assert codes(root, log=log_of(lambda: gpt2().load_state_dict(state))) == ["CKP004"]


def test_CKP005(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    model = adapted()
    log = said_by(lambda: trainer_of(model, tmp_path)._load_from_checkpoint(str(root / "checkpoint-6")))
    found = the("CKP005", root, log=log)
    assert "28 tensors of a whole model" in found.evidence[0] and codes(root, log=log) == ["CKP005"]
    state = load_file(root / "checkpoint-6" / "model.safetensors")
    assert codes(root, log=log_of(lambda: model.load_state_dict(state))) == ["CKP005"]


def test_CKP006(root: Path) -> None:
    name = "base_model.model.transformer.wte.weight"
    adapter(root, lambda tensors: {**tensors, name: torch.zeros(64, 16)})
    found = the("CKP006", root)
    assert name in found.saw and found.severity == "warning" and "80%" in found.evidence[0]
    adapter(root, lambda tensors: {**tensors, name: torch.zeros(70, 16)})  # the vocabulary was extended
    assert codes(root) == []
    adapter(root, lambda tensors: {**tensors, name: torch.zeros(64, 16)})
    edit(root / "checkpoint-6" / "adapter_config.json", modules_to_save=["wte"])  # it was asked for
    assert "CKP006" not in codes(root)


def test_CKP006_as_peft_saves_it(root: Path) -> None:
    model = adapted()
    model.save_pretrained(root / "checkpoint-6", save_embedding_layers=True)
    edit(
        root / "checkpoint-6" / "adapter_config.json",
        base_model_name_or_path=str(root.parent / "base"),
        lora_dropout=0.1,
    )
    assert "CKP006" in codes(root)


def test_CKP007(root: Path) -> None:
    gpt2(n_embd=32).save_pretrained(root.parent / "base")
    found = the("CKP007", root)
    assert "c_attn.weight is [32, 96] in the base" in found.saw and found.where == "checkpoint-6"
    edit(root / "checkpoint-6" / "adapter_config.json", base_model_name_or_path="somebody/else")
    assert "name other bases" in the("CKP007", root).saw


def test_CKP007_a_tokenizer_with_more_tokens_than_the_base(root: Path) -> None:
    (root / "checkpoint-6" / "added_tokens.json").write_text(json.dumps({"<a>": 63}))
    assert codes(root) == []
    (root / "checkpoint-6" / "added_tokens.json").write_text(json.dumps({"<a>": 63, "<b>": 64}))
    assert "1 tokens beyond the 64 rows" in the("CKP007", root).saw


def test_CKP007_a_managed_run_knows_every_tensor_of_its_base(root: Path) -> None:
    base = root.parent / "base"
    model = adapted(GPT2LMHeadModel.from_pretrained(base))
    recorded = {name: digest(tensor) for name, tensor in live_tensors(model).items()}
    told = root / "checkpoint-6" / "tensors.json"
    told.write_text(json.dumps({"format": 1, "tensors": recorded}))
    assert codes(root, full=True) == []
    other = GPT2LMHeadModel.from_pretrained(base)
    other.transformer.ln_f.weight.data[3] += 1
    other.save_pretrained(base)
    assert "transformer.ln_f.weight of the base has other values" in the("CKP007", root).saw
    told_by_us = log_of(lambda: weights.restore(adapted(other), recorded, dict))
    assert codes(log=told_by_us) == ["CKP007"]
    other = GPT2LMHeadModel.from_pretrained(base)
    other.resize_token_embeddings(70, mean_resizing=False)
    other.save_pretrained(base)
    assert "transformer.wte.weight was F32[64, 16] at the save, the base has F32[70, 16]" in the("CKP007", root).saw


def test_CKP008() -> None:
    text = "Check some examples here: https://github.com/huggingface/peft/issues/96"
    line = f"The intermediate checkpoints of PEFT may not be saved correctly, consider using a custom callback. {text}"
    assert the("CKP008", log=line).severity == "warning"


def test_CKP009(root: Path, tmp_path: Path) -> None:
    adapter(root, lambda tensors: {name: torch.zeros(0) for name in tensors})
    found = the("CKP009", root)
    assert "4 tensors of the adapter are empty" in found.saw
    log = log_of(lambda: trainer_of(adapted(), tmp_path)._load_from_checkpoint(str(root / "checkpoint-6")))
    assert [code for code in codes(root, log=log) if code != "CKP010"] == ["CKP009"]
    assert codes(log=log) == ["CKP009"]


def test_CKP009_as_peft_warns_at_the_save(tmp_path: Path) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.empty(0)  # what ZeRO-3 leaves on a process that hasn't gathered
    with pytest.warns(UserWarning, match="invalid shape") as caught:
        model.save_pretrained(tmp_path / "saved")
    the("CKP009", log=str(caught[0].message))


def test_CKP010(root: Path) -> None:
    adapter(root, lambda tensors: {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()})
    found = the("CKP010", root)
    assert "all 2 lora_B of the adapter are zero at step 6" in found.saw
    assert codes(root) == ["CKP010"]


def test_CKP010_a_merge_that_did_nothing(root: Path) -> None:
    base = GPT2LMHeadModel.from_pretrained(root.parent / "base")
    log = log_of(lambda: check(base, base, Adapter.open(root / "checkpoint-6")))
    assert "2 tensors of the merged model" in the("CKP010", log=log).saw and Incompatible.__name__ in log
    out = cli.call("-C", root, "checkout", "latest", root.parent / "merged", "--merge")
    assert out[0] == 0 and "CKP010" not in codes(log=out[1] + out[2]), out
    path = root.parent / "base" / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(path).items() if "wte" not in name}
    save_file({**load_file(path), **half}, path, {"format": "pt"})  # in several dtypes, which loading evens out
    out = cli.call("-C", root, "checkout", "latest", root.parent / "again", "--merge")
    assert out[0] and "are not those of the base" in the("CKP010", log=out[2]).saw, out


def test_CKP011(root: Path, tmp_path: Path) -> None:
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    inner = torch.nn.Linear(2, 2)

    def trained() -> None:
        with pytest.warns(UserWarning, match="requires_grad=True") as caught:
            out = torch.utils.checkpoint.checkpoint(inner, frozen(torch.ones(2)), use_reentrant=True)
        said.append(str(caught[0].message))
        out.sum().backward()

    said: list[str] = []
    log = log_of(trained)
    found = the("CKP011", log=f"{said[0]}\n{log}")
    assert "cuts the way back: its inputs" in found.means and "enable_input_require_grads" in found.fix[0]
    found = the("CKP011", root, log=log)
    assert "decides" in found.means and "is_trainable" in found.fix[-1]
