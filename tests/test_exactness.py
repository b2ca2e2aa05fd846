"""SIGKILL, resume by the same command, and everything is as if nothing had happened: weights, optimizer, losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainingArguments

import forked
from training import Case, train

CASES = [
    Case("full fine-tune"),
    Case("killed before the first save", kills=(1,)),
    Case("killed right after a save", kills=(4,)),
    Case("two resumes in one epoch", kills=(3, 5)),
    Case("three resumes, the last at the last step", kills=(2, 5, 7)),
    Case("lora with dropout", lora=True),
    Case("lora, two resumes", lora=True, kills=(3, 7)),
    Case("gradient accumulation", args={"gradient_accumulation_steps": 2}),
    Case("gradient accumulation with a remainder", rows=10, args={"gradient_accumulation_steps": 3}, kills=(3, 5)),
    Case("data length not divisible", rows=7, kills=(3, 6)),
    Case("epoch boundary", rows=8, args={"save_steps": 4}, kills=(5,)),
    Case("epoch boundary, killed at it", rows=8, args={"save_steps": 4}, kills=(4,)),
    Case("second epoch", rows=10, kills=(7,)),
    Case("save_strategy epoch", rows=8, args={"save_strategy": "epoch"}, kills=(5,)),
    Case("evaluation at the step of the save", evaluate=True, kills=(5,)),
    Case("evaluation and epoch ends", rows=8, args={"eval_strategy": "epoch"}, evaluate=True, kills=(5,)),
    Case(
        "evaluation at epoch end only, save before it",
        rows=8,
        args={"eval_strategy": "epoch", "save_steps": 4, "logging_strategy": "epoch"},
        evaluate=True,
        kills=(4, 6),
    ),
    Case("evaluation more often than saves", args={"save_steps": 4, "eval_steps": 1}, evaluate=True, kills=(7,)),
    Case("two workers", args={"dataloader_num_workers": 2}),
    Case(
        "workers that live on",
        rows=10,
        args={"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        kills=(7,),
    ),
    Case("bf16", args={"bf16": True}),
    Case("bf16 weights", model={"dtype": "bfloat16"}),
    Case("adafactor", args={"optim": "adafactor"}),
    Case("adafactor on bf16 weights", args={"optim": "adafactor"}, model={"dtype": "bfloat16"}),
    Case("sgd with momentum", args={"optim": "sgd", "optim_args": "momentum=0.9"}),
    Case("cosine with warm-up", args={"lr_scheduler_type": "cosine", "warmup_steps": 3}),
    Case(
        "reduce on plateau",
        args={
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        },
        evaluate=True,
    ),
    Case("grouped by length", ragged=True, args={"train_sampling_strategy": "group_by_length"}, kills=(3, 5)),
    Case(
        "grouped by length, second epoch",
        rows=10,
        ragged=True,
        args={"train_sampling_strategy": "group_by_length"},
        kills=(7,),
    ),
    Case("batches balanced by length", ragged=True, args={"train_sampling_strategy": "batch_rebalance"}, kills=(3, 5)),
    Case("a stream without a length", stream=True, kills=(3, 5)),
    Case("a stream and two workers", stream=True, args={"dataloader_num_workers": 2}),
    Case("sequential", args={"train_sampling_strategy": "sequential"}),
    Case(
        "order drawn from the global generator",
        rows=10,
        args={"accelerator_config": {"use_seedable_sampler": False}},
        kills=(3, 7),
    ),
    Case("neftune", args={"neftune_noise_alpha": 5.0}),
    Case("random data", noise="torch python numpy", kills=(5,)),
    Case("random data, two resumes in one epoch", noise="torch python numpy", kills=(3, 5)),
    Case("random data, second epoch", rows=10, noise="torch", kills=(7,)),
    Case(
        "random data and accumulation",
        rows=20,
        noise="torch python",
        args={"gradient_accumulation_steps": 2},
        kills=(3, 7),
    ),
    Case("random data in two workers", noise="torch python numpy", args={"dataloader_num_workers": 2}, kills=(3, 5)),
    Case("random collator", noisy_collator=True, kills=(3, 5)),
    Case("random collator in two workers", noisy_collator=True, args={"dataloader_num_workers": 2}),
    Case("torch.compile", args={"torch_compile": True, "torch_compile_backend": "eager"}),
    Case("logging every third step", args={"logging_steps": 3}),
    Case("gradient checkpointing", args={"activation_checkpointing": True}),
    Case("replayed data", args={}, options={"data_skip": "replay"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_I1_I8_killed_and_resumed_equals_uninterrupted(case: Case, tmp_path: Path) -> None:
    if unknown := set(case.args) - set(TrainingArguments.__dataclass_fields__) - {"train_sampling_strategy"}:
        pytest.skip(f"this transformers has no {unknown}")  # an older one than the tests are written for
    straight, broken = tmp_path / "straight.json", tmp_path / "broken.json"
    assert forked.run(train, case, tmp_path / "a", straight, log=tmp_path / "a.log") == 0, (
        tmp_path / "a.log"
    ).read_text()
    for kill in case.kills:
        status = forked.run(train, case, tmp_path / "b", broken, kill=kill, log=tmp_path / "b.log")
        assert status == -9, (tmp_path / "b.log").read_text()
    assert forked.run(train, case, tmp_path / "b", broken, log=tmp_path / "b.log") == 0, (
        tmp_path / "b.log"
    ).read_text()
    expected, found = json.loads(straight.read_text()), json.loads(broken.read_text())
    assert found == expected, (tmp_path / "b.log").read_text()


def test_managing_changes_nothing(tmp_path: Path) -> None:
    """A managed run that isn't interrupted is the stock run, bit for bit."""
    case = Case("stock", noise="torch", evaluate=True, rows=10)

    def stock(result: Path) -> None:
        from training import outcome

        trainer = case.trainer(tmp_path / "stock")
        trainer.train()
        result.write_text(json.dumps(outcome(trainer)))

    assert forked.run(stock, tmp_path / "stock.json", log=tmp_path / "stock.log") == 0, (
        tmp_path / "stock.log"
    ).read_text()
    assert forked.run(train, case, tmp_path / "m", tmp_path / "m.json", log=tmp_path / "m.log") == 0
    assert json.loads((tmp_path / "m.json").read_text()) == json.loads((tmp_path / "stock.json").read_text())
