"""SFTTrainer, DPOTrainer and what people do around a Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

import lastgood

import forked
from training import Bytes, Case, KillAt, Pad, arguments, digest, outcome, texts, tiny_gpt2


def words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {
        symbol: n for n, symbol in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


def sentences(count: int) -> list[str]:
    return [row.decode(errors="replace") for row in texts(count)]


def sft(out: Path, lora: bool, *callbacks: TrainerCallback) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    rows = [{"prompt": text[:6], "completion": text[6:] + "."} for text in sentences(40)]
    args = {
        **arguments(out).to_dict(),
        "max_length": 24,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 2,
    }
    chosen = {key: args[key] for key in SFT_ARGS if key in args}
    return SFTTrainer(
        model=tiny_gpt2(vocab_size=300),
        args=SFTConfig(
            **chosen,
            output_dir=str(out),
            report_to=[],
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows[:32]),
        eval_dataset=Dataset.from_list(rows[32:]),
        peft_config=LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True) if lora else None,
        processing_class=words(),
        callbacks=list(callbacks),
    )


SFT_ARGS = (
    "max_steps", "per_device_train_batch_size", "logging_steps", "save_steps", "learning_rate", "use_cpu", "disable_tqdm",
    "seed", "max_length", "eval_strategy", "eval_steps", "save_total_limit",
)  # fmt: skip


def dpo(out: Path, lora: bool, *callbacks: TrainerCallback) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    lines = sentences(64)
    rows = [{"prompt": a[:4], "chosen": a[4:], "rejected": b[4:]} for a, b in zip(lines[:32], lines[32:], strict=True)]
    args = arguments(out).to_dict()
    return DPOTrainer(
        model=tiny_gpt2(vocab_size=300),
        ref_model=None if lora else tiny_gpt2(vocab_size=300),
        args=DPOConfig(
            **{key: args[key] for key in SFT_ARGS if key in args}, output_dir=str(out), report_to=[], bf16=False
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True) if lora else None,
        processing_class=words(),
        callbacks=list(callbacks),
    )


def go(build: Any, lora: bool, out: Path, result: Path, kill: int | None = None) -> None:
    trainer = lastgood.manage(build(out, lora, *([] if kill is None else [KillAt(kill)])))
    trainer.train(resume_from_checkpoint="auto")
    result.write_text(json.dumps(outcome(trainer)))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("build", [sft, dpo], ids=["sft", "dpo"])
def test_I1_I8_trl_trainers_are_exact(build: Any, lora: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.run(go, build, lora, tmp_path / "a", tmp_path / "a.json", log=log) == 0, log.read_text()
    for kill in (3, 5):
        assert forked.run(go, build, lora, tmp_path / "b", tmp_path / "b.json", kill, log=log) == -9, log.read_text()
    assert forked.run(go, build, lora, tmp_path / "b", tmp_path / "b.json", log=log) == 0, log.read_text()
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads((tmp_path / "a.json").read_text())


def test_callbacks_find_the_checkpoint_when_on_save_is_called(tmp_path: Path) -> None:
    found: list[list[str]] = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            found.append(sorted(path.name for path in directory.iterdir()))

    lastgood.manage(Case("look").trainer(tmp_path, Look())).train()
    assert len(found) == 4 and all("model.safetensors" in names and "lastgood.json" in names for names in found)


def test_torch_compile_and_a_plain_module(tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(256, 8)
            self.head = torch.nn.Linear(8, 256, bias=False)
            self.head.weight = self.embed.weight  # tied: two names, one storage
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
            if self.training:
                self.seen += 1
            logits = self.head(self.embed(input_ids))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return {"loss": loss + 0 * self.seen, "logits": logits}

    def trainer(out: Path, **args: Any) -> Any:
        torch.manual_seed(0)
        return lastgood.manage(
            Trainer(model=Plain(), args=arguments(out, **args), train_dataset=Bytes(64), data_collator=Pad())
        )

    straight = trainer(tmp_path / "a")
    straight.train()
    first = trainer(tmp_path / "b", max_steps=4, lr_scheduler_type="constant")
    first.train()
    whole = trainer(tmp_path / "c", lr_scheduler_type="constant")
    whole.train()
    second = trainer(tmp_path / "b", lr_scheduler_type="constant")
    second.train(resume_from_checkpoint="auto")
    assert digest(second.model.state_dict()) == digest(whole.model.state_dict())
    assert second.model.seen == whole.model.seen == 8, "a buffer that changes is restored though it isn't persistent"


def test_a_parameter_trained_beside_the_adapter_is_not_lost(tmp_path: Path) -> None:
    """PEFT's checkpoint doesn't hold it; a stock resume starts it from scratch without a word."""

    def trainer() -> Any:
        built = Case("beside", lora=True).trainer(tmp_path)
        built.model.base_model.model.transformer.ln_f.weight.requires_grad_(True)
        return lastgood.manage(built)

    first = trainer()
    first.train()
    assert (tmp_path / "checkpoint-8" / "extra.safetensors").exists()
    second = trainer()
    second.train(resume_from_checkpoint="auto")
    assert digest(second.model.state_dict()) == digest(first.model.state_dict())


def test_hyperparameter_search_gives_each_trial_its_own_run(tmp_path: Path) -> None:
    case = Case("search", evaluate=True)
    trainer = case.trainer(tmp_path)
    trainer.model_init = lambda trial=None: tiny_gpt2()
    best = lastgood.manage(trainer).hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        n_trials=2,
        direction="minimize",
    )
    assert best is not None
    assert sorted(path.name for path in tmp_path.glob("run-*")) == ["run-0", "run-1"]
    assert all(lastgood.open(path).latest().step == 8 for path in tmp_path.glob("run-*"))


def test_import_lastgood_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, lastgood; lastgood.Keep(last=1); lastgood.open('.').checkpoints;"
        "bad = {'torch', 'numpy', 'transformers'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_complete_and_sorted() -> None:
    assert lastgood.__all__ == sorted(lastgood.__all__)
    assert all(getattr(lastgood, name) is not None for name in lastgood.__all__)
    assert len(lastgood.__all__) < 40


def test_a_stored_live_tensor_may_have_the_name_of_a_saved_one(tmp_path: Path) -> None:
    """save_pretrained renames on the way to disk: a live name can be the saved name of something else."""
    from lastgood.state import weights

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    live = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    expected = {name: weights.digest(tensor) for name, tensor in live.items()}
    swapped = {
        "a.weight": live["b.weight"],
        "b.weight": live["a.weight"],
        "x/a.bias": live["a.bias"],
        "b.bias": live["b.bias"],
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(123)
    counts = weights.restore(model, expected, lambda: swapped)
    assert counts["copied"] == 4
    assert all(torch.equal(tensor, live[name]) for name, tensor in model.named_parameters())
