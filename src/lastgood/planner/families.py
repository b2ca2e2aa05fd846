"""What the parameters of each family of models are called and how they are shaped, as tables.

A family is a table, one module a line, in the order of `named_parameters()`:

    E name rows width         nn.Embedding
    L name out in [bias]      nn.Linear; bias: `+`, or `+key` if that key of the configuration decides
    C name in out             transformers' Conv1D, with a bias
    N name width              a norm with a weight; B: with a weight and a bias
    P name extents            a parameter of its own
    H name out in [bias]      the output head: its weight is left out where it is tied to the embeddings
    @ prefix count            what follows is there `count` times, up to the next @

An extent is a sum of products of letters and numbers (`H*A+2*K*A`). `?key` at the end of a line: only if that
key is true. plan/arithmetic.py reads the tables. The shapes are those that transformers 5.23 builds; the tests
compare each family with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

LETTERS = {
    "V": "vocab_size",
    "D": "hidden_size",
    "N": "num_hidden_layers",
    "H": "num_attention_heads",
    "K": "num_key_value_heads",
    "A": "head_dim",
    "F": "intermediate_size",
}
"""Letters of the tables and the keys they stand for, in most families."""


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """architecture: the class with the usual head. defaults: of keys that a config.json may leave out.

    plain: values that the table takes for granted; with another one the arithmetic abstains.
    tied: whether the head is tied where the configuration doesn't say; always: whatever it says.
    """

    architecture: str
    table: str
    letters: Mapping[str, str] = msgspec.field(default_factory=LETTERS.copy)
    defaults: Mapping[str, Any] = {}
    plain: Mapping[str, Any] = {}
    tied: bool = False
    always: bool = False


def _decoder(attention: str, mlp: str, norms: str) -> str:
    """The layout that most language models share."""
    rows = ["E model.embed_tokens V D", "@ model.layers N", attention, mlp]
    rows += [f"N {name} D" for name in norms.split()]
    return "\n".join([*rows, "@", "N model.norm D", "H lm_head V D"])


def _attention(bias: str = "", out: str = "", norms: str = "") -> str:
    rows = [f"L self_attn.{name}_proj {heads}*A D {bias}" for name, heads in (("q", "H"), ("k", "K"), ("v", "K"))]
    return "\n".join([*rows, f"L self_attn.o_proj D H*A {out}", norms])


def _mlp(bias: str = "") -> str:
    return f"L mlp.gate_proj F D {bias}\nL mlp.up_proj F D {bias}\nL mlp.down_proj D F {bias}"


HEAD_NORMS = "N self_attn.q_norm A\nN self_attn.k_norm A"
FLAG = "+attention_bias"
TWO = "input_layernorm post_attention_layernorm"
FOUR = f"{TWO} pre_feedforward_layernorm post_feedforward_layernorm"
PHI3 = "L self_attn.o_proj D H*A\nL self_attn.qkv_proj H*A+2*K*A D"
EXPERTS = "P mlp.gate.weight X D\nP mlp.experts.gate_up_proj X 2*F D\nP mlp.experts.down_proj X D F"
GPT2 = """E transformer.wte V D
E transformer.wpe P D
@ transformer.h N
B ln_1 D
C attn.c_attn D 3*D
C attn.c_proj D D
B ln_2 D
C mlp.c_fc D F
C mlp.c_proj F D
@
B transformer.ln_f D
H lm_head V D"""
NEOX = """E gpt_neox.embed_in V D
@ gpt_neox.layers N
B input_layernorm D
B post_attention_layernorm D
L attention.query_key_value 3*D D +attention_bias
L attention.dense D D +attention_bias
L mlp.dense_h_to_4h F D +
L mlp.dense_4h_to_h D F +
@
B gpt_neox.final_layer_norm D
H lm_head V D"""
OPT = """E model.decoder.embed_tokens V W
E model.decoder.embed_positions P+2 D
L model.decoder.project_out W D ?projected
L model.decoder.project_in D W ?projected
B model.decoder.final_layer_norm D ?do_layer_norm_before
@ model.decoder.layers N
L self_attn.k_proj D D +enable_bias
L self_attn.v_proj D D +enable_bias
L self_attn.q_proj D D +enable_bias
L self_attn.out_proj D D +enable_bias
B self_attn_layer_norm D
L fc1 F D +enable_bias
L fc2 D F +enable_bias
B final_layer_norm D
@
H lm_head V W"""
T5 = """E shared V D
@ encoder.block N
SELF 0
FEED 1
@
N encoder.final_layer_norm D
@ decoder.block M
SELF 0
CROSS 1
FEED 2
@
N decoder.final_layer_norm D"""
T5_PARTS = {
    "SELF": "\n".join(f"L layer.#.SelfAttention.{n} H*A D" for n in "qkv")
    + "\nL layer.#.SelfAttention.o D H*A"
    + "\nE layer.#.SelfAttention.relative_attention_bias B H ?first\nN layer.#.layer_norm D",
    "CROSS": "\n".join(f"L layer.#.EncDecAttention.{n} H*A D" for n in "qkv")
    + "\nL layer.#.EncDecAttention.o D H*A\nN layer.#.layer_norm D",
    "FEED": "L layer.#.DenseReluDense.wi F D ?plain_mlp\nL layer.#.DenseReluDense.wi_0 F D ?gated"
    "\nL layer.#.DenseReluDense.wi_1 F D ?gated\nL layer.#.DenseReluDense.wo D F\nN layer.#.layer_norm D",
}


def _t5() -> str:
    rows = [line.split() for line in T5.splitlines()]
    return "\n".join(T5_PARTS[row[0]].replace("#", row[1]) if row[0] in T5_PARTS else " ".join(row) for row in rows)


def _bert(base: str, embeddings: str, head: str) -> str:
    return f"""{embeddings}
@ {base}.encoder.layer N
L attention.self.query D D +
L attention.self.key D D +
L attention.self.value D D +
L attention.output.dense D D +
B attention.output.LayerNorm D
L intermediate.dense F D +
L output.dense D F +
B output.LayerNorm D
@
{head}"""


BERT = _bert(
    "bert",
    "E bert.embeddings.word_embeddings V D\nE bert.embeddings.position_embeddings P D\n"
    "E bert.embeddings.token_type_embeddings T D\nB bert.embeddings.LayerNorm D",
    "P cls.predictions.bias V\nL cls.predictions.transform.dense D D +\nB cls.predictions.transform.LayerNorm D\n"
    "H cls.predictions.decoder V D +untied",
)
ROBERTA = _bert(
    "roberta",
    "E roberta.embeddings.word_embeddings V D\nE roberta.embeddings.token_type_embeddings T D\n"
    "B roberta.embeddings.LayerNorm D\nE roberta.embeddings.position_embeddings P D",
    "P lm_head.bias V\nL lm_head.dense D D +\nB lm_head.layer_norm D\nH lm_head.decoder V D +untied",
)
DISTILBERT = """E distilbert.embeddings.word_embeddings V D
E distilbert.embeddings.position_embeddings P D
B distilbert.embeddings.LayerNorm D
@ distilbert.transformer.layer N
L attention.q_lin D D +
L attention.k_lin D D +
L attention.v_lin D D +
L attention.out_lin D D +
B sa_layer_norm D
L ffn.lin1 F D +
L ffn.lin2 D F +
B output_layer_norm D
@
L vocab_transform D D +
B vocab_layer_norm D
H vocab_projector V D +"""

_POSITIONS = {**LETTERS, "P": "max_position_embeddings", "T": "type_vocab_size"}
_BERT_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}


def _sizes(vocabulary: int, width: int, layers: int, heads: int, kv: int | None, inner: int, **more: Any) -> Any:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {**dict(zip(keys, (vocabulary, width, layers, heads, kv), strict=True)), "intermediate_size": inner, **more}


FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        table=_decoder(_attention(FLAG, FLAG), _mlp("+mlp_bias"), TWO),
        defaults=_sizes(32000, 4096, 32, 32, None, 11008),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        table=_decoder(_attention(), _mlp(), TWO),
        defaults=_sizes(32000, 4096, 32, 32, 8, 14336),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        table=_decoder(_attention("+"), _mlp(), TWO),
        defaults=_sizes(151936, 4096, 32, 32, 32, 22016),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        table=_decoder(_attention(FLAG, FLAG, HEAD_NORMS), _mlp(), TWO),
        defaults=_sizes(151936, 4096, 32, 32, 32, 22016, head_dim=128),
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        table=_decoder(_attention(FLAG, FLAG), _mlp(), TWO),
        defaults=_sizes(256000, 3072, 28, 16, 16, 24576, head_dim=256),
        tied=True,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        table=_decoder(_attention(FLAG, FLAG), _mlp(), FOUR),
        defaults=_sizes(256000, 2304, 26, 8, 4, 9216, head_dim=256),
        tied=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        table=_decoder(_attention(FLAG, FLAG, HEAD_NORMS), _mlp(), FOUR),
        defaults=_sizes(262208, 2304, 26, 8, 4, 9216, head_dim=256),
        tied=True,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        table=_decoder(PHI3, "L mlp.gate_up_proj 2*F D\nL mlp.down_proj D F", TWO),
        defaults=_sizes(32064, 3072, 32, 32, None, 8192),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        table=_decoder(
            _attention(FLAG, FLAG, "N self_attn.q_norm H*A\nN self_attn.k_norm K*A"),
            _mlp(),
            "post_attention_layernorm post_feedforward_layernorm",
        ),
        defaults=_sizes(50304, 4096, 32, 32, None, 11008),
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        table=_decoder(_attention(), EXPERTS, TWO),
        letters={**LETTERS, "X": "num_local_experts"},
        defaults=_sizes(32000, 4096, 32, 32, 8, 14336, num_local_experts=8),
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        table=GPT2,
        letters={"V": "vocab_size", "D": "n_embd", "N": "n_layer", "P": "n_positions", "F": "n_inner"},
        defaults={"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_positions": 1024, "n_inner": None},
        plain={"add_cross_attention": False},
        tied=True,
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        table=NEOX,
        defaults=_sizes(50432, 6144, 44, 64, None, 24576, attention_bias=True),
    ),
    "opt": Family(
        architecture="OPTForCausalLM",
        table=OPT,
        letters={**LETTERS, "F": "ffn_dim", "P": "max_position_embeddings", "W": "word_embed_proj_dim"},
        defaults={
            "vocab_size": 50272,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "ffn_dim": 3072,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": None,
            "enable_bias": True,
            "do_layer_norm_before": True,
        },
        plain={"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
        tied=True,
    ),
    "t5": Family(
        architecture="T5ForConditionalGeneration",
        table=_t5(),
        letters={
            **{"V": "vocab_size", "D": "d_model", "A": "d_kv", "F": "d_ff", "H": "num_heads", "N": "num_layers"},
            **{"M": "num_decoder_layers", "B": "relative_attention_num_buckets"},
        },
        defaults={
            **{"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6},
            **{"num_decoder_layers": None, "relative_attention_num_buckets": 32, "feed_forward_proj": "relu"},
        },
        tied=True,
        always=True,
    ),
    "bert": Family(
        architecture="BertForMaskedLM",
        table=BERT,
        letters=_POSITIONS,
        defaults={**_BERT_DEFAULTS, "vocab_size": 30522},
        plain={"add_cross_attention": False},
        tied=True,
    ),
    "roberta": Family(
        architecture="RobertaForMaskedLM",
        table=ROBERTA,
        letters=_POSITIONS,
        defaults={**_BERT_DEFAULTS, "vocab_size": 50265},
        plain={"add_cross_attention": False},
        tied=True,
    ),
    "distilbert": Family(
        architecture="DistilBertForMaskedLM",
        table=DISTILBERT,
        letters={"V": "vocab_size", "D": "dim", "N": "n_layers", "F": "hidden_dim", "P": "max_position_embeddings"},
        defaults={"vocab_size": 30522, "dim": 768, "n_layers": 6, "hidden_dim": 3072, "max_position_embeddings": 512},
        tied=True,
    ),
}
