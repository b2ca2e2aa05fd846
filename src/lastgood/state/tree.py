"""Nested Python state <-> JSON, with the tensors set apart: what pickle is used for elsewhere.

Everything that JSON has no word for is an object with one key that begins with `$`
(FORMAT.md, "Values in resume.json"). Whatever isn't listed here is refused when it is
saved, with the place it was found, because a value that comes back different is worse.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lastgood.errors import CorruptCheckpoint, NotSupported

JSON = Any


def encode(value: object, tensors: dict[str, torch.Tensor], where: str) -> JSON:
    """The JSON for `value`; tensors in it are put into `tensors` under names that begin with `where`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, torch.Tensor):
        tensors[where] = value
        return {"$tensor": where}
    if isinstance(value, np.generic):
        return {"$scalar": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [encode(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return {"$tuple": items} if isinstance(value, tuple) else {"$set": items}
    if isinstance(value, Mapping):
        return _encode_mapping(value, tensors, where)
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        plain = np.ascontiguousarray(value)
        return {"$array": [plain.dtype.str, list(value.shape), base64.b64encode(plain.tobytes()).decode()]}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    raise NotSupported(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which can't be stored without pickle",
        hint="keep numbers, strings, lists, dicts, arrays and tensors in the state, or leave it out of the checkpoint",
    )


def _encode_mapping(value: Mapping[Any, Any], tensors: dict[str, torch.Tensor], where: str) -> JSON:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        found = {}
        for key, item in value.items():
            place = f"{where}.{key}"
            if type(item) is torch.Tensor:  # nearly all of what thousands of parameters have
                tensors[place] = item
                found[str(key)] = {"$tensor": place}
            else:
                found[str(key)] = encode(item, tensors, place)
        return found
    pairs = [
        [encode(key, tensors, f"{where}.key{i}"), encode(item, tensors, f"{where}.{key}")]
        for i, (key, item) in enumerate(value.items())
    ]
    return {"$map": pairs}


def decode(value: JSON, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `encode`. Raises CorruptCheckpoint for what `encode` didn't write, or a lost tensor."""
    try:
        return _decode(value, tensors)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CorruptCheckpoint(f"resume.json holds what was never saved: {str(error)[:200]}") from error


def _decode(value: JSON, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: _decode(item, tensors) for key, item in value.items()}
    word, body = next(iter(value.items()))
    if word == "$tensor":
        if body not in tensors:
            raise CorruptCheckpoint(f"tensor {body!r} is named in resume.json and stored nowhere")
        return tensors[body]
    if word == "$tuple":
        return tuple(_decode(item, tensors) for item in body)
    if word == "$set":
        return {_decode(item, tensors) for item in body}
    if word == "$map":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in body}
    if word == "$float":
        return float(body)
    if word == "$bytes":
        return base64.b64decode(body)
    if word == "$scalar":
        return np.frombuffer(base64.b64decode(body[1]), dtype=np.dtype(body[0]))[0]
    if word == "$array":
        return np.frombuffer(base64.b64decode(body[2]), dtype=np.dtype(body[0])).reshape(body[1]).copy()
    if word == "$dtype":
        found = getattr(torch, body, None)
        if not isinstance(found, torch.dtype):
            raise CorruptCheckpoint(f"resume.json names {body[:100]!r}, which is no dtype of this torch")
        return found
    if word == "$device":
        return torch.device(body)
    raise CorruptCheckpoint(f"resume.json uses {word!r}, which this version does not know")
