"""A simulated accelerator for torch, "sim": built by scripts/device, see device.cpp."""

from __future__ import annotations

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def built(place: Path) -> Any:
    """Compile device.cpp into `place`, or take what is there. Needs a C++ compiler and ninja; a minute, once."""
    from torch.utils.cpp_extension import load

    source, library = Path(__file__).with_name("device.cpp"), place / "simulated_device.so"
    if library.exists() and library.stat().st_mtime >= source.stat().st_mtime:
        spec = spec_from_file_location("simulated_device", library)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    os.makedirs(place, exist_ok=True)
    (place / "lock").unlink(missing_ok=True)  # of a build that was killed: it would be waited for for ever
    return load("simulated_device", [str(source)], build_directory=str(place))


def register(device: Any) -> None:
    """Make it torch's accelerator, for the rest of this process."""
    module = ModuleType("torch.sim")
    states = [torch.Generator().get_state() for _ in range(device.device_count())]
    module.__dict__.update(
        is_available=lambda: True,
        device_count=device.device_count,
        current_device=device.current_device,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        manual_seed=lambda seed: None,
        get_rng_state=lambda index=0: states[0].clone(),
        set_rng_state=lambda state, index=0: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", module)
    torch.utils.generate_methods_for_privateuse1_backend()
