"""A 4-bit base with LoRA on top, as QLoRA fine-tunes have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed

import lastgood

import forked
from training import Bytes, KillAt, Pad, arguments, outcome

pytest.importorskip("bitsandbytes", reason="bitsandbytes has no package for this system")


def build(base: Path, out: Path, *callbacks: TrainerCallback) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(base, quantization_config=settings, device_map={"": "cpu"})
    set_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
    return Trainer(
        model=model, args=arguments(out), train_dataset=Bytes(64), data_collator=Pad(), callbacks=list(callbacks)
    )


def go(base: Path, out: Path, result: Path, kill: int | None = None) -> None:
    trainer = lastgood.manage(build(base, out, *([] if kill is None else [KillAt(kill)])))
    trainer.train(resume_from_checkpoint="auto")
    result.write_text(json.dumps(outcome(trainer)))


def test_I1_I8_qlora_is_exact(tmp_path: Path) -> None:
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(tmp_path / "base")
    log, base = tmp_path / "log", tmp_path / "base"
    assert forked.run(go, base, tmp_path / "a", tmp_path / "a.json", log=log) == 0, log.read_text()
    assert forked.run(go, base, tmp_path / "b", tmp_path / "b.json", 5, log=log) == -9, log.read_text()
    assert forked.run(go, base, tmp_path / "b", tmp_path / "b.json", log=log) == 0, log.read_text()
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads((tmp_path / "a.json").read_text())
