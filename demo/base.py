"""What the fine-tune starts from: a tokenizer and a small GPT-2, both made here from the same text."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCABULARY = 4096
LENGTH = 128
SIZES = {"n_embd": 320, "n_layer": 8, "n_head": 8, "n_positions": 256}
"""About 11 million parameters."""


def tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


def model(words: Any, texts: list[str], steps: int) -> Any:
    """A GPT-2 that has read some of the text, so that there is something to fine-tune."""
    import torch
    from rich.progress import track
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    set_seed(0)
    config = GPT2Config(
        vocab_size=len(words), bos_token_id=words.eos_token_id, eos_token_id=words.eos_token_id, **SIZES
    )
    net = GPT2LMHeadModel(config)
    ids = words("\n".join(texts[: 40 * steps]))["input_ids"]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in track(range(steps), f"a base model of {net.num_parameters() / 1e6:.0f}M parameters reads"):
        batch = torch.tensor([ids[(step * 8 + row) * LENGTH :][:LENGTH] for row in range(8)])
        loss = net(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def prepare(place: Path, steps: int) -> Path:
    """Corpus, tokenizer and base model under `place`, made once."""
    import json

    from demo.corpus import pairs

    done = place / "base"
    if done.exists():
        return done
    rows = pairs()
    place.mkdir(parents=True, exist_ok=True)
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row["prompt"] + row["completion"] for row in rows]
    words = tokenizer(texts)
    net = model(words, texts, steps)
    # The configuration is written before the weights: a base that was interrupted must not count as made.
    part = place / "base.part"
    shutil.rmtree(part, ignore_errors=True)
    words.save_pretrained(part)
    net.save_pretrained(part)
    return part.rename(done)
