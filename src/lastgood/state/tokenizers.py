"""The files of a tokenizer: as they were written at the last save, as long as it is the same tokenizer.

To make tokenizer.json of 50,000 words takes 30 ms, of 128,000 a hundred: many times what training waits for the save of
an adapter. No training changes a tokenizer, so that file is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lastgood.state.replaced import replaced

WRITERS = (
    ("transformers.tokenization_utils_tokenizers", "TokenizersBackend._save_pretrained"),
    ("transformers.tokenization_utils_fast", "PreTrainedTokenizerFast._save_pretrained"),
)
"""Where transformers 5 and 4 have the tokenizers write what isn't configuration."""

MOST = 64 << 20
"""Bytes (64 MiB) that are remembered at most of a tokenizer."""
SAMPLES = 256
"""Words of the vocabulary that are compared, from all of its range."""


class Written(NamedTuple):
    """backend: kept, so that no other one gets its number. files: by what is behind the directory."""

    backend: Any
    looks: Any
    files: dict[str, bytes]


@dataclass(slots=True)
class Tokenizers:
    """A run's memory of its tokenizers."""

    _last: dict[int, Written] = field(default_factory=dict)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """While active, a tokenizer of the `tokenizers` library writes what it wrote before, if it is the same."""
        with replaced([(*where, self._writing) for where in WRITERS]):
            yield

    def _writing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def _save_pretrained(tokenizer: Any, save_directory: Any, file_names: Any, *args: Any, **kwargs: Any) -> Any:
            looks, place = looks_of(tokenizer, args, kwargs), Path(save_directory)
            backend = tokenizer.backend_tokenizer
            known = self._last.get(id(backend))
            if known is not None and looks is not None and known.looks == looks:
                for name, content in known.files.items():
                    (place / name).write_bytes(content)
                return (*file_names, *(str(place / name) for name in known.files))
            self._last.pop(id(backend), None)
            told = original(tokenizer, save_directory, file_names, *args, **kwargs)
            paths = [Path(path) for path in told[len(file_names) :]]
            inside = all(path.parent == place for path in paths)
            if looks is not None and inside and sum(path.stat().st_size for path in paths) <= MOST:
                self._last[id(backend)] = Written(backend, looks, {path.name: path.read_bytes() for path in paths})
            return told

        return _save_pretrained


def looks_of(tokenizer: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
    """All that its file is made of, but of the vocabulary only some; None where that can't be told.

    Whoever puts another vocabulary into the same object, with as many words and the same ones at all the places that
    are looked at, isn't noticed.
    """
    try:
        backend = tokenizer.backend_tokenizer
        model, count = backend.model, backend.get_vocab_size(with_added_tokens=False)
        words = [backend.id_to_token(number) for number in range(0, count, max(1, count // SAMPLES))]
        numbers = [(name, getattr(model, name)) for name in dir(model) if not name.startswith("_")]
        steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
        return (
            type(tokenizer), args, kwargs or {}, type(model), count, words, backend.id_to_token(count - 1),
            [number for number in numbers if not callable(number[1])],
            [None if step is None else (type(step), step.__getstate__()) for step in steps],
            {number: repr(token) for number, token in backend.get_added_tokens_decoder().items()},
            backend.truncation, backend.padding,
        )  # fmt: skip
    except Exception:  # one of another library, or a step that is somebody's own Python: it has no word for itself
        return None
