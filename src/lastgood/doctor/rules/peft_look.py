"""What the rules about adapters look for: settings that differ, forms that don't fit, weights that never moved."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.log import Raised
from lastgood.doctor.rule import Sight
from lastgood.doctor.rules import fit
from lastgood.doctor.rules.version_optimizer import WITH_ADAPTER
from lastgood.format.tensors import Slot
from lastgood.model import Record

FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.|$)")
TARGETS = ("target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "bias", "use_dora")
"""Settings of an adapter that decide which tensors it has."""
RANKS = ("r", "rank_pattern")
COMPARED = 64 << 20
"""Bytes of two adapters that are compared; they differ in the first few if anything was trained."""

GIVEN_RANK = ("lora_r", "lora_rank", "r")
GIVEN_TARGETS = ("lora_target_modules", "lora_target", "target_modules")
"""What configuration files of TRL, axolotl and LLaMA-Factory call these."""


def settings(disk: Disk, record: Record) -> Mapping[str, Any]:
    """adapter_config.json of a checkpoint, {} if it has no adapter."""
    value = disk.json(record, fit.ADAPTER_CONFIG)
    return value if isinstance(value, dict) else {}


def tensors(disk: Disk, record: Record) -> Mapping[str, Slot]:
    return disk.header(record, fit.ADAPTER) if fit.ADAPTER in disk.files(record) else {}


def described(case: Case) -> tuple[str, ...]:
    """The adapter that a log is about, in one line."""
    record = fit.subject(case)
    if case.disk is None or record is None:
        return ()
    values = settings(case.disk, record)
    if not values:
        return ()
    shown = [f"{key} {fit.plain(values[key])}" for key in ("r", "lora_alpha", *TARGETS) if values.get(key)]
    return (f"{record.name}/{fit.ADAPTER_CONFIG}: {'; '.join(shown)}",)


def adapters(disk: Disk) -> list[tuple[Record, Mapping[str, Any]]]:
    """The newest checkpoints that hold an adapter, with its settings, by step."""
    return [(record, values) for record in fit.own(disk) if (values := settings(disk, record))]


def nothing_trainable(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """The log says that nothing is trained."""
    record = fit.subject(case)
    adapter = case.disk is not None and record is not None and bool(settings(case.disk, record))
    if fit.trainable(case) == 0 and (adapter or case.disk is None):
        yield Sight(
            saw=case.log.line_of(match) if case.log is not None else match.group(),
            evidence=("the log says before: trainable params: 0", *described(case)),
            fix=WITH_ADAPTER,
        )


def never_moved(case: Case) -> Iterator[Sight]:
    """Two checkpoints with the same adapter, byte for byte: between them nothing was trained."""
    if case.disk is None:
        return
    for (before, _), (after, _) in itertools.pairwise(adapters(case.disk)):
        if before.step < after.step and _same(case.disk, before, after):
            yield Sight(
                saw=f"{fit.ADAPTER} is the same in {before.name} and {after.name}",
                where=after.name,
                evidence=_empty_optimizer(case.disk, after),
                means=f"nothing was trained from step {before.step} to {after.step}, and the loss shows the base model",
            )


def _same(disk: Disk, before: Record, after: Record) -> bool:
    sizes = [disk.files(record).get(fit.ADAPTER) for record in (before, after)]
    if sizes[0] is None or sizes[0] != sizes[1]:
        return False
    entries = [
        record.manifest.files.get(fit.ADAPTER) if record.manifest is not None else None for record in (before, after)
    ]
    known = [entry for entry in entries if entry is not None and entry.hash]
    if len(known) == 2 and known[0].kind == known[1].kind:
        return known[0] == known[1]
    if not tensors(disk, before):
        return False
    return _alike(disk.path(before) / fit.ADAPTER, disk.path(after) / fit.ADAPTER)


def _alike(left: Path, right: Path) -> bool:
    try:
        with open(left, "rb") as mine, open(right, "rb") as theirs:
            for _ in range(COMPARED >> 20):
                piece = mine.read(1 << 20)
                if piece != theirs.read(1 << 20):
                    return False
                if not piece:
                    return True
    except OSError:
        return False
    return True


def _empty_optimizer(disk: Disk, record: Record) -> tuple[str, ...]:
    found = fit.optimizer(disk, record)
    empty = found is not None and not sum(found.counts)
    return (f"{record.name}/{found.file} has no parameters in it",) if found is not None and empty else ()


def other_rank(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """The factors have another inner size; if the outer one differs it's another base."""
    misfits = [m for m in fit.misfits_of(case, raised.text) if FACTOR.search(m.name)]
    pairs = [(m, *ranks) for m in misfits if (ranks := _ranks(m)) is not None]
    if pairs:
        first, saved, now = pairs[0]
        values = sorted({(before, after) for _, before, after in pairs})
        alpha = _alpha(case)
        yield Sight(
            saw=f"{first.name} has rank {saved} in the checkpoint, {now} in the model being built",
            evidence=(*(f"rank {a} saved, {b} now" for a, b in values[1:4]), *described(case)),
            fix=(f"LoraConfig(r={saved}{alpha}, ...), as it was saved", *OTHER_RANK),
        )
    elif misfits and all(len(m.saved) == len(m.now) == 2 for m in misfits):
        yield Sight(
            saw=str(misfits[0]),
            evidence=described(case),
            means="the ranks agree and the outer sizes don't: the adapter was trained on another base model",
            fix=("the base that adapter_config.json names: base_model_name_or_path",),
        )


OTHER_RANK = ("or a new output_dir, to train an adapter of another rank from the start",)


def _ranks(misfit: fit.Misfit) -> tuple[int, int] | None:
    """(saved, now) if nothing but the rank differs: lora_A is [r, in], lora_B is [out, r]."""
    side = FACTOR.search(misfit.name)
    if side is None or len(misfit.saved) != len(misfit.now) or len(misfit.saved) < 2:
        return None
    inner = 0 if side.group(1) == "A" else 1
    same = all(a == b for at, (a, b) in enumerate(zip(misfit.saved, misfit.now, strict=True)) if at != inner)
    return (misfit.saved[inner], misfit.now[inner]) if same else None


def _alpha(case: Case) -> str:
    record = fit.subject(case)
    alpha = settings(case.disk, record).get("lora_alpha") if case.disk is not None and record is not None else None
    return f", lora_alpha={alpha}" if isinstance(alpha, (int, float)) else ""


def rank_to_come(case: Case) -> Iterator[Sight]:
    """Another rank in checkpoints of one run, or in the arguments of the next."""
    yield from _changed(case, RANKS, "the adapter's rank changed within the run")
    saved, record = _saved(case)
    given = next((case.arguments[key] for key in GIVEN_RANK if key in case.arguments), None)
    rank = saved.get("r")
    if record is not None and not case.recorded and type(given) is type(rank) is int and given != rank:
        yield Sight(
            saw=f"the arguments say rank {given}, {fit.ADAPTER_CONFIG} says {rank}",
            where=record.name,
            fix=(f"r={rank}, as it was saved", *OTHER_RANK),
        )


def other_targets(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Another number of trainable parameters than the adapter has, or tensors that peft misses."""
    record = fit.subject(case)
    if lacks := match.groupdict().get("lacks"):
        if raised.passed("set_peft_model_state_dict") or not raised.frames:
            yield Sight(
                saw=f"the checkpoint's adapter has no {lacks}, which the one being built trains (modules_to_save)",
                evidence=described(case),
                fix=("LoraConfig(modules_to_save= as in adapter_config.json of the checkpoint)",),
            )
        return
    if match.re.groups and match.groups()[-1] is not None:
        names = fit.quoted(match.group(1))
        modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name})
        lost = f"for {fit.some(modules)}" if modules else f": {fit.some(names, 3)}"
        yield Sight(
            saw=f"{len(names)} tensors of the adapter aren't in the checkpoint, {lost}".replace(", :", ":"),
            evidence=described(case),
            means="these start afresh, as if nothing had been trained; their part of the adapter does nothing yet",
        )
        return
    now = fit.trainable(case)
    if case.disk is None or record is None or not now:
        return
    held = fit.elements(tensors(case.disk, record))
    if held and now != held:
        yield Sight(
            saw=f"{now:,} parameters are trained now, {held:,} are in the adapter of {record.name}",
            evidence=described(case),
        )


def targets_to_come(case: Case) -> Iterator[Sight]:
    yield from _changed(case, TARGETS, "the adapter changed within the run")
    saved, record = _saved(case)
    given = next((case.arguments[key] for key in GIVEN_TARGETS if key in case.arguments), None)
    targets = saved.get("target_modules")
    if isinstance(given, str) and "," in given:
        given = [part.strip() for part in given.split(",")]
    if record is None or case.recorded or not isinstance(given, (list, tuple)) or not isinstance(targets, list):
        return
    if "all-linear" not in given and "all" not in given and fit.plain(given) != fit.plain(targets):
        yield Sight(
            saw=f"the arguments name {fit.plain(given)}, {fit.ADAPTER_CONFIG} has {fit.plain(targets)}",
            where=record.name,
        )


def _changed(case: Case, keys: tuple[str, ...], what: str) -> Iterator[Sight]:
    for (before, mine), (after, theirs) in itertools.pairwise(adapters(case.disk) if case.disk is not None else []):
        lines = fit.different({key: mine[key] for key in keys if key in mine}, theirs)
        if lines:
            yield Sight(
                saw=f"{what}, from {before.name} to {after.name}: {'; '.join(lines)}",
                where=after.name,
                severity="warning",
            )


def _saved(case: Case) -> tuple[Mapping[str, Any], Record | None]:
    record = case.disk.good if case.disk is not None else None
    values = settings(case.disk, record) if case.disk is not None and record is not None else {}
    return values, record if values else None


def into_bare(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """An adapter is loaded into a model that has none."""
    record = fit.subject(case)
    if (
        case.disk is not None
        and record is not None
        and not settings(case.disk, record)
        and not tensors(case.disk, record)
    ):
        return
    saw = case.log.line_of(match) if case.log is not None else match.group()
    yield Sight(saw=saw, evidence=described(case))


def full_into_adapter(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """A whole model is loaded into one with an adapter: every name has another prefix."""
    names = fit.quoted(match.group(1)) if match.re.groups else fit.listed(raised.text, "Missing")
    wrapped = [name for name in names if name.startswith("base_model.model.")]
    if not wrapped or len(wrapped) < len(names) or all("lora_" in name for name in wrapped):
        return
    evidence = []
    record = fit.subject(case)
    if case.disk is not None and record is not None:
        held = fit.weights(case.disk, record)
        if held:
            evidence.append(f"{record.name} holds {len(held)} tensors of a whole model: {fit.some(sorted(held), 2)}")
        if not settings(case.disk, record):
            evidence.append(f"{record.name} has no {fit.ADAPTER_CONFIG}")
    yield Sight(
        saw=f"{len(wrapped)} tensors are missing, each with the prefix base_model.model.: {fit.some(wrapped, 2)}",
        evidence=tuple(evidence),
    )


def hollow_log(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    hollow = [m for m in fit.misfits_of(case, raised.text) if FACTOR.search(m.name) and _hollow(m.saved)]
    if "invalid shape" in match.group():
        yield Sight(saw=case.log.line_of(match) if case.log is not None else match.group())
    elif hollow:
        yield Sight(saw=f"{len(hollow)} tensors of the adapter were saved empty: {hollow[0]}", evidence=described(case))


def hollow(case: Case) -> Iterator[Sight]:
    for record, _ in adapters(case.disk) if case.disk is not None else ():
        assert case.disk is not None
        names = [n for n, slot in tensors(case.disk, record).items() if FACTOR.search(n) and _hollow(slot.shape)]
        names = [name for name in names if not name.endswith(".bias")]
        if names:
            yield Sight(
                saw=f"{len(names)} tensors of the adapter are empty or flat: {fit.some(names, 3)}",
                where=record.name,
                means="this checkpoint can't be loaded; what was trained is in none of its files",
            )


def _hollow(shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or 0 in shape


def does_nothing(case: Case) -> Iterator[Sight]:
    """Every B of the adapter is zero: base + B @ A is the base."""
    for record, _ in adapters(case.disk)[-1:] if case.disk is not None else ():
        assert case.disk is not None
        slots = tensors(case.disk, record)
        sides = {name: match.group(1) for name in slots if (match := FACTOR.search(name))}
        changing = [slots[name] for name, side in sides.items() if side == "B"]
        if record.step < 2 or not changing or len(sides) != len(slots):
            continue
        if not _moved(case.disk.path(record) / fit.ADAPTER, changing):
            yield Sight(
                saw=f"all {len(changing)} lora_B of the adapter are zero at step {record.step}",
                where=record.name,
                means="merged into its base it gives the base again; nothing was trained, or other weights were saved",
                fix=("model.print_trainable_parameters() before training; is_trainable=True for a loaded adapter",),
            )


def _moved(path: Path, slots: list[Slot]) -> bool:
    try:
        with open(path, "rb") as file:
            for slot in slots:
                file.seek(slot.begin)
                left = slot.end - slot.begin
                while left and (piece := file.read(min(left, 1 << 20))):
                    if any(piece):
                        return True
                    left -= len(piece)
    except OSError:
        return True
    return False


def no_gradient(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """What else the log says decides between frozen inputs and nothing to train."""
    text = case.log.text if case.log is not None else ""
    checkpointing = "None of the inputs have requires_grad=True" in text or "gradient_checkpointing=True" in text
    yield Sight(
        saw=match.group(),
        evidence=("the log says before: None of the inputs have requires_grad=True",) if checkpointing else (),
        means="gradient checkpointing cuts the way back: its inputs come from a frozen embedding"
        if checkpointing
        else "nothing that the loss depends on is trained, or gradient checkpointing cuts the way back;"
        " model.print_trainable_parameters() decides: 0 is the first",
        fix=CHECKPOINTING if checkpointing else (*CHECKPOINTING, WITH_ADAPTER[0]),
    )


CHECKPOINTING = (
    "model.enable_input_require_grads(), before get_peft_model",
    "gradient_checkpointing_kwargs=dict(use_reentrant=False)",
)
