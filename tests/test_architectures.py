"""Over many architectures: a resume puts back every tensor, and the files load with lastgood out of the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import lastgood

from zoo import ZOO, Model

ROWS = 8


class Remember(TrainerCallback):
    """The model's state at the save of step 2."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.state = copied(model)


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def stack_with_loss(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {**stack(rows), "return_loss": True}


def managed(entry: Model, model: Any, out: Path, *callbacks: TrainerCallback) -> Trainer:
    torch.set_num_threads(1)
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=entry.rows(ROWS),  # type: ignore[arg-type]
        data_collator=stack_with_loss if entry.kind == "clip" else stack,
        callbacks=list(callbacks),
    )
    return lastgood.manage(trainer)


def fill(model: torch.nn.Module, only: str = "") -> None:
    """123 everywhere that a restore has to reach."""
    persistent = model.state_dict().keys()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if only in name and (name in persistent or isinstance(tensor, torch.nn.Parameter)):
                tensor.fill_(123)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong, f"{what}: {len(wrong)} of {len(expected)} tensors differ: {wrong[:5]}"


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_I7_I8_full_fine_tune_is_restored_completely(entry: Model, tmp_path: Path) -> None:
    memory = Remember()
    straight = managed(entry, entry.build(), tmp_path / "a", memory)
    straight.train()
    shutil.copytree(tmp_path / "a" / ".lastgood", tmp_path / "b" / ".lastgood")
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    model = entry.build(seed=5)
    fill(model)
    resumed = managed(entry, model, tmp_path / "b")
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.lastgood.report.step == 2  # type: ignore[attr-defined]
    assert_same(copied(resumed.model), copied(straight.model), "after the resumed run")

    loaded = type(model).from_pretrained(tmp_path / "a" / "checkpoint-2")
    assert_same(copied(loaded), memory.state, "from_pretrained")


@pytest.mark.parametrize("entry", [entry for entry in ZOO if entry.lora], ids=lambda entry: entry.name)
def test_I7_I8_lora_is_restored_completely(entry: Model, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    def adapted() -> Any:
        return get_peft_model(entry.build(), LoraConfig(r=2, lora_dropout=0.1, target_modules=entry.lora))

    memory = Remember()
    straight = managed(entry, adapted(), tmp_path / "a", memory)
    straight.train()
    shutil.copytree(tmp_path / "a" / ".lastgood", tmp_path / "b" / ".lastgood")
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    model = adapted()
    fill(model, only="lora_")
    resumed = managed(entry, model, tmp_path / "b")
    resumed.train(resume_from_checkpoint="auto")
    assert_same(copied(resumed.model), copied(straight.model), "after the resumed run")

    loaded = PeftModel.from_pretrained(entry.build(), tmp_path / "a" / "checkpoint-2")
    assert_same(copied(loaded), memory.state, "PeftModel.from_pretrained")
