"""Adapters of all kinds: what PEFT saves of them, and what it doesn't, comes back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer

import lastgood

from training import Bytes, Pad, arguments, digest, tiny_gpt2

LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
KINDS: dict[str, Any] = {
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "bias": lambda: peft.LoraConfig(**LORA, bias="all"),
    "modules to save": lambda: peft.LoraConfig(**LORA, modules_to_save=["ln_f"]),
    "new tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices={"wte": [250, 251]}),
    "ia3": lambda: peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["c_proj"], fan_in_fan_out=True),
}


def trainer(kind: str, out: Path, fill: bool = False) -> Any:
    torch.set_num_threads(1)
    model = peft.get_peft_model(tiny_gpt2(), KINDS[kind]())
    if fill:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(123)
    args = arguments(out, max_steps=4)
    return lastgood.manage(Trainer(model=model, args=args, train_dataset=Bytes(64), data_collator=Pad()))


@pytest.mark.filterwarnings("ignore")  # each kind of adapter has warnings of its own; here the weights count
@pytest.mark.parametrize("kind", KINDS)
def test_I7_I8_every_kind_of_adapter_is_restored_completely(kind: str, tmp_path: Path) -> None:
    straight = trainer(kind, tmp_path / "a")
    straight.train()
    shutil.copytree(tmp_path / "a" / ".lastgood", tmp_path / "b" / ".lastgood")
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = trainer(kind, tmp_path / "b", fill=True)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.resume_report.step == 2
    assert digest(resumed.model.state_dict()) == digest(straight.model.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_I8_two_adapters_in_one_model(tmp_path: Path) -> None:
    def build(out: Path) -> Any:
        model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**LORA))
        model.add_adapter("second", peft.LoraConfig(**LORA, init_lora_weights=False))
        model.set_adapter("second")
        args = arguments(out, max_steps=4)
        return lastgood.manage(Trainer(model=model, args=args, train_dataset=Bytes(64), data_collator=Pad()))

    straight = build(tmp_path / "a")
    straight.train()
    assert (tmp_path / "a" / "checkpoint-2" / "second" / "adapter_model.safetensors").exists()
    shutil.copytree(tmp_path / "a" / ".lastgood", tmp_path / "b" / ".lastgood")
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = build(tmp_path / "b")
    resumed.train(resume_from_checkpoint="auto")
    assert digest(resumed.model.state_dict()) == digest(straight.model.state_dict())
