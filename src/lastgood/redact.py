"""Secrets must not reach the disk: values are masked by the name of their key, by their form, and inside URLs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_WORDS = r"(?:token(?!iz)|key|secret|password|passwd|credential|signature)"
SECRET = re.compile(_WORDS, re.IGNORECASE)
"""What the name of a secret has in it; a tokenizer is none."""
URL_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
# The numbers keep a text of nothing but such words from taking the square of its length.
URL_SECRET = re.compile(rf"([?&;#][^?=&;#\s]{{0,60}}{_WORDS}[^?=&;#\s]{{0,60}}=)[^&;#\s]+", re.IGNORECASE)
FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16})"
)
"""Tokens of the services that a training talks to, wherever they stand."""


def masked(key: str, value: Any) -> Any:
    """`value` as JSON, without what may be a secret."""
    return _masked(_is_secret(key), value)


def holds_secret(key: str, value: Any) -> bool:
    """Whether `masked` would change a text somewhere inside."""
    secret = _is_secret(key)
    if isinstance(value, Mapping):
        return any(holds_secret(key if secret else str(inner), item) for inner, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(holds_secret(key if secret else "", item) for item in value)
    return isinstance(value, (str, bytes)) and _masked(secret, value) != str(value)


def _is_secret(key: str) -> bool:
    return SECRET.search(key) is not None and not key.endswith("_tokens")


def _masked(secret: bool, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(inner): _masked(secret or _is_secret(str(inner)), item) for inner, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(secret, item) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return "***" if secret else _text(str(value))


def _text(value: str) -> str:
    return FORMS.sub("***", URL_SECRET.sub(r"\1***", URL_LOGIN.sub("***@", value)))
