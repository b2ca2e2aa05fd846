"""Adapters merged into their base: real models and peft, and a check that finds what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from lastgood.errors import CorruptCheckpoint, Incompatible, NoCheckpoint, NotSupported, UsageError
from lastgood.weights.adapter import Adapter
from lastgood.weights.check import check
from lastgood.weights.merge import merge
from lastgood.weights.source import Weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

VOCABULARY = 64
IDS = torch.arange(24).reshape(2, 12) % VOCABULARY


def gpt2() -> Any:
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def llama(tied: bool = False) -> Any:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        attention_bias=True,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def base_of(path: Path, model: Any, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def adapter_of(path: Path, base: Path, kind: Any = AutoModelForCausalLM, grow: int = 0, **options: Any) -> Path:
    """An adapter as after training: every trainable number is random."""
    torch.manual_seed(7)
    model = kind.from_pretrained(base, dtype="auto")
    if grow:
        model.resize_token_embeddings(VOCABULARY + grow, mean_resizing=False)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    tuned.save_pretrained(path)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def with_adapter(base: Path, adapter: Path, kind: Any = AutoModelForCausalLM, grow: int = 0) -> torch.Tensor:
    model = kind.from_pretrained(base, dtype=torch.float32)
    if grow:
        model.resize_token_embeddings(VOCABULARY + grow, mean_resizing=False)
    return logits(PeftModel.from_pretrained(model, adapter))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "all_linear": (gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": ["v_proj"], "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 17, r".*\.0\.self_attn\.q_proj": 1},
        },
    ),
    "modules_to_save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "modules_to_save_of_tied": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "head_of_tied": (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_of_tied": (gpt2, {"target_modules": ["wte"]}),
    "biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "lora_bias": (llama, {"target_modules": ["q_proj"], "lora_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_computes_what_the_adapter_computes(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    build, options = CASES[case]
    base = base_of(tmp_path / "base", build())
    adapter = adapter_of(tmp_path / "adapter", base, **options)
    before = {path.name: path.read_bytes() for path in [*base.iterdir(), *adapter.iterdir()]}
    report = merge(adapter, base, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), with_adapter(base, adapter), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-4)
    assert report.merged and (report.replaced or not {"modules_to_save", "bias"} & options.keys())
    assert report.dtype == "float32" and report.copied == ("tokenizer.json",) and report.files_checked > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]
    assert before == {path.name: path.read_bytes() for path in [*base.iterdir(), *adapter.iterdir()]}


@pytest.mark.parametrize(
    ("build", "stored", "wanted"),
    [
        (gpt2, torch.bfloat16, None),
        (llama, torch.float16, None),
        (llama, torch.bfloat16, "float32"),
        (gpt2, torch.float32, "bfloat16"),
        (llama, torch.float16, "bfloat16"),
    ],
)
def test_a_merge_rounds_once_to_the_dtype_of_the_base_or_the_one_asked_for(
    tmp_path: Path, build: Any, stored: torch.dtype, wanted: str | None
) -> None:
    torch.manual_seed(0)
    base = base_of(tmp_path / "base", build(), stored)
    adapter = adapter_of(tmp_path / "adapter", base, target_modules="all-linear")
    report = merge(adapter, base, tmp_path / "merged", wanted)
    expected = wanted or str(stored).removeprefix("torch.")
    assert report.dtype == expected
    source = Weights.open([tmp_path / "merged" / "model.safetensors"])
    assert {str(source.dtype(name)) for name in source.names()} == {f"torch.{expected}"}
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    tolerance = 1e-4 if expected == "float32" else 0.2
    torch.testing.assert_close(merged, with_adapter(base, adapter), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_that_brings_new_tokens_makes_room_for_them(tmp_path: Path, tied: bool) -> None:
    base = base_of(tmp_path / "base", llama(tied))
    # Untied layers are trained in full; of tied ones peft stores the embedding because its size changed.
    saved = {} if tied else {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = adapter_of(tmp_path / "adapter", base, target_modules=["q_proj"], grow=3, **saved)
    report = merge(adapter, base, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == VOCABULARY + 3 and "model.embed_tokens.weight" in report.replaced
    torch.testing.assert_close(logits(merged), with_adapter(base, adapter, grow=3), rtol=1e-4, atol=1e-5)


def test_a_classifier_on_a_language_model_keeps_its_head(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", llama())
    kind = AutoModelForSequenceClassification
    adapter = adapter_of(tmp_path / "adapter", base, kind, target_modules=["q_proj"], task_type="SEQ_CLS")
    report = merge(adapter, base, tmp_path / "merged")
    merged = kind.from_pretrained(tmp_path / "merged")
    assert report.replaced == ("score.weight",)
    torch.testing.assert_close(logits(merged), with_adapter(base, adapter, kind), rtol=1e-4, atol=1e-5)


def test_convolutions_and_weights_that_loading_renames(tmp_path: Path) -> None:
    speech = Wav2Vec2Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    # The experts are one tensor in memory and one for each expert in the file.
    experts = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        num_local_experts=4,
    )
    for name, model, target, task in (
        ("speech", Wav2Vec2Model(speech), "conv_layers.1.conv", "FEATURE_EXTRACTION"),
        ("experts", MixtralForCausalLM(experts), "q_proj", "CAUSAL_LM"),
    ):
        base = base_of(tmp_path / name / "base", model)
        adapter = adapter_of(tmp_path / name / "adapter", base, type(model), target_modules=[target], task_type=task)
        report = merge(adapter, base, tmp_path / name / "merged")
        assert len(report.merged) == 1 and report.files_checked > 10


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    base = base_of(tmp_path / "base", gpt2(), torch.bfloat16)
    options = {"target_modules": ["c_attn", "lm_head"], "modules_to_save": ["ln_f"]}
    return base, adapter_of(tmp_path / "adapter", base, **options)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("transformer.h.1.attn.c_attn.weight", "times the rounding error"),
        ("transformer.h.0.mlp.c_fc.weight", "although the adapter doesn't say so"),
        ("transformer.ln_f.weight", "although the adapter doesn't say so"),
        ("lm_head.weight", "times the rounding error"),
    ],
)
@pytest.mark.parametrize("damage", ["bit", "nan", "zero"])
def test_the_check_finds_one_wrong_number(
    pair: tuple[Path, Path], tmp_path: Path, name: str, what: str, damage: str
) -> None:
    base, adapter = pair
    merge(adapter, base, tmp_path / "merged")
    reference = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    opened = Adapter.open(adapter)
    check(reference, merged, opened)
    flat = merged.state_dict()[name].view(-1)
    at = int(flat.abs().argmax())
    # The lowest bit but one: two units in the last place are more than rounding to nearest can explain.
    if damage == "bit":
        flat.view(torch.int16)[at] ^= 2
    else:
        flat[at] = torch.nan if damage == "nan" else 0.0
    with pytest.raises(Incompatible, match=f"1 tensors .*{name}: .*{what}"):
        check(reference, merged, opened)


def test_the_check_finds_a_wrong_scaling_a_wrong_dtype_and_a_missing_tensor(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = pair
    merge(adapter, base, tmp_path / "merged")
    reference = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    with pytest.raises(Incompatible, match="3 tensors"):
        check(reference, merged, Adapter.open(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(Incompatible, match="float32"):
        check(reference, merged.float(), Adapter.open(adapter))
    del merged.transformer.h[1]
    with pytest.raises(Incompatible, match="only in one of them"):
        check(reference, merged.bfloat16(), Adapter.open(adapter))


def test_what_loading_rounds_is_found_in_the_files(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", llama(), torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = adapter_of(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(Incompatible, match=r"model\.norm\.weight \(F32 -> BF16\)"):
        merge(adapter, base, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    merge(adapter, base, tmp_path / "merged", "float32")


def edited(adapter: Path, **changes: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return adapter


@pytest.mark.parametrize(
    ("changes", "kind", "what"),
    [
        ({"peft_type": "IA3"}, NotSupported, "IA3"),
        ({"use_dora": True}, NotSupported, "DoRA"),
        ({"init_lora_weights": "pissa"}, NotSupported, "pissa"),
        ({"layer_replication": [[0, 1]]}, NotSupported, "layer_replication"),
        ({"a_setting_of_tomorrow": 1}, NotSupported, "a_setting_of_tomorrow"),
        ({"r": 8}, CorruptCheckpoint, "rank 4"),
    ],
)
def test_other_adapters_are_refused_by_name(
    pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], kind: Any, what: str
) -> None:
    with pytest.raises(kind, match=what):
        merge(edited(pair[1], **changes), pair[0], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_base_is_found_locally_or_asked_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    assert merge(adapter, None, tmp_path / "merged").base == base
    with pytest.raises(UsageError, match="exists already"):
        merge(adapter, base, tmp_path / "merged")
    for path in (tmp_path / "nowhere", adapter):
        with pytest.raises(NoCheckpoint, match="--base"):
            merge(adapter, path, tmp_path / "out")
    for name in ("somebody/not-on-this-machine", str(tmp_path / "gone"), None):
        with pytest.raises(NoCheckpoint, match="--base"):
            merge(edited(adapter, base_model_name_or_path=name), None, tmp_path / "out")
    with pytest.raises(NoCheckpoint):
        merge(tmp_path / "nowhere", base, tmp_path / "out")


def test_another_base_and_a_quantised_one_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    other = base_of(tmp_path / "other", llama())
    with pytest.raises(Incompatible, match=r"transformer\.h\.0"):
        merge(adapter, other, tmp_path / "merged")
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((base / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(NotSupported, match="quantised"):
        merge(adapter, quantised, tmp_path / "merged")


def test_the_tokenizer_is_the_adapters_if_it_has_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (base / "merges.txt").write_text("of the base")
    (base / "preprocessor_config.json").write_text("{}")
    (tmp_path / "cached.json").write_text('{"of": "the adapter"}')
    (adapter / "tokenizer.json").symlink_to(tmp_path / "cached.json")
    report = merge(adapter, base, tmp_path / "merged")
    assert report.copied == ("tokenizer.json", "preprocessor_config.json")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == '{"of": "the adapter"}'
    assert not (tmp_path / "merged" / "tokenizer.json").is_symlink()
