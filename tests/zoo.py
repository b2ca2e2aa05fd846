"""Tiny models of many architectures, from their configs: the real classes, a few thousand parameters each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import set_seed

TOKENS = 64
LENGTH = 10

TEXT = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {**TEXT, "num_labels": 3, "type_vocab_size": 2}
PIXELS = {
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
HEADS = {"head_dim": 8}


@dataclass(frozen=True)
class Model:
    """kind: what a batch looks like. lora: target modules for the adapter test, None to leave it out."""

    name: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "causal"
    lora: str | list[str] | None = None

    def build(self, seed: int = 0) -> Any:
        set_seed(seed)
        cls = getattr(transformers, self.model)
        return cls(cls.config_class(**self.config))

    def rows(self, count: int) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        return [self._row(generator) for _ in range(count)]

    def _row(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, TOKENS, (LENGTH,), generator=generator)
        label = torch.randint(0, 3, (), generator=generator)
        if self.kind == "causal":
            return {"input_ids": ids, "labels": ids}
        if self.kind == "classify":
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label}
        if self.kind == "masked":
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        if self.kind == "seq2seq":
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(0)}
        if self.kind == "image":
            return {"pixel_values": torch.randn(3, *self._image(), generator=generator), "labels": label}
        if self.kind == "reconstruct":
            return {"pixel_values": torch.randn(3, *self._image(), generator=generator)}
        if self.kind == "speech":
            return {"input_values": torch.randn(400, generator=generator), "labels": label}
        if self.kind == "ctc":
            return {"input_values": torch.randn(1600, generator=generator), "labels": ids[:2]}
        if self.kind == "spectrogram":
            return {"input_features": torch.randn(8, 20, generator=generator), "labels": ids}
        if self.kind == "clip":
            return {"input_ids": ids, "pixel_values": torch.randn(3, *self._image(), generator=generator)}
        raise ValueError(self.kind)

    def _image(self) -> tuple[int, int]:
        size = self.config.get("image_size", 32)
        return (size, size) if isinstance(size, int) else tuple(size)


def text(name: str, model: str, lora: str | list[str] | None = None, kind: str = "causal", **changes: Any) -> Model:
    return Model(name, model, {**TEXT, **changes}, kind, lora)


W2V = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": TOKENS,
    "pad_token_id": 0,
    "mask_time_prob": 0.2,
    "mask_time_length": 2,
    "num_labels": 3,
    "classifier_proj_size": 8,
}
SEQ = {
    "vocab_size": TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}

ZOO = [
    # dense language models
    Model("gpt2", "GPT2LMHeadModel", {"vocab_size": TOKENS, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}, lora=["c_attn"]),
    Model("gpt2 untied", "GPT2LMHeadModel", {"vocab_size": TOKENS, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}),
    text("llama", "LlamaForCausalLM", lora="all-linear"),
    text("llama tied", "LlamaForCausalLM", tie_word_embeddings=True),
    text("mistral", "MistralForCausalLM", lora=["q_proj", "v_proj"]),
    text("qwen2", "Qwen2ForCausalLM", lora="all-linear"),
    text("qwen3", "Qwen3ForCausalLM", **HEADS),
    text("gemma", "GemmaForCausalLM", **HEADS),
    text("gemma2", "Gemma2ForCausalLM", lora="all-linear", **HEADS),
    text("gemma3", "Gemma3ForCausalLM", **HEADS),
    text("phi", "PhiForCausalLM", num_key_value_heads=2),
    text("phi3", "Phi3ForCausalLM", lora="all-linear"),
    text("olmo2", "Olmo2ForCausalLM"),
    text("granite", "GraniteForCausalLM"),
    text("starcoder2", "Starcoder2ForCausalLM"),
    text("stablelm", "StableLmForCausalLM"),
    text("cohere", "CohereForCausalLM"),
    text("smollm3", "SmolLM3ForCausalLM"),
    Model("opt", "OPTForCausalLM", {"vocab_size": TOKENS, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, lora=["q_proj", "v_proj"]),
    text("gpt-neox", "GPTNeoXForCausalLM", lora=["query_key_value"]),
    Model("gpt-neo", "GPTNeoForCausalLM", {"vocab_size": TOKENS, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]], "window_size": 4, "bos_token_id": 1, "eos_token_id": 2}),
    Model("gpt-j", "GPTJForCausalLM", {"vocab_size": TOKENS, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
    Model("bloom", "BloomForCausalLM", {"vocab_size": TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, lora=["query_key_value"]),
    Model("falcon", "FalconForCausalLM", {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}),
    # mixtures of experts
    text("mixtral", "MixtralForCausalLM", lora=["q_proj", "v_proj"], num_local_experts=4, num_experts_per_tok=2),
    text("minimax", "MiniMaxForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    text("phimoe", "PhimoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    text("qwen2-moe", "Qwen2MoeForCausalLM", shared_expert_intermediate_size=12, **EXPERTS),
    text("qwen3-moe", "Qwen3MoeForCausalLM", lora=["q_proj", "v_proj"], head_dim=8, **EXPERTS),
    text("olmoe", "OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2),
    text("gpt-oss", "GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    text("granite-moe", "GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    text("deepseek-v3", "DeepseekV3ForCausalLM", moe_intermediate_size=12, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=2),
    text("jamba", "JambaForCausalLM", num_experts=4, num_experts_per_tok=2, mamba_d_state=4, mamba_d_conv=2, mamba_expand=2, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False),
    # state space
    Model("mamba", "MambaForCausalLM", {"vocab_size": TOKENS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 2, "time_step_rank": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, lora=["in_proj", "x_proj"]),
    Model("mamba2", "Mamba2ForCausalLM", {"vocab_size": TOKENS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 2, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    # encoders
    Model("bert", "BertForSequenceClassification", BERT, "classify", ["query", "value"]),
    Model("bert masked", "BertForMaskedLM", BERT, "masked"),
    Model("roberta", "RobertaForSequenceClassification", {**BERT, "max_position_embeddings": 40}, "classify"),
    Model("electra", "ElectraForSequenceClassification", {**BERT, "embedding_size": 8}, "classify"),
    Model("albert", "AlbertForSequenceClassification", {**BERT, "embedding_size": 8}, "classify"),
    Model("distilbert", "DistilBertForSequenceClassification", {"vocab_size": TOKENS, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32, "num_labels": 3}, "classify"),
    Model("deberta-v2", "DebertaV2ForSequenceClassification", BERT, "classify"),
    Model("modernbert", "ModernBertForSequenceClassification", {**BERT, "cls_token_id": 1, "sep_token_id": 2}, "classify"),
    # encoder-decoder
    Model("t5", "T5ForConditionalGeneration", {"vocab_size": TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}, "seq2seq", ["q", "v"]),
    Model("bart", "BartForConditionalGeneration", SEQ, "seq2seq"),
    Model("marian", "MarianMTModel", SEQ, "seq2seq"),
    Model("pegasus", "PegasusForConditionalGeneration", SEQ, "seq2seq"),
    # vision
    Model("vit", "ViTForImageClassification", PIXELS, "image", "all-linear"),
    Model("deit", "DeiTForImageClassification", PIXELS, "image"),
    Model("beit", "BeitForImageClassification", PIXELS, "image"),
    Model("dinov2", "Dinov2ForImageClassification", PIXELS, "image"),
    Model("vit-mae", "ViTMAEForPreTraining", {**PIXELS, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24}, "reconstruct"),
    Model("swin", "SwinForImageClassification", {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "num_labels": 3}, "image"),
    Model("convnext", "ConvNextForImageClassification", {"image_size": 32, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_labels": 3}, "image"),
    Model("resnet", "ResNetForImageClassification", {"image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 3, "layer_type": "basic"}, "image"),
    Model("segformer", "SegformerForImageClassification", {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8, "num_labels": 3}, "image"),
    # speech
    Model("wav2vec2", "Wav2Vec2ForSequenceClassification", W2V, "speech"),
    Model("wav2vec2 ctc", "Wav2Vec2ForCTC", W2V, "ctc"),
    Model("hubert", "HubertForSequenceClassification", W2V, "speech"),
    Model("whisper", "WhisperForConditionalGeneration", {"vocab_size": TOKENS, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 10, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "begin_suppress_tokens": None}, "spectrogram"),
    # image and text
    Model("clip", "CLIPModel", {"text_config": {**TEXT, "num_key_value_heads": 2}, "vision_config": PIXELS, "projection_dim": 8, "image_size": 16}, "clip"),
]  # fmt: skip
