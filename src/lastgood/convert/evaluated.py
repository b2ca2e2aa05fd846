"""A checkpoint saved before an evaluation -> as a stock Trainer would have saved it, after the evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lastgood.convert.content import PENDING, Content, legacy_numpy
from lastgood.errors import CorruptCheckpoint
from lastgood.layouts.progress import STATE
from lastgood.state import rng, tree
from lastgood.store import local


def catch_up(content: Content, after: Mapping[str, Any]) -> None:
    """Put on top what the evaluation changed (repo/after.py). Raises CorruptCheckpoint."""
    try:
        states = rng.decode(after["rng"])
        content.rng = {
            "python": states.python,
            "numpy": legacy_numpy(states.numpy),
            "cpu": states.cpu,
            **states.devices,
        }
        if after.get("scheduler") is not None:
            content.schedulers = [tree.decode(after["scheduler"], {})]
            for group, rate in zip(content.optimizers[0]["param_groups"], after["rates"], strict=True):
                group["lr"] = rate
        saved = json.loads(local.read(content.files[STATE], 1 << 30))
        whole = {**saved, **after["trainer_state"], "log_history": [*saved["log_history"], *after["rows"]]}
    except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
        raise CorruptCheckpoint(
            f"what is known of the evaluation at step {content.step} can't be read: {error!r}"
        ) from error
    content.texts[STATE] = (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode()
    del content.rest[PENDING]
