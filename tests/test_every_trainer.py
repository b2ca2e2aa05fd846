"""Trainers of other kinds: killed and resumed, each ends bit for bit where it ends uninterrupted."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback

import lastgood

import forked
from training import KillAt, digest, flat, outcome, texts

STEPS = 6
SIZES = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
GPT2 = {**SIZES, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
BERT = {
    **SIZES, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 64,
}  # fmt: skip
T5 = {**SIZES, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}


def words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: n for n, symbol in enumerate(["<pad>", "<eos>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", model_max_length=32)


def lines(count: int) -> list[str]:
    return [row.decode(errors="replace") for row in texts(count)]


def model(kind: str, sizes: dict[str, Any], **more: Any) -> Any:
    transformers.set_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**{**sizes, **more}))


def settings(cls: Any, out: Path, **changes: Any) -> Any:
    common: dict[str, Any] = {
        "output_dir": str(out), "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 2, "bf16": False,
        "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True,
        "report_to": [],
    }  # fmt: skip
    return cls(**{**common, **changes})


@dataclass(frozen=True)
class Row:
    """build(out, callbacks) -> Trainer; reads: what the library itself must make of a checkpoint."""

    name: str
    build: Callable[[Path, list[TrainerCallback]], Any]
    reads: Callable[[Path], Any] | None = None
    state: tuple[str, ...] = ()  # attributes of the trainer that have to be the same at the end
    files: tuple[str, ...] = ("model.safetensors",)
    kills: tuple[int, ...] = (3,)


# ---- transformers -------------------------------------------------------------------------


def of_transformers(
    kind: str, sizes: dict[str, Any], rows: list[dict[str, Any]], collator: str, **more: Any
) -> Callable[..., Any]:
    def build(out: Path, callbacks: list[TrainerCallback]) -> Any:
        tokenizer = words()
        seq2seq = kind.startswith("T5")
        cls = transformers.Seq2SeqTrainer if seq2seq else transformers.Trainer
        args = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
        built = model(kind, sizes, **more)
        evaluation = {"eval_strategy": "steps", "eval_steps": 2}
        if seq2seq:
            evaluation |= {"predict_with_generate": True, "generation_max_length": 4}
        data = Dataset.from_list(rows)
        return cls(
            model=built,
            args=settings(args, out, **evaluation),
            train_dataset=data.select(range(24)),
            eval_dataset=data.select(range(24, 28)),
            processing_class=tokenizer,
            data_collator=getattr(transformers, collator)(*([] if collator == "DefaultDataCollator" else [tokenizer])),
            callbacks=callbacks,
        )

    return build


def plain_rows(label: Callable[[int, dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    tokenizer = words()
    rows = [{"input_ids": tokenizer(text).input_ids[:10]} for text in lines(28)]
    return [{**row, **label(number, row)} for number, row in enumerate(rows)]


def full(row: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": (row["input_ids"] * 10)[:10]}


TRANSFORMERS = [
    Row(
        "classification",
        of_transformers(
            "BertForSequenceClassification", BERT, plain_rows(lambda n, _: {"label": n % 2}), "DataCollatorWithPadding"
        ),
        transformers.BertForSequenceClassification.from_pretrained,
    ),
    Row(
        "tokens",
        of_transformers(
            "BertForTokenClassification",
            BERT,
            plain_rows(lambda n, row: {"labels": [i % 2 for i in row["input_ids"]]}),
            "DataCollatorForTokenClassification",
        ),
        transformers.BertForTokenClassification.from_pretrained,
    ),
    Row(
        "answers",
        of_transformers(
            "BertForQuestionAnswering",
            BERT,
            plain_rows(lambda n, row: {**full(row), "start_positions": n % 5, "end_positions": 5 + n % 5}),
            "DefaultDataCollator",
        ),
        transformers.BertForQuestionAnswering.from_pretrained,
    ),
    Row(
        "seq2seq",
        of_transformers(
            "T5ForConditionalGeneration",
            T5,
            plain_rows(lambda n, row: {"labels": row["input_ids"][::-1][:6]}),
            "DataCollatorForSeq2Seq",
        ),
        transformers.T5ForConditionalGeneration.from_pretrained,
    ),
]

# ---- trl ----------------------------------------------------------------------------------


def trl(name: str, place: str = "trl", **options: Any) -> Callable[..., Any]:
    """options: `lora`, `model`, `rows`, arguments of the trainer under `with_`, and whatever the config knows."""
    lora, kind = options.pop("lora", False), options.pop("model", "GPT2LMHeadModel")
    columns, beside = options.pop("columns"), options.pop("with_", dict)

    def build(out: Path, callbacks: list[TrainerCallback]) -> Any:
        import importlib

        from peft import LoraConfig

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # trl.experimental says what it is
            module = importlib.import_module(place)
        built = model(kind, GPT2, **({"num_labels": 1} if "Sequence" in kind else {}))
        built.save_pretrained(out.parent / "base")
        built.config._name_or_path = str(out.parent / "base")
        if lora:
            beside_lora = {"peft_config": LoraConfig(
                r=2, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True,
                task_type="SEQ_CLS" if "Sequence" in kind else "CAUSAL_LM",
            )}  # fmt: skip
        else:
            beside_lora = {}
        pool = lines(96)
        rows = [columns(a[:5], a[5:], b[5:], n) for n, (a, b) in enumerate(zip(pool[:48], pool[48:], strict=True))]
        return getattr(module, f"{name}Trainer")(
            model=built,
            args=settings(getattr(module, f"{name}Config"), out, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=words(),
            callbacks=callbacks,
            **beside(),
            **beside_lora,
        )

    return build


def pairs(prompt: str, good: str, bad: str, number: int) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": good, "rejected": bad}


def labelled(prompt: str, good: str, bad: str, number: int) -> dict[str, Any]:
    return {"prompt": prompt, "completion": good, "label": number % 2 == 0}


def prompts(prompt: str, good: str, bad: str, number: int) -> dict[str, Any]:
    return {"prompt": prompt}


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def another_gpt2() -> dict[str, Any]:
    return {"ref_model": model("GPT2LMHeadModel", GPT2)}


def reward_model() -> dict[str, Any]:
    scorer = model("GPT2ForSequenceClassification", GPT2, num_labels=1)
    return {"reward_funcs": [vowels, scorer], "reward_processing_classes": [None, words()]}


ROLLOUT = {
    "columns": prompts, "with_": lambda: {"reward_funcs": vowels}, "max_completion_length": 6, "num_generations": 2,
    "steps_per_generation": 4, "num_iterations": 2, "logging_steps": 4,
}  # fmt: skip
BUFFER = ("_step", "_buffered_inputs", "_total_train_tokens")

TRL = [
    Row("reward", trl("Reward", model="GPT2ForSequenceClassification", columns=pairs)),
    Row(
        "reward-lora",
        trl("Reward", model="GPT2ForSequenceClassification", lora=True, columns=pairs),
        files=("adapter_model.safetensors",),
    ),
    Row("kto", trl("KTO", columns=labelled, with_=another_gpt2)),
    Row("orpo", trl("ORPO", "trl.experimental.orpo", columns=pairs)),
    Row("cpo", trl("CPO", "trl.experimental.cpo", columns=pairs)),
    Row(
        "dpo-synced",
        trl("DPO", columns=pairs, with_=another_gpt2, sync_ref_model=True, ref_model_sync_steps=2),
        state=("ref_model",),
    ),
    Row("grpo", trl("GRPO", **ROLLOUT), state=BUFFER, kills=(3, 4)),
    Row(
        "grpo-synced",
        trl("GRPO", **ROLLOUT, beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, gradient_accumulation_steps=2),
        state=(*BUFFER, "ref_model"),
    ),
    Row(
        "grpo-lora",
        trl("GRPO", **{**ROLLOUT, "with_": reward_model}, beta=0.1, lora=True, use_adaptive_entropy=True),
        state=(*BUFFER, "entropy_coef"),
        files=("adapter_model.safetensors",),
    ),
    Row("rloo", trl("RLOO", **ROLLOUT), state=BUFFER, kills=(3, 4)),
]  # fmt: skip

# ---- sentence-transformers ----------------------------------------------------------------


def sentence(name: str, loss: str, columns: Callable[..., dict[str, Any]], **options: Any) -> Callable[..., Any]:
    """name: the model's class. The loss of that name is looked for beside it."""

    def build(out: Path, callbacks: list[TrainerCallback]) -> Any:
        import sentence_transformers as st
        from sentence_transformers import cross_encoder, sentence_transformer, sparse_encoder

        base = out.parent / "bert"
        kind = "BertForSequenceClassification" if name == "CrossEncoder" else "BertForMaskedLM"
        model(kind, BERT, **({"num_labels": 1} if name == "CrossEncoder" else {})).save_pretrained(base)
        words().save_pretrained(base)
        transformers.set_seed(1)
        beside: Any
        if name == "CrossEncoder":
            made, beside = st.CrossEncoder(str(base), num_labels=1, device="cpu"), cross_encoder
        elif name == "SparseEncoder":
            made, beside = st.SparseEncoder(str(base), device="cpu"), sparse_encoder
        else:
            from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

            first = Transformer(str(base))
            made = st.SentenceTransformer(
                modules=[first, Pooling(8, "mean"), Dense(in_features=8, out_features=4)], device="cpu"
            )
            beside = sentence_transformer
        losses = beside.losses
        chosen = getattr(losses, loss)
        if loss == "SoftmaxLoss":  # a loss with weights of its own, which no checkpoint of the library holds
            built = chosen(made, sentence_embedding_dimension=4, num_labels=2)
        elif loss == "SpladeLoss":
            built = chosen(made, losses.SparseMultipleNegativesRankingLoss(made), document_regularizer_weight=0.1)
        else:
            built = chosen(made)
        pool = lines(48)
        rows = [columns(a, b, n) for n, (a, b) in enumerate(zip(pool[:24], pool[24:], strict=True))]
        data = Dataset.from_list(rows)
        return getattr(st, f"{name}Trainer")(
            model=made,
            args=settings(getattr(st, f"{name}TrainingArguments"), out, eval_strategy="steps", eval_steps=2, **options),
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            loss=built,
            callbacks=callbacks,
        )

    return build


def couple(a: str, b: str, number: int) -> dict[str, Any]:
    return {"first": a, "second": b}


def scored(a: str, b: str, number: int) -> dict[str, Any]:
    return {"first": a, "second": b, "label": float(number % 2)}


def sorted_out(a: str, b: str, number: int) -> dict[str, Any]:
    return {"first": a, "second": b, "label": number % 2}


def loads(name: str) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        import sentence_transformers

        return getattr(sentence_transformers, name)(str(path), device="cpu")

    return read


SENTENCES = [
    Row(
        "sentence",
        sentence("SentenceTransformer", "MultipleNegativesRankingLoss", couple, batch_sampler="no_duplicates"),
        loads("SentenceTransformer"),
        files=("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"),
    ),
    Row("sentence-softmax", sentence("SentenceTransformer", "SoftmaxLoss", sorted_out), state=("loss",)),
    Row("sparse", sentence("SparseEncoder", "SpladeLoss", couple), loads("SparseEncoder")),
    Row(
        "cross",
        sentence("CrossEncoder", "BinaryCrossEntropyLoss", scored),
        loads("CrossEncoder"),
    ),
]


# ---- all of them --------------------------------------------------------------------------


def leaves(value: Any) -> dict[str, Any]:
    return dict(value.state_dict()) if isinstance(value, torch.nn.Module) else flat(value)


def go(row: Row, out: Path, result: Path, kill: int | None = None) -> None:
    torch.set_num_threads(1)
    transformers.set_seed(7)
    trainer = row.build(out, [] if kill is None else [KillAt(kill)])
    trainer = lastgood.manage(trainer)
    trainer.train(resume_from_checkpoint="auto")
    found = outcome(trainer)
    clocks = ("runtime", "per_second", "step_time", "total_flos")
    found["log"] = [
        {k: repr(v) for k, v in entry.items() if not k.endswith(clocks) and not k.startswith("profiling")}
        for entry in trainer.state.log_history
        if "train_loss" not in entry
    ]
    found["state"] = {name: digest(leaves(getattr(trainer, name))) for name in row.state}
    found["random"] = [torch.initial_seed(), torch.rand(2).tolist(), random.random(), float(np.random.rand())]
    result.write_text(json.dumps(found))


def killed_and_resumed(row: Row, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.run(go, row, tmp_path / "a", tmp_path / "a.json", log=log) == 0, log.read_text()
    for kill in row.kills:
        assert forked.run(go, row, tmp_path / "b", tmp_path / "b.json", kill, log=log) == -9, log.read_text()
    assert forked.run(go, row, tmp_path / "b", tmp_path / "b.json", log=log) == 0, log.read_text()
    straight, resumed = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert resumed == straight
    last = tmp_path / "b" / f"checkpoint-{STEPS}"
    assert all((last / name).is_file() for name in row.files)
    assert not [path.name for path in last.rglob("*.bin")], "nothing that needs pickle"
    assert not lastgood.open(tmp_path / "b").latest().problem
    if row.reads is not None:
        read = row.reads(last)
        assert digest(dict(read.state_dict())) == straight["weights"]


@pytest.mark.parametrize("row", TRANSFORMERS + TRL, ids=lambda row: row.name)
def test_I1_I8_every_trainer_is_exact(row: Row, tmp_path: Path) -> None:
    killed_and_resumed(row, tmp_path)


@pytest.mark.parametrize("row", SENTENCES, ids=lambda row: row.name)
def test_I1_I8_trainers_of_sentence_transformers_are_exact(row: Row, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    killed_and_resumed(row, tmp_path)


def test_a_guide_inside_a_loss_is_not_stored(tmp_path: Path) -> None:
    """It stands in the optimizer's list and is never trained: storing it would store another model with each save."""
    pytest.importorskip("sentence_transformers")
    import sentence_transformers as st
    from safetensors import safe_open
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    build = sentence("SentenceTransformer", "MultipleNegativesRankingLoss", couple)
    trainer = build(tmp_path / "run", [])
    guide = st.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    trainer.loss = GISTEmbedLoss(trainer.model, guide)
    lastgood.manage(trainer).train()
    with safe_open(tmp_path / "run" / f"checkpoint-{STEPS}" / "optimizer.safetensors", "pt") as file:
        stored = [name for name in file.keys() if name.startswith("extras.")]  # noqa: SIM118
    guides = {f"extras.trainer.loss.{name}" for name, _ in trainer.loss.named_parameters() if "guide" in name}
    assert guides and not guides & set(stored)


def test_another_reference_than_the_saved_one_is_refused_before_anything_changes(tmp_path: Path) -> None:
    row = next(row for row in TRL if row.name == "dpo-synced")
    lastgood.manage(row.build(tmp_path / "run", [])).train()
    other = row.build(tmp_path / "run", [])
    sync = next(c for c in other.callback_handler.callbacks if type(c).__name__ == "SyncRefModelCallback")
    sync.ref_model = model("GPT2LMHeadModel", GPT2, n_layer=2)
    before = digest(leaves(sync.ref_model))
    sync.ref_model.transformer.h[0].ln_1.weight = torch.nn.Parameter(torch.zeros(3))
    other = lastgood.manage(other)
    with pytest.raises(lastgood.LastgoodError, match="ref_model"):
        other.train(resume_from_checkpoint=STEPS - 1)
    sync.ref_model.transformer.h[0].ln_1.weight = torch.nn.Parameter(torch.ones(8))
    assert digest(leaves(sync.ref_model)) == before


def test_what_a_class_lists_as_its_state_is_restored_in_place(tmp_path: Path) -> None:
    class Own(transformers.Trainer):
        lastgood_state = ("seen", "head", "table")

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.seen: list[int] = []
            self.head = torch.nn.Linear(2, 2)
            self.table: dict[str, Any] = {"mean": None}

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(self.state.global_step)
            self.table["mean"] = torch.tensor(float(len(self.seen)))
            with torch.no_grad():
                self.head.weight += 1
            return super().training_step(*args, **kwargs)

    def build() -> Any:
        stock = TRANSFORMERS[0].build(tmp_path / "run", [])
        data = {"train_dataset": stock.train_dataset, "eval_dataset": stock.eval_dataset}
        trainer = Own(model=stock.model, args=stock.args, data_collator=stock.data_collator, **data)
        return lastgood.manage(trainer)

    torch.manual_seed(0)
    first = build()
    first.train()
    second = build()
    held = second.seen, second.head.weight
    second.train(resume_from_checkpoint=STEPS - 1)
    assert held[0] == list(range(STEPS)) and held[0] is second.seen
    assert held[1] is second.head.weight
    assert torch.equal(second.table["mean"], first.table["mean"])
    assert torch.equal(second.head.bias, first.head.bias)
