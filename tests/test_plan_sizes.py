"""Forecast sizes against checkpoints that the stock Trainer, lastgood and the optimizers really wrote."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    set_seed,
)

import lastgood
from lastgood.errors import UsageError
from lastgood.planner.optim import KNOWN, optimizer
from lastgood.planner.shapes import model_of
from lastgood.planner.sizes import Training, Writer, sizes
from lastgood.policy import Keep

from training import Bytes, Pad, arguments


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 2000, "n_positions": 64, "n_embd": 256, "n_layer": 3, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2000, num_key_value_heads=2, **sizes))


def t5() -> PreTrainedModel:
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=2000, decoder_start_token_id=0, **sizes))


def trained(
    out: Path, build: Callable[[], PreTrainedModel], writer: Writer, *, lora: bool = False, **changes: Any
) -> tuple[dict[str, int], dict[str, int], Any]:
    """(files of a full checkpoint, files of a weights-only one, the configuration), after two real steps."""
    torch.set_num_threads(1)
    set_seed(0)
    model: Any = build().to(getattr(torch, changes.pop("dtype", "float32")))
    config = model.config
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    args = arguments(out, max_steps=2, save_steps=1, **changes)
    trainer = Trainer(model=model, args=args, train_dataset=Bytes(16), data_collator=Pad())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimizers on a CPU have their opinions
        if writer == "lastgood":
            trainer = lastgood.manage(trainer, keep=Keep(last=2, full=1))
        trainer.train()
        if writer == "trainer":
            args.save_only_model, trainer.state.global_step = True, 3
            trainer._save_checkpoint(trainer.model, None)
    # Keep(full=1) has stripped the first of the managed ones.
    return files(out / "checkpoint-2"), files(out / ("checkpoint-3" if writer == "trainer" else "checkpoint-1")), config


def files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def check(out: Path, build: Callable[[], PreTrainedModel], writer: Writer, training: Training, **changes: Any) -> None:
    full, weights, config = trained(out, build, writer, lora=training.train == "lora", **changes)
    forecast = sizes(model_of(config, torch=False), training, writer=writer)
    assert forecast.full == sum(forecast.parts.values()) == pytest.approx(sum(full.values()), rel=0.01), full
    assert forecast.weights == pytest.approx(sum(weights.values()), rel=0.01), weights
    # The largest parts one by one, so that one can't hide behind another.
    state = full["optimizer.pt"] if writer == "trainer" else full["optimizer.safetensors"]
    json = 0 if writer == "trainer" else full["resume.json"] - forecast.parts["rng"] - forecast.parts["scheduler"]
    assert forecast.parts["optimizer"] == pytest.approx(state + json, rel=0.01, abs=1000)
    written = full["adapter_model.safetensors" if training.train == "lora" else "model.safetensors"]
    assert forecast.parts["weights"] == pytest.approx(written, abs=16)


WRITERS: tuple[Writer, ...] = ("trainer", "lastgood")
FP32 = Training(dtype="fp32")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("build", [gpt2, llama, t5])
def test_full_fine_tunes(tmp_path: Path, build: Callable[[], PreTrainedModel], writer: Writer) -> None:
    check(tmp_path, build, writer, FP32)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("build", "dtype"), [(gpt2, "float32"), (llama, "float32"), (llama, "bfloat16")])
def test_lora(tmp_path: Path, build: Callable[[], PreTrainedModel], dtype: str, writer: Writer) -> None:
    check(tmp_path, build, writer, Training(train="lora", lora_r=8, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_8bit", "lion_8bit", "lion_32bit", "ademamix_8bit"])
def test_optimizers(tmp_path: Path, optim: str, writer: Writer) -> None:
    if "bit" in optim:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes has no package for this system")
    check(tmp_path, llama, writer, Training(dtype="fp32", optim=optim), optim=optim)


@pytest.mark.parametrize("writer", WRITERS)
def test_sgd_with_momentum_and_weights_in_bf16(tmp_path: Path, writer: Writer) -> None:
    changes = {"optim": "sgd", "optim_args": "momentum=0.9", "dtype": "bfloat16"}
    check(tmp_path, gpt2, writer, Training(optim="sgd, momentum=0.9"), **changes)


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "adagrad", "rmsprop", "muon"])
def test_states_in_bf16_as_torch_saves_them(tmp_path: Path, optim: str) -> None:
    import transformers

    model = llama().to(torch.bfloat16)
    described = model_of(model.config)
    parameters = dict(model.named_parameters())
    hidden = [parameters[t.name] for t in described.tensors if len(t.shape) == 2 and not t.role]
    others = [p for p in parameters.values() if not any(p is one for one in hidden)]
    made: list[torch.optim.Optimizer] = {
        "adamw": lambda: [torch.optim.AdamW(model.parameters())],
        "adafactor": lambda: [transformers.Adafactor(model.parameters())],
        "adagrad": lambda: [torch.optim.Adagrad(model.parameters())],
        "rmsprop": lambda: [torch.optim.RMSprop(model.parameters())],
        "muon": lambda: [torch.optim.Muon(hidden, ns_steps=1), torch.optim.AdamW(others)],
    }[optim]()
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    for one in made:
        one.step()
    torch.save([one.state_dict() for one in made], tmp_path / "optimizer.pt")
    forecast = sizes(described, Training(optim=optim), writer="trainer")
    assert forecast.parts["optimizer"] == pytest.approx((tmp_path / "optimizer.pt").stat().st_size, rel=0.01)


def test_lora_modules_and_numbers_are_peft_s() -> None:
    from peft import LoraConfig, get_peft_model

    for build in (gpt2, llama, t5):
        for targets in ("all-linear", ["q_proj", "v_proj"] if build is llama else None):
            if targets is None:
                continue
            model = get_peft_model(build(), LoraConfig(r=4, target_modules=targets))  # type: ignore[arg-type]
            real = sum(p.numel() for p in model.parameters() if p.requires_grad)
            chosen: Any = targets if isinstance(targets, str) else tuple(targets)
            assert (
                sizes(model_of(model.config), Training(train="lora", lora_r=4, lora_targets=chosen)).trainable == real
            )


def test_the_well_known_numbers() -> None:
    def total(model: str, **options: Any) -> float:
        return sizes(model_of(model), Training(**options), writer="trainer").full / 1e9

    assert total("13B", dtype="fp32") == pytest.approx(156, rel=0.005)
    assert total("13B", master="fp32") == pytest.approx(182, rel=0.005)
    assert total("13B") == pytest.approx(13.016 * 6, rel=0.001)
    assert total("70B", master="fp32") == pytest.approx(980, rel=0.02)
    assert total("llama-2-70b", master="fp32") == pytest.approx(980, rel=0.02)


@pytest.mark.parametrize("optim", sorted(KNOWN))
@pytest.mark.parametrize("writer", WRITERS)
def test_parts_add_up_for_every_optimizer(optim: str, writer: Writer) -> None:
    model = model_of("124M")
    plain = sizes(model, Training(optim=optim), writer=writer)
    copied = sizes(model, Training(optim=optim, master="fp32"), writer=writer)
    assert plain.full == sum(plain.parts.values())
    assert plain.weights == copied.weights < plain.full < copied.full
    assert copied.parts["master"] == pytest.approx(4 * model.params, rel=0.001)
    assert copied.full - sum(copied.parts[part] for part in ("optimizer", "master")) == plain.full - plain.parts.get(
        "optimizer", 0
    )
    fp32 = sizes(model, Training(optim=optim, dtype="fp32", master="fp32"), writer=writer)
    assert "master" not in fp32.parts and any("already" in note for note in fp32.notes)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("shard", "split"),
    [
        ("none", ()),
        ("zero1", ("optimizer", "master")),
        ("zero2", ("optimizer", "master")),
        ("zero3", ("optimizer", "master", "weights")),
        ("fsdp", ("optimizer", "master", "weights")),
    ],
)
def test_what_one_rank_writes(shard: Any, split: tuple[str, ...], writer: Writer) -> None:
    model = model_of("7B")
    one = sizes(model, Training(master="fp32"), writer=writer)
    many = sizes(model, Training(master="fp32", world_size=8, shard=shard), writer=writer)
    assert one.per_rank == one.full
    assert many.full == one.full + 7 * one.parts["rng"] and many.weights == one.weights
    saved = sum(one.parts[part] - -(-one.parts[part] // 8) for part in split)
    assert many.per_rank == one.full - saved
    assert 8 * many.per_rank >= many.full


def test_options_that_can_t_be_say_what_can() -> None:
    model = model_of("124M")
    wrong: tuple[tuple[Mapping[str, Any], str], ...] = (
        ({"optim": "adamw_8bits"}, "adamw_8bit"),
        ({"optim": "lomo"}, "isn't known"),
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"master": "full"}, "master"),
        ({"lora_dtype": "x", "train": "lora"}, "lora_dtype"),
        ({"train": "qlora"}, "train"),
        ({"train": "lora", "lora_r": 0}, "lora_r"),
        ({"train": "lora", "lora_targets": "q_proj"}, "lora_targets"),
        ({"train": "lora", "lora_targets": ("c_attn", "q_proj")}, r"(?s)q_proj.*c_attn, c_proj, c_fc"),
        ({"world_size": 0}, "world_size"),
        ({"shard": "zero4"}, "zero3"),
    )
    for options, words in wrong:
        with pytest.raises(UsageError, match=words):
            sizes(model, Training(**options))
    with pytest.raises(UsageError, match="writer"):
        sizes(model, Training(), writer="torch")  # type: ignore[arg-type]


def test_names_of_training_arguments_are_understood() -> None:
    from transformers.training_args import OptimizerNames

    elsewhere = ("galore", "apollo", "lomo", "grok", "schedule_free", "stable", "torch_4bit", "torch_8bit", "any")
    for name in OptimizerNames:
        if not any(word in name.value for word in elsewhere):
            assert optimizer(name.value).name
    for name in ("SGD+momentum", "sgd_momentum", "sgd with momentum", "sgd(momentum=0.9)"):
        assert optimizer(name) is KNOWN["sgd_momentum"]


def test_the_notes_say_how_it_was_reckoned() -> None:
    notes = " | ".join(sizes(model_of("13B"), Training(master="fp32")).notes)
    assert "13,015,864,320 parameters in bf16, 2 B each" in notes
    assert "exp_avg, exp_avg_sq in fp32, 8 B a parameter" in notes and "fp32: 4 B a parameter" in notes
    notes = " | ".join(sizes(model_of("8B"), Training(train="lora", optim="adamw_8bit")).notes)
    assert "LoRA of rank 16 on 224 modules: 41,943,040 of 8,030,261,248 parameters (0.52%)" in notes
