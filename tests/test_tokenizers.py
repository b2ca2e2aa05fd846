"""What is remembered of a tokenizer: its files are those of a save that remembers nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lastgood.state import tokenizers as module
from lastgood.state.tokenizers import Tokenizers, looks_of

WORDS = {word: number for number, word in enumerate(["a", "b", "c", "ab", "bc", "<|end|>", "<|pad|>"])}


def made(model: Any = None) -> Any:
    inner = Tokenizer(model or models.BPE(dict(WORDS), [("a", "b"), ("b", "c")], unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")


def more_words(tokenizer: Any) -> None:
    tokenizer.add_tokens([f"word{len(tokenizer)}"])


def more_special(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{len(tokenizer)}|>"]})


def other_flags(tokenizer: Any) -> None:
    """Of a word that is there already."""
    known = repr(tokenizer.backend_tokenizer.get_added_tokens_decoder())
    tokenizer.add_tokens([AddedToken("more", lstrip='AddedToken("more", rstrip=False, lstrip=False' in known)])


def cut(tokenizer: Any) -> None:
    tokenizer(["a b c"], truncation=True, max_length=len(tokenizer) + 1)


def padded(tokenizer: Any) -> None:
    tokenizer(["a b c", "a"], padding="max_length", max_length=12)


def normalized(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def normalized_otherwise(tokenizer: Any) -> None:
    """Of one kind, with another setting."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "b" * len(tokenizer))


def split(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def decoded(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()


def finished(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", WORDS["<|end|>"])]
    )


def noisy(tokenizer: Any) -> None:
    model = tokenizer.backend_tokenizer.model
    if isinstance(model, models.BPE):
        model.dropout = 0.1 if model.dropout is None else None


def other_words(tokenizer: Any) -> None:
    """As many."""
    words = {word.replace("ab", "cb"): number for word, number in WORDS.items()}
    tokenizer.backend_tokenizer.model = models.BPE(words, [("c", "b"), ("b", "c")], unk_token="a")


def other_kind(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.model = models.WordLevel(dict(WORDS), unk_token="a")


def other_backend(tokenizer: Any) -> None:
    tokenizer._tokenizer = made().backend_tokenizer


def longer(tokenizer: Any) -> None:
    """In the configuration alone."""
    tokenizer.model_max_length += 1
    tokenizer.chat_template = f"{tokenizer.model_max_length}"


def another_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|end|>" if tokenizer.eos_token == "c" else "c"


def used(tokenizer: Any) -> None:
    tokenizer("a b")


CHANGES = (
    more_words, more_special, other_flags, cut, padded, normalized, normalized_otherwise, split, decoded, finished,
    noisy, other_words, other_kind, other_backend, longer, another_end, used,
)  # fmt: skip


def files(tokenizer: Any, known: Tokenizers | None = None) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        if known is None:
            told = tokenizer.save_pretrained(folder)
        else:
            with known.reused():
                told = tokenizer.save_pretrained(folder)
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*")}
        assert {Path(path).name for path in told} >= {"tokenizer.json"}
        assert all(Path(path).exists() for path in told if path.endswith(".json"))
        return found


@given(st.lists(st.sampled_from(CHANGES), max_size=6))
@settings(deadline=None, max_examples=150)
def test_the_files_are_those_of_a_save_that_remembers_nothing(changes: list[Callable[[Any], None]]) -> None:
    tokenizer, known = made(), Tokenizers()
    for change in (used, *changes):
        change(tokenizer)
        for _ in range(2):
            assert files(tokenizer, known) == files(tokenizer)


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in (used, longer, another_end)])
def test_each_change_is_noticed(change: Callable[[Any], None]) -> None:
    tokenizer = made()
    before = looks_of(tokenizer)
    backend = tokenizer.backend_tokenizer
    assert before == looks_of(tokenizer) is not None
    change(tokenizer)
    assert looks_of(tokenizer) != before or tokenizer.backend_tokenizer is not backend


def test_the_vocabulary_is_written_once() -> None:
    tokenizer, known = made(), Tokenizers()
    files(tokenizer, known)
    (first,) = known._last.values()
    for _ in range(3):
        used(tokenizer)
        files(tokenizer, known)
    assert next(iter(known._last.values())) is first


def test_two_tokenizers_are_two() -> None:
    one, two, known = made(), made(models.WordLevel(dict(WORDS), unk_token="b")), Tokenizers()
    for _ in range(2):
        assert files(one, known) == files(one) != files(two) == files(two, known)


def test_a_tokenizer_with_steps_of_its_own_is_written_each_time(tmp_path: Path) -> None:
    class Steps:
        def pre_tokenize(self, pretok: Any) -> None: ...

    tokenizer, known = made(), Tokenizers()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Steps())
    assert looks_of(tokenizer) is None
    with known.reused(), pytest.raises(Exception, match=r"[Cc]ustom"):  # as without
        tokenizer.save_pretrained(tmp_path)
    assert not known._last


def test_not_more_than_so_much_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 100)
    tokenizer, known = made(), Tokenizers()
    assert files(tokenizer, known) == files(tokenizer)
    assert not known._last


def test_afterwards_nothing_is_replaced() -> None:
    kinds = PreTrainedTokenizerFast.__mro__
    before = [dict(vars(kind)) for kind in kinds]
    files(made(), Tokenizers())
    assert [dict(vars(kind)) for kind in kinds] == before
