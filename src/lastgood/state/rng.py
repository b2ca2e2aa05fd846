"""All global random number generators of this process: python, numpy, torch on the CPU and on every device.

`capture` is called before every batch that is fetched, so it takes microseconds: it
keeps the raw states, and only a save turns them into JSON (`encode`).
"""

from __future__ import annotations

import base64
import random
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lastgood.state import tree

DEVICES = ("cuda", "mps", "xpu")


@dataclass(frozen=True, slots=True)
class Rng:
    """The states as their libraries hand them out; devices: kind -> one ByteTensor per device."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: torch.Tensor
    devices: dict[str, list[torch.Tensor]]

    def same(self, other: Rng) -> bool:
        """Whether nothing was drawn between the two, on the CPU generators."""
        return not differing(self, other) & {"python", "numpy", "torch"}


def capture() -> Rng:
    """The states as they are now, with every CUDA, MPS and XPU device that is at hand."""
    devices: dict[str, list[torch.Tensor]] = {}
    for kind in DEVICES:
        module = getattr(torch, kind, None)
        if module is None or not module.is_available():
            continue
        if hasattr(module, "get_rng_state_all"):
            devices[kind] = list(module.get_rng_state_all())
        else:
            devices[kind] = [module.get_rng_state()]
    return Rng(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), devices)


def differing(one: Rng, other: Rng) -> set[str]:
    """The kinds of generators that are in another state: "python", "numpy", "torch", "cuda" ..."""
    mine, theirs = one.numpy["state"], other.numpy["state"]
    found = set()
    if one.python != other.python:
        found.add("python")
    positions = mine["pos"] == theirs["pos"] and one.numpy["has_gauss"] == other.numpy["has_gauss"]
    if not (positions and np.array_equal(mine["key"], theirs["key"])):
        found.add("numpy")
    if not torch.equal(one.cpu, other.cpu):
        found.add("torch")
    for kind, states in one.devices.items():
        if any(not torch.equal(a, b) for a, b in zip(states, other.devices.get(kind, []), strict=False)):
            found.add(kind)
    return found


def restore(rng: Rng) -> list[str]:
    """Set every generator back; returns what could not be set, in words (a device that isn't here any more)."""
    random.setstate(rng.python)
    np.random.set_state(rng.numpy)
    torch.set_rng_state(rng.cpu)
    problems = []
    for kind, states in rng.devices.items():
        module = getattr(torch, kind, None)
        if module is None or not module.is_available():
            problems.append(f"rng of {len(states)} {kind} device(s): none here")
            continue
        count = module.device_count() if hasattr(module, "device_count") else 1
        for index, state in enumerate(states[:count]):
            module.set_rng_state(state, index) if hasattr(module, "set_rng_state_all") else module.set_rng_state(state)
        if len(states) != count:
            problems.append(f"rng of {len(states)} {kind} device(s) was saved, {count} here")
    return problems


def encode(rng: Rng) -> dict[str, Any]:
    """As JSON; python's 625 words are packed as little-endian uint32 in base64."""
    version, words, gauss = rng.python
    return {
        "python": [version, base64.b64encode(struct.pack(f"<{len(words)}I", *words)).decode(), gauss],
        "numpy": tree.encode(rng.numpy, {}, "numpy"),
        "torch": to_text(rng.cpu),
        "devices": {kind: [to_text(state) for state in states] for kind, states in rng.devices.items()},
    }


def decode(value: dict[str, Any]) -> Rng:
    """The inverse of `encode`."""
    version, packed, gauss = value["python"]
    raw = base64.b64decode(packed)
    return Rng(
        python=(version, struct.unpack(f"<{len(raw) // 4}I", raw), gauss),
        numpy=tree.decode(value["numpy"], {}),
        cpu=from_text(value["torch"]),
        devices={kind: [from_text(text) for text in texts] for kind, texts in value["devices"].items()},
    )


def to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).clone()
