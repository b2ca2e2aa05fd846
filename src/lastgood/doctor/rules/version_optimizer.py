"""What the rules look for in the state of optimizers: another class, other parameters, no step."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.log import Raised
from lastgood.doctor.rule import Sight
from lastgood.doctor.rules import fit
from lastgood.errors import CorruptCheckpoint
from lastgood.layouts import dcp
from lastgood.model import Record

GENERIC = ("alpha", "momentum", "sum")
"""Keys of optimizers that other dictionaries have too."""

FAMILIES = (
    (r".*(?:8bit|paged|bnb)", "bitsandbytes"),
    (r"adamw?(?:_|$)", "Adam"),
    (r"adafactor", "Adafactor"),
    (r"sgd$", "SGD"),
    (r"rmsprop$", "RMSprop"),
    (r"adagrad$", "Adagrad"),
    (r"lion", "Lion"),
)
"""Values of `optim` -> what fit.Optimizer calls it."""


def other_optimizer(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    name = match.group(1)
    inside = raised.passed(
        "step", "_init_group", "__setstate__", "load_state_dict", "_get_options", "update_step", "init_state"
    )
    if name is not None and not inside and (raised.frames or name in GENERIC):
        return
    evidence, fix = [], list[str]()
    record = fit.subject(case)
    if case.disk is not None and record is not None:
        found = fit.optimizer(case.disk, record)
        if found is not None:
            held = sorted({str(key) for entry in found.state.values() for key in entry})
            evidence.append(
                f"{record.name}/{found.file} is the state of {found.kind or 'another optimizer'}"
                f" (per parameter: {', '.join(held[:6]) or 'nothing'})"
            )
        optim = case.disk.arguments(record).get("optim")
        if isinstance(optim, str):
            evidence.append(f"{record.name} was saved with optim={optim!r}")
            fix.append(f"optim={optim!r}")
    yield Sight(
        saw=f"the optimizer being used looks for {name!r}, which the saved state doesn't have"
        if name is not None
        else match.group(),
        evidence=tuple(evidence),
        fix=(*fix, *OTHER_OPTIMIZER),
    )


AFRESH = (
    "to change it on purpose: lastgood.manage(trainer, allow_missing=['optimizer', 'scheduler'])",
    "the same without lastgood: resume from a copy of the checkpoint without optimizer.pt and scheduler.pt",
)
OTHER_OPTIMIZER = (
    "the optimizer of the saved run: the same optim=",
    *AFRESH,
)


def family(optim: object) -> str:
    """What `optim` makes, "" if that isn't known."""
    text = str(getattr(optim, "value", optim)).lower().rpartition(".")[2]
    return next((name for pattern, name in FAMILIES if re.match(pattern, text)), "")


def optimizer_to_come(case: Case) -> Iterator[Sight]:
    """The arguments of the next run ask for another optimizer than the one whose state there is."""
    if case.disk is None or case.recorded or "optim" not in case.arguments or case.disk.good is None:
        return
    record = case.disk.good
    found = fit.optimizer(case.disk, record)
    wanted = family(case.arguments["optim"])
    if found is not None and found.kind and wanted and wanted != found.kind:
        optim = case.disk.arguments(record).get("optim")
        yield Sight(
            saw=f"optim={str(case.arguments['optim'])!r}, and {found.file} is the state of {found.kind}",
            where=record.name,
            fix=((f"optim={optim!r}",) if isinstance(optim, str) and family(optim) == found.kind else ())
            + OTHER_OPTIMIZER,
        )


def other_parameters(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Other parameters are trained than when the optimizer was saved: which, as far as files can tell."""
    record = fit.subject(case)
    saw = case.log.line_of(match) if case.log is not None else match.group()
    if case.disk is None or record is None:
        yield Sight(saw=saw)
        return
    adapter = fit.config(case.disk, record, fit.ADAPTER_CONFIG)
    yield Sight(
        saw=saw,
        evidence=tuple(_trained(case.disk, record)),
        fix=WITH_ADAPTER if adapter else (),
        means="the adapter was loaded without is_trainable=True, or its targets changed; what"
        " model.print_trainable_parameters() prints decides: 0 is the first"
        if adapter
        else "",
    )


WITH_ADAPTER = (
    "PeftModel.from_pretrained(base, path, is_trainable=True)",
    "get_peft_model(base, the same LoraConfig as when it was saved), and resume with train()",
)


def _trained(disk: Disk, record: Record) -> Iterator[str]:
    found = fit.optimizer(disk, record)
    adapter = disk.header(record, fit.ADAPTER) if fit.ADAPTER in disk.files(record) else {}
    slots = adapter or fit.weights(disk, record)
    if found is not None:
        groups = " + ".join(map(str, found.counts))
        yield f"{record.name}/{found.file}: {sum(found.counts)} parameters in groups of {groups}"
        # The file has no names, but shapes: what has no state of its shape wasn't trained.
        moments = [
            getattr(entry.get("exp_avg", entry.get("momentum_buffer")), "shape", None) for entry in found.state.values()
        ]
        left = [shape for shape in moments if isinstance(shape, tuple)]
        if slots and len(left) == sum(found.counts):
            frozen = [name for name, slot in slots.items() if not _taken(left, slot.shape)]
            if frozen:
                yield f"not trained when it was saved, by their shapes: {fit.some(frozen)}"
            else:
                yield f"all {len(slots)} tensors of the checkpoint were trained when it was saved"
    if adapter:
        settings = fit.config(disk, record, fit.ADAPTER_CONFIG)
        shown = [f"{key} {fit.plain(settings[key])}" for key in ADAPTER_KEYS if settings.get(key)]
        yield f"{record.name}/{fit.ADAPTER_CONFIG}: {'; '.join(shown)}; {fit.elements(adapter):,} parameters"


ADAPTER_KEYS = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "layers_to_transform")


def _taken(left: list[Any], shape: tuple[int, ...]) -> bool:
    if shape in left:
        left.remove(shape)
        return True
    return False


def without_step(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Three troubles with one message, told apart by where it was raised and by what lies on disk."""
    key = match.groupdict().get("key")
    if key:
        yield from _never_trained(case, key)
        return
    record = fit.subject(case)
    files = [frame.file.replace("\\", "/") for frame in raised.frames]
    in_accelerate = bool(files) and files[-1].endswith("accelerate/accelerator.py")
    in_optimizer = any("/optim/" in file for file in files) or raised.passed("__setstate__", "_init_group")
    lacking = None if case.disk is None or record is None else lacking_step(case.disk, record)
    if in_optimizer or (lacking is not None and not in_accelerate):
        yield _no_step(case, record, lacking)
    elif in_accelerate or (not files and record is not None and record.layout == "accelerate"):
        yield _no_random_states(case, record)
    elif not files:
        yield Sight(
            saw=f"{match.group().strip()}, and no traceback that says where",
            evidence=(f"{record.name}: the optimizer's file has no such gap",) if record is not None else (),
            means="raised in torch/optim: the optimizer's state has no step for each parameter; raised in"
            " accelerator.py: accelerate 0.32 or 0.33 couldn't read the random states; from"
            " torch.distributed.checkpoint: a parameter that never got a gradient",
            fix=("lastgood doctor {root} --log FILE  # with the whole traceback: it decides which of the three it is",),
        )


def _no_step(case: Case, record: Record | None, lacking: str | None) -> Sight:
    path, step = "CHECKPOINT", "STEP"
    if case.disk is not None and record is not None:
        found = fit.optimizer(case.disk, record)
        path = f"{case.disk.path(record)}/{found.file if found else 'optimizer.pt'}"
        number = case.disk.state(record).get("global_step", record.step)
        step = str(number) if type(number) is int and number >= 0 else str(record.step)
    code = (
        f"import torch; p = {path!r}; s = torch.load(p, weights_only=True);"
        f" [v.setdefault('step', torch.tensor({step}.0)) for v in s['state'].values()]; torch.save(s, p)"
    )
    copy = shlex.join(["cp", "-n", path, f"{path}.before"])
    return Sight(
        saw="the optimizer's saved state has no `step` for its parameters",
        evidence=(lacking,) if lacking is not None else (),
        means="another optimizer (apex's FusedAdam keeps one step per group), a converter or an old torch wrote it;"
        " torch's Adam wants a step for each parameter",
        fix=(
            f"{copy} && python -c {shlex.quote(code)}  # puts the step back",
            "resume from {good}, if that is another one",
        ),
    )


def lacking_step(disk: Disk, record: Record) -> str | None:
    """In words, if parameters have Adam's two moments and no step."""
    found = fit.optimizer(disk, record)
    if found is None:
        return None
    moments = [entry for entry in found.state.values() if "exp_avg" in entry and "exp_avg_sq" in entry]
    without = [entry for entry in moments if "step" not in entry]
    if not without:
        return None
    per_group = any("step" in group for group in found.groups)
    return (
        f"{record.name}/{found.file}: {len(without)} of {len(moments)} parameters have exp_avg and exp_avg_sq and no"
        f" step{'; the groups have one, as those of fused optimizers do' if per_group else ''}"
    )


def adam_without_step(case: Case) -> Iterator[Sight]:
    """The same before anything failed; other optimizers than torch's have no step per parameter, and that is right."""
    for record in fit.own(case.disk) if case.disk is not None else ():
        assert case.disk is not None
        found = fit.optimizer(case.disk, record)
        of_torch = found is not None and any("capturable" in group for group in found.groups)
        lacking = lacking_step(case.disk, record) if of_torch else None
        if lacking is not None:
            sight = _no_step(case, record, lacking)
            yield Sight(saw=lacking, where=record.name, means="a resume stops with KeyError: 'step'", fix=sight.fix)


def _no_random_states(case: Case, record: Record | None) -> Sight:
    evidence = []
    if case.disk is not None and record is not None:
        files = [name for name in case.disk.files(record) if name.startswith("random_states_")]
        for name in files[:8]:
            tree = case.disk.pickled(record, name)
            if tree is None:
                evidence.append(f"{record.name}/{name} is no readable archive of torch.save")
            elif not isinstance(tree, dict) or "step" not in tree:
                evidence.append(f"{record.name}/{name} holds no step")
            else:
                odd = sorted(name for name in fit.names_in(tree) if name.startswith("numpy"))
                named = f", and names {fit.some(odd, 2)}, which torch >= 2.6 refuses by itself" if odd else ""
                evidence.append(f"{record.name}/{name} is there and readable, with its step{named}")
        if not files:
            evidence.append(f"{record.name} has no random_states_*.pkl")
    if case.log is not None and "Could not load random states" in case.log.text:
        evidence.append("the log says before: Could not load random states")
    return Sight(
        saw="accelerate looks for the step that it reads from the random states, and couldn't read these",
        evidence=tuple(evidence),
        means="the optimizer is fine: accelerate 0.32 and 0.33 swallow the error about the random states and then miss"
        " the step that came with them",
        fix=(
            "pip install 'accelerate>=0.34'",
            "launch as many processes as when it was saved: each reads random states of its own",
        ),
    )


def _never_trained(case: Case, key: str) -> Iterator[Sight]:
    parameter = key.removesuffix(".step")
    evidence = []
    record = fit.subject(case)
    for names in _indexes(case, record):
        steps = sum(name.endswith(".step") for name in names)
        moments = sorted(name.rpartition(".")[2] for name in names if name.startswith(f"{parameter}.exp_avg"))
        evidence.append(
            f"{steps} parameters have a step in it, this one has {', '.join(moments) if moments else 'no state at all'}"
        )
    yield Sight(
        saw=f"the checkpoint has no optimizer state for {parameter}",
        evidence=tuple(evidence),
        means="the parameter never got a gradient before the save (an expert that was never chosen, an unused head), so"
        " the optimizer had no state for it; the run that loads has one for every parameter",
        fix=(
            "dcp.load(..., planner=DefaultLoadPlanner(allow_partial_load=True)): the parameter starts with fresh state",
            "or leave parameters that get no gradient out of the optimizer, at the save and at the load",
        ),
    )


def _indexes(case: Case, record: Record | None) -> Iterator[list[str]]:
    if case.disk is None or record is None:
        return
    folders = sorted({name.rpartition("/")[0] for name in case.disk.files(record) if name.endswith(".metadata")})
    for folder in folders[:4]:
        try:
            index = dcp.read(case.disk.path(record) / folder)
        except (CorruptCheckpoint, OSError):
            continue
        names = sorted({item.name for item in index.items})
        if any(name.endswith(".step") for name in names):
            yield names


def step_kind(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    record = fit.subject(case)
    evidence = []
    found = fit.optimizer(case.disk, record) if case.disk is not None and record is not None else None
    if found is not None and record is not None:
        numbers = [entry["step"] for entry in found.state.values() if type(entry.get("step")) in (int, float)]
        if numbers:
            many = f"{len(numbers)} of {len(found.state)} parameters"
            evidence.append(f"{record.name}/{found.file}: the step of {many} is a number, {numbers[0]:g}")
    yield Sight(saw=match.group(), evidence=tuple(evidence))
