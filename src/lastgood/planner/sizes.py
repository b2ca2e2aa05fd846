"""How many bytes one checkpoint takes: weights, optimizer state, masters and everything that lies beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from lastgood.errors import UsageError, wrong_type
from lastgood.format import guard
from lastgood.format.tensors import SIZES
from lastgood.planner.containers import Entry, archive_size, safetensors_size, weights_size
from lastgood.planner.optim import Optimizer, Slot, dtype_code, optimizer
from lastgood.planner.tensor import Model, Tensor

Writer = Literal["lastgood", "trainer"]
Shard = Literal["none", "zero1", "zero2", "zero3", "fsdp"]

SPLIT: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    **dict.fromkeys(("zero1", "zero2"), frozenset({"optimizer", "master"})),
    **dict.fromkeys(("zero3", "fsdp"), frozenset({"optimizer", "master", "weights"})),
}
"""The parts of which each rank writes its share; the others are written by rank 0."""

# Bytes of files whose size depends on next to nothing, as transformers 5.23, peft 0.21 and this version write them.
RNG_FILE, RNG_JSON = 14_400, 3 * 13_600 + 400  # JSON: now, at the start of the epoch, before the next batch
SCHEDULER_FILE, SCHEDULER_JSON = 1_470, 200
STATE_FILE, LOG_ROW = 1_100, 150  # trainer_state.json, and what each entry of its log adds
ARGUMENTS_FILE = 5_300
MANIFEST, MANIFEST_ADAPTER = 5_330, 1_300
ADAPTER_FILES = 6_400  # README.md and adapter_config.json


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What is trained and how, as far as it decides about bytes.

    dtype: of the weights that are trained and saved (with the Trainer's bf16=True they stay what they were loaded as,
    often fp32). master: "fp32" if the optimizer works on a copy of the trained weights and its state is in that dtype.
    lora_targets: ends of module names, or "all-linear". optim: a name of TrainingArguments(optim=...), "muon",
    "sgd_momentum". shard: how `world_size` ranks share what they write.
    """

    train: Literal["full", "lora"] = "full"
    optim: str = "adamw"
    dtype: str = "bf16"
    master: str | None = None
    lora_r: int = 16
    lora_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    lora_dtype: str = "fp32"
    world_size: int = 1
    shard: Shard = "none"


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes. parts: those of a full checkpoint by part. full, weights: of a full and of a weights-only checkpoint.

    per_rank: the most that one rank writes for a full checkpoint. notes: how it was reckoned, in words.
    """

    parts: Mapping[str, int]
    full: int
    weights: int
    per_rank: int
    params: int
    trainable: int
    notes: tuple[str, ...] = ()


class _Kept(NamedTuple):
    """A tensor that is saved: its name in the files, its name in the live model, its dtype code."""

    saved: str
    live: str
    tensor: Tensor
    dtype: str


def sizes(model: Model, training: Training, *, writer: Writer = "lastgood") -> Sizes:
    """What checkpoints of `model` take when `writer` ("trainer" is the stock Trainer) writes them.

    Raises UsageError for an option that can't be, and for LoRA targets that the model doesn't have.
    """
    _checked(training, writer)
    lora = training.train == "lora" and not model.adapter
    kind = optimizer(training.optim)
    code = dtype_code("lora_dtype", training.lora_dtype) if lora else dtype_code("dtype", training.dtype)
    master = None if training.master is None else dtype_code("master", training.master)
    if master is not None and SIZES[master] <= SIZES[code]:
        master = None  # what is trained is that wide already: no library makes a second copy
    kept = _adapter(model, training, code) if lora else _as_it_is(model, code)
    trained = [one for one in kept if one.tensor.trained]
    states = [(one, kind.states(one.tensor, master or one.dtype)) for one in trained]
    copies = [(one, (*slots, Slot("master", master, one.tensor.shape))) for one, slots in states] if master else states
    measure = _trainer_state if writer == "trainer" else _lastgood_state
    state = measure(states)
    parts = {
        "weights": weights_size(
            (Entry(one.saved, one.dtype, one.tensor.shape) for one in kept), ours=writer == "lastgood"
        ),
        "optimizer": state,
        "master": measure(copies) - state if master else 0,
        **_small(model, kept if lora else (), lora or model.adapter, writer, training),
    }
    parts["beside"] = model.beside + (ADAPTER_FILES if lora or model.adapter else 0)
    only_full = {"optimizer", "master", "scheduler", "rng"}
    split = SPLIT[training.shard]
    one_rank = {**parts, "rng": parts["rng"] // training.world_size}
    return Sizes(
        parts={name: size for name, size in parts.items() if size},
        full=sum(parts.values()),
        weights=sum(size for name, size in parts.items() if name not in only_full),
        per_rank=sum(-(-size // training.world_size) if name in split else size for name, size in one_rank.items()),
        params=model.params,
        trainable=sum(one.tensor.count for one in trained),
        notes=tuple(_notes(model, training, kind, trained, master, copies)),
    )


def _checked(training: Training, writer: str) -> None:
    if writer not in ("lastgood", "trainer"):
        raise wrong_type("writer", writer, '"lastgood" or "trainer"')
    if training.train not in ("full", "lora"):
        raise wrong_type("train", training.train, '"full" or "lora"')
    if training.shard not in SPLIT:
        raise wrong_type("shard", training.shard, "one of " + ", ".join(SPLIT))
    targets: object = training.lora_targets
    if isinstance(targets, str) and targets != "all-linear":
        raise wrong_type("lora_targets", targets, '"all-linear" or a list of module names')
    for name in ("lora_r", "world_size"):
        value = getattr(training, name)
        if type(value) is not int or value < 1:
            raise wrong_type(name, value, "a whole number of at least 1")


def _as_it_is(model: Model, code: str) -> list[_Kept]:
    """What is saved of the model itself; a live one says which tensors, and in which dtype each."""
    return [
        _Kept(tensor.name if tensor.stored is None else tensor.stored, tensor.name, tensor, tensor.dtype or code)
        for tensor in (*model.tensors, *model.buffers)
        if tensor.stored != ""
    ]


# ---- LoRA --------------------------------------------------------------------------------


def _adapter(model: Model, training: Training, code: str) -> list[_Kept]:
    """A (r x in) and B (out x r) for each target; a Conv1D's weight is (in x out), which has as many elements."""
    found = []
    for tensor in _targets(model, training):
        module = "base_model.model." + tensor.name.removesuffix(".weight")
        rows, columns = tensor.shape
        for letter, shape in (("A", (training.lora_r, columns)), ("B", (rows, training.lora_r))):
            saved, live = f"{module}.lora_{letter}.weight", f"{module}.lora_{letter}.default.weight"
            found.append(_Kept(saved, live, Tensor(live, shape, False), code))
    return found


def _targets(model: Model, training: Training) -> list[Tensor]:
    fits = [tensor for tensor in model.tensors if tensor.linear and len(tensor.shape) == 2]
    wanted = training.lora_targets
    if wanted == "all-linear":  # PEFT leaves out the output head
        targets = [tensor for tensor in fits if tensor.role != "head"]
        missing: list[str] = []
    else:
        hits = {name: [t for t in fits if f".{t.name}".endswith(f".{name}.weight")] for name in wanted}
        chosen = {tensor.name for found in hits.values() for tensor in found}
        targets = [tensor for tensor in fits if tensor.name in chosen]
        missing = [name for name, found in hits.items() if not found]
    if missing or not targets:
        ends = dict.fromkeys(tensor.name.split(".")[-2] for tensor in fits)
        raise UsageError(
            f"{model.name} has no linear module called {', '.join(missing) or 'anything'}",
            hint=f"its linear modules: {', '.join(ends) or 'none'}",
        )
    return targets


# ---- files -------------------------------------------------------------------------------

States = Sequence[tuple[_Kept, tuple[Slot, ...]]]


def _trainer_state(states: States) -> int:
    """optimizer.pt: one record for each storage, shared ones once, and a pickle that says how they belong together."""
    records, shared = [], set()
    for _, slots in states:
        for slot in slots:
            if slot.key not in shared:
                records.append(slot.size)
            shared |= {slot.key} if slot.shared else set()
    tensors = sum(len(slots) for _, slots in states)
    return archive_size("optimizer", records, 500 + 70 * tensors + 8 * len(states))


def _lastgood_state(states: States) -> int:
    """optimizer.safetensors, and what resume.json says about it: by name, tables as often as they are used."""
    entries = [Entry(f"state.{one.live}.{slot.key}", slot.dtype, slot.shape) for one, slots in states for slot in slots]
    text = 800
    for one, slots in states:
        text += len(one.live) + 4  # in its group, and then with its state
        text += len(one.live) + 31 if slots else 0
        text += sum(len(one.live) + 2 * len(slot.key) + 30 for slot in slots)
    return safetensors_size(entries, ours=True) + text


def _small(model: Model, added: Sequence[_Kept], lora: bool, writer: Writer, training: Training) -> dict[str, int]:
    """The parts that hold no weights and no state of theirs. added: an adapter that the model doesn't have yet."""
    if writer == "trainer":
        return {
            "scheduler": SCHEDULER_FILE,
            "rng": RNG_FILE * training.world_size,
            "progress": STATE_FILE,
            "arguments": ARGUMENTS_FILE,
        }
    there = (*model.tensors, *model.buffers)
    live = [("base_model.model." if added else "") + tensor.name for tensor in there] + [one.live for one in added]
    shapes = [tensor.shape for tensor in there] + [one.tensor.shape for one in added]
    digests = sum(len(name) + len(str(list(shape))) + 51 for name, shape in zip(live, shapes, strict=True))
    guards = sum(len(guard.content(name)) for name in guard.NAMES)
    return {
        "scheduler": SCHEDULER_JSON,
        "rng": RNG_JSON * training.world_size,
        "progress": STATE_FILE,
        "manifest": MANIFEST + (MANIFEST_ADAPTER if lora else 0) + digests + guards,
    }


# ---- in words ----------------------------------------------------------------------------


def _notes(
    model: Model,
    training: Training,
    kind: Optimizer,
    trained: Sequence[_Kept],
    master: str | None,
    copies: States,
) -> Iterable[str]:
    count = sum(one.tensor.count for one in trained)
    if model.adapter:
        yield f"the adapter alone is trained and saved: {count:,} of {model.params:,} parameters; the base model isn't"
    elif training.train == "lora":
        part = count / max(1, model.params)
        yield (
            f"LoRA of rank {training.lora_r} on {len(trained) // 2} modules: {count:,} of {model.params:,} parameters"
            f" ({part:.2%}) are trained and saved; the base model isn't"
        )
    codes = list(dict.fromkeys(one.dtype for one in trained))
    each = f", {SIZES[codes[0]]} B each" if len(codes) == 1 else ""
    yield f"weights: {count:,} parameters in {' and '.join(map(_word, codes))}{each}"
    slots = [slot for _, found in copies for slot in found if slot.key != "master" and math.prod(slot.shape) > 1]
    keys = list(dict.fromkeys(slot.key for slot in slots))
    share = sum(slot.size for slot in slots) / max(1, count)
    dtypes = " and ".join(dict.fromkeys(_word(slot.dtype) for slot in slots))
    yield f"{kind.name}: {', '.join(keys)} in {dtypes}, {share:.3g} B a parameter" if keys else f"{kind.name}: no state"
    if master is not None:
        yield f"a copy of the trained weights in {_word(master)}: {SIZES[master]} B a parameter"
    elif training.master is not None:
        yield f"no copy in {training.master}: the trained weights are in {_word(codes[0])} already"
    if training.world_size > 1 and SPLIT[training.shard]:
        what = _parts(training, master)
        yield f"{training.shard}: each of {training.world_size} ranks writes its share of the {what}"
    elif training.world_size > 1:
        yield f"rank 0 writes for all {training.world_size} ranks; each adds its random state"


def _parts(training: Training, master: str | None) -> str:
    names = [name for name in ("weights", "optimizer", "master") if name in SPLIT[training.shard]]
    return " and ".join(name for name in names if name != "master" or master is not None)


_WORDS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F64": "fp64", "U8": "8 bits"}


def _word(code: str) -> str:
    return _WORDS.get(code, code)
