"""Steps that are given a closure: forward and backward run inside of them, and nothing changes before that is over.

That is so where the step is torch's own, and there only: another one may do what it likes before it calls the closure.
See docs/decisions/029.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

OWN = frozenset({
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD", "SparseAdam",
})  # fmt: skip
"""torch's optimizers that change no weight and no state before the closure has returned: tests/test_closures.py tries
each of them. One that a later torch brings isn't relied on."""

THROUGH = "torch.utils._contextlib"
"""Where torch's `no_grad` comes from, which some of their steps are wrapped in."""

EXCLUDED = "torch._dynamo.eval_frame"
"""Where the wrapper comes from by which torch.compile, once it was used for anything, leaves out a step of theirs."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of a step, with the optimizer in front."""


def waits(optimizer: torch.optim.Optimizer, hook: int) -> bool:
    """Whether nothing happens between the hook of that id and the closure's first call: the class is one of `OWN`, its
    step is nobody else's, and no hook of anybody else comes behind that one."""
    kind = type(optimizer)
    if kind.__name__ not in OWN or not _torchs(kind.__module__):
        return False
    # A schedule of torch's puts a step of its own into the optimizer, which calls that of the class.
    if not _plain(kind.step) or not _plain(vars(optimizer).get("step", kind.step)):
        return False
    last = next(reversed(_global_optimizer_pre_hooks), None) == hook
    return last and all(_ours(one) for one in optimizer._optimizer_step_pre_hooks.values())


def behind(args: tuple[Any, ...], kwargs: Mapping[str, Any], act: Callable[[], object]) -> Arguments | None:
    """The same arguments, with `act` done behind each call of the closure; None if there is no closure.

    Each call: inside of a later one something else may have been begun.
    """
    if len(args) == 2 and not kwargs and callable(args[1]):
        return (args[0], _then(args[1], act)), {}
    if len(args) == 1 and set(kwargs) == {"closure"} and callable(kwargs["closure"]):
        return args, {"closure": _then(kwargs["closure"], act)}
    return None


def _then(closure: Callable[[], Any], act: Callable[[], object]) -> Callable[[], Any]:
    def wrapped() -> Any:
        found = closure()  # what it raises ends the step, which has changed nothing so far
        act()
        return found

    return wrapped


def _plain(step: Any) -> bool:
    """Whether it is torch's through and through: what is wrapped around it says that it is of the same module, so the
    place where each function was made is looked at."""
    step = getattr(step, "__func__", step)
    while step is not None:
        made = getattr(step, "__globals__", {}).get("__name__", "")
        left_out = made == EXCLUDED and hasattr(step, "_torchdynamo_disable") and not hasattr(step, "_is_torch_compile")
        if made != THROUGH and not left_out and not _torchs(made):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def _ours(hook: Any) -> bool:
    """A part of a CheckpointManager counts the steps."""
    return f"{getattr(hook, '__module__', '')}".startswith("lastgood.")


def _torchs(module: str) -> bool:
    return f"{module}.".startswith("torch.optim.")  # the classes are said to be of the package itself
