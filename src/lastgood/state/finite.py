"""Whether the weights at hand are numbers."""

from __future__ import annotations

import torch


def not_finite(model: torch.nn.Module) -> str:
    """The name of a parameter that holds NaN or infinity, "" if none does. Waits for the device once."""
    floating = [(name, value.detach()) for name, value in model.named_parameters() if value.is_floating_point()]
    flags = [torch.isfinite(value.float() if value.element_size() == 1 else value).all() for _, value in floating]
    if not flags:
        return ""
    device = flags[0].device
    good = torch.stack([flag.to(device) for flag in flags]).tolist()
    return next((name for (name, _), fine in zip(floating, good, strict=True) if not fine), "")
