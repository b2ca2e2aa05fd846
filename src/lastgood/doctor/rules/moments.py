"""How logs and tracebacks show that a checkpoint was being saved or loaded at that moment."""

from __future__ import annotations

import re

from lastgood.doctor.log import Raised

BEFORE = 20_000
"""Characters before a message in which a save counts as just begun."""

LOADING = (
    "_load_optimizer_and_scheduler", "_load_from_checkpoint", "_load_best_model", "_load_rng_state", "_load_scaler",
    "load_state_dict", "load_state", "load_checkpoint", "load_fsdp_model", "load_fsdp_optimizer", "restore",
    "_legacy_load", "load_sharded_checkpoint", "from_pretrained", "load_adapter",
)  # fmt: skip
"""Functions of transformers, accelerate, torch and Lightning that a resume goes through."""
WRITING = (
    "_save_checkpoint", "save_model", "save_pretrained", "_save_optimizer_and_scheduler", "save_checkpoint",
    "save_state", "get_state_dict", "get_model_state_dict", "get_optimizer_state_dict", "full_optim_state_dict",
    "_full_tensor", "full_tensor", "save_fsdp_model", "save_fsdp_optimizer", "consolidate_state_dict", "_save",
)  # fmt: skip
"""And those that a save goes through."""

_SAVING = re.compile(
    r"Saving model checkpoint to \S+|Saving (?:current state|the full state|FSDP model|DeepSpeed Model)"
    r"|\b(?:save_checkpoint|save_state|save_pretrained|save_model|_save_checkpoint)\b|state_dict_saver"
)


def saving(raised: Raised) -> bool:
    """Whether the traceback goes through a save."""
    return raised.passed(*WRITING) or any(frame.file.endswith("state_dict_saver.py") for frame in raised.frames)


def loading(raised: Raised) -> bool:
    """Whether it goes through the loading of a checkpoint."""
    return raised.passed(*LOADING)


def begun(match: re.Match[str]) -> str:
    """The last line before a match that tells of a save; "" if none does."""
    text = match.string[max(0, match.start() - BEFORE) : match.start()]
    found = list(_SAVING.finditer(text))
    if not found:
        return ""
    begin = text.rfind("\n", 0, found[-1].start()) + 1
    return text[begin:].split("\n", 1)[0].strip()[:200]
