"""An optimizer's state by parameter name, exactly.

torch numbers the parameters; a number says nothing once a layer was frozen or added,
so on disk every tensor is `state.<parameter>.<key>` and a changed set of parameters is
named instead of guessed. `load_state_dict` casts state to the parameter's dtype (fp32
moments of a bf16 parameter come back as bf16), so what it changed is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lastgood.errors import Incompatible
from lastgood.state import tree
from lastgood.state.match import Match, some
from lastgood.state.tensors import same_bits

MANY = 1000
"""Parameters of a group from which on it matters how they are looked for."""


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's."""
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate."):
        if not hasattr(optimizer, "optimizer"):
            break
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def parameter_names(optimizer: torch.optim.Optimizer, live: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Per param group, the name of each parameter among `live`; `unnamed.<group>.<index>` for any other."""
    names = {id(parameter): name for name, parameter in live.items()}
    return [
        [names.get(id(parameter), f"unnamed.{g}.{i}") for i, parameter in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


def clean(name: str) -> str:
    """The parameter's name without what torch.compile puts in front."""
    return name.replace("_orig_mod.", "")


def beginnings(prefix: str = "") -> tuple[str, ...]:
    """How the names of the tensors of one optimizer begin, see `capture`."""
    return tuple(f"{prefix}{word}." for word in ("state", "group", "rest"))


def capture(
    optimizer: Any, live: Mapping[str, torch.Tensor], prefix: str = ""
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(JSON, tensors). The tensors are the live ones: write them before the next step.

    prefix: of their names, where the states of several optimizers share a file.
    """
    inner = plain(optimizer)
    names = parameter_names(inner, live)
    flat = [name for group in names for name in group]
    state = inner.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values = {
        flat[index]: tree.encode(entry, tensors, f"{prefix}state.{flat[index]}")
        for index, entry in state["state"].items()
    }
    groups = encoded_groups(state["param_groups"], names, tensors, prefix)
    rest = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    return {
        "class": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "state": values,
        "groups": groups,
        "rest": tree.encode(rest, tensors, f"{prefix}rest"),
    }, tensors


def encoded_groups(
    groups: Iterable[Mapping[str, Any]], names: Iterable[list[str]], tensors: dict[str, torch.Tensor], prefix: str = ""
) -> list[dict[str, Any]]:
    """JSON of the param groups, whose parameters have these names; tensors in it are put into `tensors`."""
    return [
        {"names": own, "values": tree.encode(_hyper(group), tensors, f"{prefix}group.{number}")}
        for number, (group, own) in enumerate(zip(groups, names, strict=True))
    ]


def _hyper(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def fits(optimizer: Any, live: Mapping[str, torch.Tensor], saved: Mapping[str, Any]) -> list[list[str]]:
    """The names of the optimizer's parameters, by group. Raises Incompatible where what was saved is for others."""
    inner = plain(optimizer)
    kind = f"{type(inner).__module__}.{type(inner).__qualname__}"
    if kind != saved["class"]:
        raise Incompatible(
            f"the checkpoint holds the state of {saved['class']}, the run uses {kind}",
            hint="use the same `optim`, or allow_missing=['optimizer', 'scheduler'] to start it afresh",
        )
    names = parameter_names(inner, live)
    _same_parameters(names, [group["names"] for group in saved["groups"]])
    return names


def renamed(
    optimizer: Any, live: Mapping[str, torch.Tensor], saved: Mapping[str, Any], match: Match, models: Iterable[str] = ()
) -> dict[str, Any]:
    """What was saved, for the parameters of a model that isn't quite the saved one; new ones begin without state.

    models: names of models whose parameters are called `<model>.<name>`; patterns are about the name alone.

    Raises Incompatible for differences that `match` doesn't allow.
    """
    names = parameter_names(plain(optimizer), live)
    if len(names) != len(saved["groups"]):
        raise Incompatible(
            f"the optimizer has {len(names)} parameter groups, in the checkpoint it has {len(saved['groups'])}",
            hint="build the groups in the same way, or allow_missing=['optimizer', 'scheduler'] to start it afresh",
        )
    before = [name for group in saved["groups"] for name in group["names"]]
    now = [name for group in names for name in group]
    pairs: dict[str, str] = {}
    for start in (*(f"{model}." for model in models), ""):
        mine, before = _begin_with(start, before)
        ours, now = _begin_with(start, now)
        pairs |= {start + here: start + name for here, name in match.pair(mine, ours, "the optimizer").items()}
    return {
        **saved,
        "groups": [{**group, "names": now} for group, now in zip(saved["groups"], names, strict=True)],
        "state": {here: saved["state"][name] for here, name in pairs.items() if name in saved["state"]},
    }


def _begin_with(start: str, names: list[str]) -> tuple[list[str], list[str]]:
    """(what follows `start` in the names that have it, the other names)"""
    return [n.removeprefix(start) for n in names if n.startswith(start)], [n for n in names if not n.startswith(start)]


def restore(
    optimizer: Any, live: Mapping[str, torch.Tensor], saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Load into `optimizer`, which keeps `tensors` as its own: nobody else may use them any more.

    Raises Incompatible, before anything is changed, where the parameters differ.
    """
    inner = plain(optimizer)
    names = fits(optimizer, live, saved)
    position = {name: index for index, name in enumerate(name for group in names for name in group)}
    state = {position[name]: tree.decode(entry, tensors) for name, entry in saved["state"].items()}
    groups = []
    for group, group_names in zip(saved["groups"], names, strict=True):
        numbers = [position[name] for name in group_names]
        groups.append({**tree.decode(group["values"], tensors), "params": _numbers(numbers)})
    inner.load_state_dict({**tree.decode(saved["rest"], tensors), "state": state, "param_groups": groups})
    _undo_casts(inner, state)


def _numbers(numbers: list[int]) -> Sequence[int]:
    """torch looks for each parameter in its group for each of its tensors: in a list, that is quadratic."""
    if len(numbers) < MANY:
        return numbers
    whole = range(numbers[0], numbers[0] + len(numbers))
    return whole if numbers == list(whole) else numbers


def _same_parameters(live: list[list[str]], saved: list[list[str]]) -> None:
    if live == saved:
        return
    mine = {name for group in live for name in group}
    theirs = {name for group in saved for name in group}
    if mine == theirs:
        what = "the same parameters, in other groups or in another order"
    else:
        what = f"new: {some(mine - theirs)}; gone: {some(theirs - mine)}"
    raise Incompatible(
        f"the optimizer's parameters differ from those in the checkpoint ({what})",
        hint="train the same parameters (frozen layers, LoRA targets), or allow_missing=['optimizer', 'scheduler']",
    )


def _undo_casts(inner: torch.optim.Optimizer, state: Mapping[int, Any]) -> None:
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for index, entry in state.items():
        live = inner.state.get(parameters[index])
        if not isinstance(live, dict) or not isinstance(entry, Mapping):
            continue
        for key, value in entry.items():
            got = live.get(key)
            if (
                isinstance(value, torch.Tensor)
                and isinstance(got, torch.Tensor)
                and got is not value
                and not same_bits(got, value)
            ):
                live[key] = value.to(got.device)
