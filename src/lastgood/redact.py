"""Secrets must not reach the disk: values are masked by the name of their key, and logins inside URLs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

SECRET = re.compile(r"token|key|secret|password|passwd|credential", re.IGNORECASE)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def masked(key: str, value: Any) -> Any:
    """`value` as JSON, without what may be a secret."""
    if value is not None and isinstance(value, str) and SECRET.search(key) and not key.endswith("_tokens"):
        return "***"
    if isinstance(value, Mapping):
        return {str(inner): masked(str(inner), item) for inner, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked("", item) for item in value]
    if isinstance(value, str):
        return URL_LOGIN.sub("***@", value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return URL_LOGIN.sub("***@", str(value))
