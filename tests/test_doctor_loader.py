"""CKL: data order and determinism. What the doctor says of a learning rate is what the Trainer really takes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from lastgood.doctor.diagnose import diagnose
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import trail

import cli
import realruns
from sick import codes, log_of, the

Real = Callable[[str], Path]

KINDS = ("trainer_full", "trainer_peft", "trainer_sharded", "trainer_bin", "accelerate_run", "lightning_run")
SAVED: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2, "eval_steps": 2,
    "eval_strategy": "steps", "metric_for_best_model": "eval_loss", "greater_is_better": False, "seed": 7,
    "learning_rate": 1e-2, "optim": "adamw_torch",
}  # fmt: skip
"""The arguments of realruns.train that have a say here."""
ONLY: dict[str, Any] = {"select": ["CKL"]}


@pytest.mark.parametrize("kind", KINDS)
def test_healthy(kind: str, real: Real) -> None:
    root = real(kind)
    assert codes(root) == []
    assert codes(root, args=SAVED, **ONLY) == []


def test_healthy_managed(tmp_path: Path) -> None:
    assert codes(cli.managed(tmp_path / "run"), **ONLY) == []
    assert codes(cli.branched(tmp_path / "branched"), **ONLY) == []


def again(root: Path, **changes: Any) -> Trainer:
    """The Trainer of a run that is resumed with other arguments."""
    settings = {"report_to": [], "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(root), **{**SAVED, **settings, **changes})
    data: Any = realruns.rows()
    return Trainer(model=realruns.gpt2(), args=arguments, train_dataset=data, eval_dataset=data[:8])


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers logs meanwhile, as a log has it."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    root, level = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    root.addHandler(handler)
    transformers.logging.set_verbosity_info()
    yield lines
    transformers.logging.set_verbosity(level)
    root.removeHandler(handler)


def test_CKL001(tmp_path: Path) -> None:
    the("CKL001", args=TrainingArguments(output_dir=str(tmp_path), report_to="none", ignore_data_skip=True), **ONLY)
    assert codes(args={"ignore_data_skip": False}, **ONLY) == []


def test_CKL002(real: Real, said: list[str]) -> None:
    root = real("trainer_full")
    changes = {"per_device_train_batch_size": 4, "save_steps": 3}
    again(root, **changes).train(resume_from_checkpoint=str(root / "checkpoint-4"))
    found = the("CKL002", log="\n".join(said), **ONLY)
    assert found.saw == "saved -> now: save_steps 2 -> 3, per_device_train_batch_size 2 -> 4"
    assert found.severity == "warning" and found.fix[0] == "per_device_train_batch_size=2"
    # The Trainer's own steps per epoch, as it logged them.
    assert "  Num update steps per epoch = 8" in said
    root = real("trainer_full")
    found = the("CKL002", root, args={**SAVED, **changes}, **ONLY)
    assert found.where == "checkpoint-6"
    assert "steps per epoch: about 16 -> 8" in found.evidence
    assert "12 samples of the epoch were seen by each process, 24 are skipped" in found.evidence[2]
    assert the("CKL002", root, args={**SAVED, "save_steps": 4}, **ONLY).severity == "info"


def test_CKL002_between_checkpoints(real: Real) -> None:
    root = real("trainer_full")
    file = root / "checkpoint-6" / "training_args.bin"
    arguments = torch.load(file, weights_only=False)
    arguments.per_device_train_batch_size = 1
    torch.save(arguments, file)
    found = the("CKL002", root)
    assert (found.where, found.severity) == ("checkpoint-6", "info") and "since checkpoint-4" in found.saw


def test_CKL003(real: Real) -> None:
    root = real("trainer_full")
    found = the("CKL003", root, args={**SAVED, "seed": 8, "gradient_accumulation_steps": 2}, **ONLY)
    assert found.saw == "saved -> now: seed 7 -> 8, gradient_accumulation_steps 1 -> 2"
    assert "steps per epoch: about 16 -> 8" in found.evidence and found.fix[0] == "seed=7"
    assert codes(root, args={**SAVED, "seed": 7.0}, **ONLY) == []
    file = root / "checkpoint-6" / "training_args.bin"
    arguments = torch.load(file, weights_only=False)
    arguments.seed = 8
    torch.save(arguments, file)
    assert the("CKL003", root).severity == "info"
    other = real("fsdp_trainer")
    (other / "checkpoint-4" / "rng_state_0.pth").rename(other / "checkpoint-4" / "rng_state.pth")
    (other / "checkpoint-4" / "rng_state_1.pth").unlink()
    assert the("CKL003", other, **ONLY).saw == "since checkpoint-2: processes 2 -> 1"


def told(root: Path, facts: dict[int, dict[str, Any]]) -> Path:
    """A managed run whose checkpoints carry these facts about the data."""
    made = Manager(root=root, keep=Keep(), on_error="raise")
    root.mkdir()
    made.open()
    made.begin_fresh()
    for step, data in facts.items():
        made.save(
            step, cli.stage(step), estimate=1, environment={}, arguments={}, facts={"data": data, "world_size": 1}
        )
    made.close()
    return root


def test_CKL003_facts_of_a_managed_run(tmp_path: Path) -> None:
    rows = {200: 100, 400: 100, 600: 120}
    root = told(tmp_path / "run", {step: {"type": "list", "length": count} for step, count in rows.items()})
    found = the("CKL003", root, **ONLY)
    assert found.saw == "since the checkpoint before: data.length 100 -> 120" and found.where == "checkpoint-600"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 12},
        {"lr_scheduler_type": "cosine", "max_steps": 10},
        {"max_steps": 20, "warmup_steps": 10},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8},
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": 12, "learning_rate": 0.5},
    ],
)
def test_CKL004(changes: dict[str, Any], real: Real) -> None:
    root = real("trainer_full")
    trainer = again(root, **changes)
    told = trainer.args.max_steps
    trainer.create_optimizer_and_scheduler(told if told > 0 else 32)
    trainer._load_optimizer_and_scheduler(str(root / "checkpoint-6"))
    found = the("CKL004", root, args={**SAVED, **changes}, **ONLY)
    assert trainer.lr_scheduler is not None and trainer.optimizer is not None
    trainer.optimizer.step()
    # What the schedule gives for the step that the checkpoint is at; the loaded one still carries the old value.
    real_rate = trainer.lr_scheduler.base_lrs[0] * trainer.lr_scheduler.lr_lambdas[0](6)
    line = next(line for line in found.evidence if line.startswith("learning rate at step 7"))
    assert line == f"learning rate at step 7: 0 by the schedule as it was, {real_rate:.4g} now"
    assert ("has no effect" in str(found.evidence)) == ("learning_rate" in changes)
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 1e-2


def test_CKL004_only_the_rate_and_nothing(real: Real) -> None:
    root = real("trainer_full")
    found = the("CKL004", root, args={**SAVED, "learning_rate": "5e-3"}, **ONLY)
    assert found.means == "the run goes on with 0.01, not with 5e-3"
    assert codes(root, args={**SAVED, "num_train_epochs": 7}, **ONLY) == []  # max_steps decides
    assert "would end at once" in str(the("CKL004", root, args={**SAVED, "max_steps": 5}, **ONLY).evidence)


def test_CKL004_another_kind_of_schedule(real: Real) -> None:
    root = real("trainer_full")
    plateau = again(root, lr_scheduler_type="reduce_lr_on_plateau")
    plateau.create_optimizer_and_scheduler(6)
    assert plateau.lr_scheduler is not None
    torch.save(plateau.lr_scheduler.state_dict(), root / "checkpoint-6" / "scheduler.pt")
    trainer = again(root)
    trainer.create_optimizer_and_scheduler(6)
    log = log_of(lambda: trainer._load_optimizer_and_scheduler(str(root / "checkpoint-6")))
    assert "lr_scheduler_type" in the("CKL004", log=log, **ONLY).fix[0]


def test_CKL004_between_checkpoints(real: Real) -> None:
    root = real("trainer_full")
    again(root, max_steps=8).train(resume_from_checkpoint=str(root / "checkpoint-6"))
    found = the("CKL004", root)
    assert found.saw == "since checkpoint-6: steps in all 6 -> 8" and found.severity == "info"
    assert found.evidence == ("learning rate at step 7: 0 by the schedule as it was, 0.0025 now",)


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows without end, and without a way to enter in the middle."""

    def __iter__(self) -> Iterator[Any]:
        row = realruns.rows()[0]
        while True:
            yield row


def test_CKL005(real: Real, said: list[str]) -> None:
    root = real("trainer_full")
    file = root / "checkpoint-6" / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "global_step": 10_500, "max_steps": 10_501}))
    trainer = again(root, max_steps=10_501, save_strategy="no", eval_strategy="no", per_device_train_batch_size=1)
    trainer.train_dataset = Stream()
    trainer.train(resume_from_checkpoint=str(root / "checkpoint-6"))
    found = the("CKL005", log="\n".join(said), **ONLY)
    assert found.evidence == ("10,500 batches are passed over",) and found.severity == "info"
    assert codes(log="  Will skip the first 2 epochs then the first 300 batches in the first epoch.") == []
    older = "  Will skip the first 0 epochs then the first 250000 batches in the first epoch."
    the("CKL005", log=older)


def test_CKL005_of_a_managed_run(tmp_path: Path) -> None:
    root = told(tmp_path / "stream", {20_000: {"type": "IterableDataset"}})
    assert "20,000 batches are behind" in the("CKL005", root, **ONLY).saw
    assert codes(told(tmp_path / "list", {20_000: {"type": "list", "length": 9}}), **ONLY) == []
    assert codes(told(tmp_path / "short", {2_000: {"type": "IterableDataset"}}), **ONLY) == []


def test_CKL006(real: Real, said: list[str]) -> None:
    root = real("trainer_full")
    (root / "checkpoint-6" / "rng_state.pth").unlink()
    assert the("CKL006", root, **ONLY).where == "checkpoint-6"
    again(root)._load_rng_state(str(root / "checkpoint-6"))
    found = the("CKL006", root, log="\n".join(said), **ONLY)
    assert "Didn't find an RNG file" in found.saw and len(found.evidence) == 1
    (root / "checkpoint-6" / "optimizer.pt").unlink()  # the model alone: meant so, or another rule's matter
    assert codes(root, **ONLY) == []


def test_CKL007(real: Real) -> None:
    root = real("trainer_full")
    for step in (2, 4, 6):
        file = root / f"checkpoint-{step}" / "training_args.bin"
        arguments = torch.load(file, weights_only=False)
        arguments.fp16 = True
        torch.save(arguments, file)
        if step < 6:
            torch.save(torch.amp.GradScaler("cpu").state_dict(), root / f"checkpoint-{step}" / "scaler.pt")
    assert the("CKL007", root).where == "checkpoint-6"


def test_CKL008() -> None:
    the("CKL008", args={"dataloader_persistent_workers": True, "dataloader_num_workers": 2}, **ONLY)
    assert codes(args={"dataloader_persistent_workers": True, "dataloader_num_workers": 0}, **ONLY) == []


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, 10**30, 1e400, float("nan"), True])
def test_hostile_values(value: object, real: Real) -> None:
    """Wrong types and sizes, in the checkpoint's JSON and in the arguments: other findings maybe, no crash."""
    root = real("trainer_full")
    file = root / "checkpoint-6" / "trainer_state.json"
    state = json.loads(file.read_text())
    for name in ("epoch", "max_steps", "log_history", "global_step"):
        file.write_text(json.dumps({**state, name: value}))
        names = ("per_device_train_batch_size", "warmup_steps", "warmup_ratio", "lr_scheduler_type", "seed")
        diagnose(root, args={**SAVED, **dict.fromkeys(names, value)}, **ONLY)


def test_CKL009(tmp_path: Path) -> None:
    root = cli.managed(tmp_path / "run")

    def lives(loss: float, batch: str) -> Path:
        (root / ".lastgood" / "trail.jsonl").unlink(missing_ok=True)
        first = trail.begin(root, run="r", start=0, checkpoint="")
        trail.saved(root, first, 200, "c200")
        trail.append(root, [trail.Entry(step, first, 2.0, 1.0, f"{step:016x}", 1e-3) for step in (201, 202, 203)])
        second = trail.begin(root, run="r", start=200, checkpoint="c200")
        later = [trail.Entry(201, second, loss, 1.0, batch, 5e-4), trail.Entry(202, second, 1.5, 1.0, f"{202:016x}")]
        trail.append(root, later)
        return root

    assert codes(lives(2.0, f"{201:016x}")) == []  # another learning rate, so other losses from then on
    found = the("CKL009", lives(2.0, "f" * 16))
    assert "step 201" in found.saw and "other data" in found.means
    assert "the weights are not those" in the("CKL009", lives(2.1, f"{201:016x}")).means
