"""Shapes by arithmetic are those that transformers builds; whatever names a model leads to them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lastgood.errors import CorruptCheckpoint, UsageError
from lastgood.planner import arithmetic, known, meta
from lastgood.planner.families import FAMILIES
from lastgood.planner.shapes import model_of

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral", "olmo2")


def small(family: str, **changes: Any) -> dict[str, Any]:
    own: dict[str, dict[str, Any]] = {
        "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24},
        "t5": {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3},
        "distilbert": {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        "opt": {**SMALL, "ffn_dim": 40, "max_position_embeddings": 24},
    }
    return {"model_type": family, "pad_token_id": 0, **own.get(family, SMALL), **changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_what_transformers_builds(family: str) -> None:
    odd: list[dict[str, Any]] = [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}]
    odd.append({"attention_bias": True, "mlp_bias": True})
    if family in GROUPED:
        odd += [{"num_key_value_heads": 2, "head_dim": 12}, {"num_key_value_heads": 1}]
    odd += {
        "opt": [{"word_embed_proj_dim": 8}, {"do_layer_norm_before": False}, {"enable_bias": False}],
        "gpt2": [{"n_inner": 20}],
        "gpt_neox": [{"attention_bias": False}],
        "t5": [{"feed_forward_proj": "gated-gelu", "num_decoder_layers": 1, "relative_attention_num_buckets": 8}],
        "bert": [{"type_vocab_size": 3, "max_position_embeddings": 20}],
        "mixtral": [{"num_local_experts": 3}],
    }.get(family, [])
    for changes in odd:
        config = small(family, **changes)
        built = meta.tensors(config)
        assert arithmetic.tensors(config) == built, changes
        assert arithmetic.tensors(AutoConfig.for_model(**config).to_dict()) == built, changes


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_the_default(family: str) -> None:
    bare = {"model_type": family, **({"num_hidden_layers": 1} if family in GROUPED else {})}
    assert arithmetic.tensors(bare) == meta.tensors(bare)


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(GROUPED),
    group=st.integers(1, 3),
    kv=st.integers(1, 3),
    head=st.sampled_from([2, 4, 6]),
    inner=st.integers(1, 50),
    layers=st.integers(1, 3),
    vocabulary=st.integers(3, 60),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_grouping_bias_and_tying(
    family: str, group: int, kv: int, head: int, inner: int, layers: int, vocabulary: int, flags: tuple[bool, ...]
) -> None:
    tied, attention, mlp = flags
    config = {
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": 4 * kv * group,
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "head_dim": head,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
        "attention_bias": attention,
        "mlp_bias": mlp,
    }
    assert arithmetic.tensors(config) == meta.tensors(config)


PUBLISHED = {
    **{"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192},
    **{"llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400},
    **{"llama-3.2-3b": 3_212_749_824, "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512},
    **{"qwen3-8b": 8_190_735_360, "mistral-7b": 7_241_732_096, "gemma-2-2b": 2_614_341_888},
    **{"gemma-2-9b": 9_241_705_984, "mixtral-8x7b": 46_702_792_704, "gpt2": 124_439_808, "gpt2-xl": 1_557_611_200},
    **{"phi-3-mini": 3_821_079_552, "gemma-3-1b": 999_885_952},
}
"""As the models' own pages and safetensors files count them."""


def test_well_known_models_have_their_published_number_of_parameters() -> None:
    assert {name: model_of(name, torch=False).params for name in PUBLISHED} == PUBLISHED
    for name in known.MODELS:
        assert model_of(name, torch=False).params > 1e7


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("Llama-2-13b-hf", "Llama-2-13B"),
        ("llama2-13b", "Llama-2-13B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("mistralai/Mistral-7B-v0.3", "Mistral-7B-v0.3"),
        ("mistralai/Mistral-7B-v0.1", "Mistral-7B"),
        ("google/gemma-2-9b-it", "Gemma-2-9B"),
        ("google-t5/t5-base", "T5-base"),
        ("google-bert/bert-base-uncased", "BERT-base"),
        ("microsoft/Phi-3-mini-4k-instruct", "Phi-3-mini"),
        ("GPT2-XL", "GPT2-xl"),
    ],
)
def test_names_as_the_hub_spells_them(name: str, title: str) -> None:
    assert model_of(name).name == title


def test_sizes_are_exact_models_or_scaled_ones_and_say_so() -> None:
    assert model_of("13B").params == 13_015_864_320
    assert "Llama-2-13B" in model_of("13b").name
    for size in known.SIZES:
        if "X" not in size:
            count = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
            assert model_of(size).params == pytest.approx(count, rel=0.06), size
    assert "27B" in model_of("27B").name and "Gemma" in model_of("27B").name
    assert "scaled" in model_of("11B").name


@settings(max_examples=60, deadline=None)
@given(st.floats(1e4, 1e14) | st.floats(4, 14).map(lambda exponent: 10**exponent))
def test_a_scaled_size_is_within_3_percent(count: float) -> None:
    shapes = arithmetic.tensors(known.scaled(count))
    assert shapes is not None
    assert sum(tensor.count for tensor in shapes) == pytest.approx(count, rel=0.03)


def test_unknown_words_name_what_is_near() -> None:
    with pytest.raises(UsageError, match=r"Llama-3\.1-8B"):
        model_of("llama-3.1-9b")
    for wrong in ("", "  ", "7Q", "0B", "1e9", "999999T", "no/such/config.json", "-7B"):
        with pytest.raises(UsageError):
            model_of(wrong)
    for value in (None, 7, 3.5, [], b"7B"):
        with pytest.raises(UsageError):
            model_of(value)
    with pytest.raises(UsageError, match="isn't there"):
        model_of(Path("no/such/model"))


def test_impossible_configurations_are_refused() -> None:
    for changes in ({"hidden_size": -1}, {"hidden_size": "big"}, {"num_hidden_layers": 10**9}, {"vocab_size": None}):
        with pytest.raises(UsageError):
            model_of(small("llama", **changes), torch=False)
    for config in ({}, {"model_type": "no-such-model"}, {"model_type": 3}, {"model_type": "clip", "text_config": 5}):
        with pytest.raises(UsageError):
            model_of(config)
        with pytest.raises(UsageError, match="without torch"):
            model_of(config, torch=False)


def test_a_family_or_head_without_a_table_is_built_on_the_meta_device() -> None:
    other = {**small("llama"), "architectures": ["LlamaForSequenceClassification"]}
    model = model_of(other)
    assert "meta" in model.source and model.tensors[-1].name == "score.weight"
    crossed = small("gpt2", add_cross_attention=True)
    assert any("crossattention" in tensor.name for tensor in model_of(crossed).tensors)
    phi = {"model_type": "phi", **SMALL, "pad_token_id": 0}
    assert model_of(phi).tensors == meta.tensors(phi)
    assert all("meta" not in model_of(small(family)).source for family in FAMILIES)


def test_arithmetic_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small("qwen3")))
    code = (
        "import sys; from lastgood.planner.shapes import model_of; from lastgood.planner.sizes import sizes, Training;"
        "print(sizes(model_of('70B'), Training(train='lora')).full, model_of(sys.argv[1]).params);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60).returncode == 0


# ---- directories and files ---------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = LlamaConfig(**SMALL, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_safetensors_headers_say_the_same_as_the_configuration(saved: Path) -> None:
    model = model_of(saved)
    assert model.source == "safetensors headers"
    assert model.tensors == meta.tensors(json.loads((saved / "config.json").read_text()))
    assert model.beside == sum((saved / name).stat().st_size for name in ("config.json", "generation_config.json"))
    assert model_of(saved / "model.safetensors").tensors == model.tensors
    assert model_of(saved / "config.json").tensors == model.tensors
    assert model_of(LlamaConfig(**SMALL, num_key_value_heads=2)).params == model.params
    (saved / "config.json").unlink()
    alone = model_of(saved)
    assert {t.name: (t.shape, t.linear, t.role) for t in alone.tensors} == {
        t.name: (t.shape, t.linear, t.role) for t in model.tensors
    }


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert", "mixtral", "opt", "gemma2"])
def test_saved_files_of_other_families_count_the_same(family: str, tmp_path: Path) -> None:
    config = small(family)
    made = AutoConfig.for_model(**config)
    kind = FAMILIES[family].architecture
    import transformers

    getattr(transformers, kind)(made).save_pretrained(tmp_path)
    model = model_of(tmp_path)
    assert (model.source, model.params) == ("safetensors headers", model_of(config).params)


def test_shards_are_read_together_and_a_missing_one_leaves_the_configuration(saved: Path, tmp_path: Path) -> None:
    whole = model_of(saved)
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert model_of(tmp_path / "shards").tensors == whole.tensors
    assert model_of(tmp_path / "shards" / "model.safetensors.index.json").params == whole.params
    next(iter(sorted((tmp_path / "shards").glob("model-0*")))).unlink()
    assert model_of(tmp_path / "shards").source == "config.json, by arithmetic"
    assert model_of(tmp_path / "shards").tensors == whole.tensors


def test_an_adapter_is_refused_with_its_base(saved: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    for path in ("", "adapter_config.json", "adapter_model.safetensors"):
        with pytest.raises(UsageError, match="adapter") as raised:
            model_of(tmp_path / "adapter" / path)
        assert str(saved) in raised.value.hint


def test_quantised_weights_and_tied_copies_don_t_mislead(saved: Path, tmp_path: Path) -> None:
    config = small("llama", tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    live = {t.name: torch.zeros(t.shape) for t in meta.tensors(config)}
    live["lm_head.weight"] = torch.zeros(96, 32)
    live["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(live, tmp_path / "model.safetensors")
    assert model_of(tmp_path).tensors == meta.tensors(config)
    live["model.layers.0.self_attn.q_proj.weight.absmax"] = torch.zeros(4)
    save_file(live, tmp_path / "model.safetensors")
    assert model_of(tmp_path).source == "config.json, by arithmetic"
    with pytest.raises(UsageError, match="quantised"):
        model_of(tmp_path / "model.safetensors")


def test_damaged_files_are_named(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        model_of(saved)
    for text in ("", "[]", "{", '{"model_type": NaN}', '{"a": 1, "a": 2}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match=r"config\.json"):
            model_of(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match="neither"):
        model_of(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        small("llama") | {"num_hidden_layers": 99_999},
        small("llama") | {"vocab_size": 10**35},
        {"model_type": "vit", "num_hidden_layers": 10**7},
        {"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 10**7}},
    ],
)
def test_sizes_that_would_take_all_memory_are_refused_at_once(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not a possible size"):
        model_of(config)


@pytest.mark.parametrize("named", [5, "LlamaForCausalLM", {"a": 1}, [None]])
def test_architectures_that_are_no_list_of_names(named: object) -> None:
    """They are read as none: what the model type is built as."""
    plain, odd = small("llama"), small("llama") | {"architectures": named}
    assert model_of(odd).params == model_of(plain).params
