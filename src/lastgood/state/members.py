"""Every parameter and buffer of a model, in one walk.

torch's `named_parameters` hands each name up through a generator for every level of modules: of an adapter on a small
GPT-2 (526 modules) two such walks take 3 ms, several times in each save. This one gives the same.
"""

from __future__ import annotations

from torch import Tensor, nn

Members = tuple[dict[str, Tensor], dict[str, Tensor], tuple[nn.Module, ...]]
"""Parameters and buffers, by name, and the modules."""

_ROOT = ("named_modules", "named_parameters", "named_buffers", "_named_members")


def members(model: nn.Module) -> Members:
    """As `named_parameters`, `named_buffers` and `modules` have them, in their order.

    A tensor that several modules share comes once, under its first name.
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: dict[nn.Module, None] = {}
    known: tuple[set[int], set[int]] = (set(), set())

    def walk(module: nn.Module, prefix: str) -> bool:
        """False where a module has a walk of its own: FSDP hides its wrappers."""
        if module in seen:
            return True
        seen[module] = None
        if type(module).named_modules is not nn.Module.named_modules or "named_modules" in module.__dict__:
            return False
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in known[0]:
                known[0].add(id(parameter))
                parameters[prefix + name] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in known[1]:
                known[1].add(id(buffer))
                buffers[prefix + name] = buffer
        for name, child in module._modules.items():
            if child is not None and not walk(child, f"{prefix}{name}."):
                return False
        return True

    own, kind = model.__dict__, type(model)
    if all(getattr(kind, name) is getattr(nn.Module, name) and name not in own for name in _ROOT) and walk(model, ""):
        return parameters, buffers, tuple(seen)
    return dict(model.named_parameters()), dict(model.named_buffers()), tuple(model.modules())
