"""What doesn't fit: mismatches as the libraries print them, and what a checkpoint says about its model. Pure looks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.format.inert import Node
from lastgood.format.tensors import Slot
from lastgood.model import Record

MISFIT = (
    r"size mismatch for \S+|You set .ignore_mismatched_sizes. to .False."
    r"|tensors of another shape or dtype than the checkpoint's: "
)
"""How torch's load_state_dict, transformers' from_pretrained and a managed resume end where shapes differ."""

MISSING_LINE = r"There were missing keys in the checkpoint model loaded: \[(.*)\]"
SURPLUS_LINE = r"There were unexpected keys in the checkpoint model loaded: \[(.*)\]"
HARMLESS = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|attn\.bias|position_ids)$")
"""Buffers that older versions saved and newer ones compute."""
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

SHAPING = (
    "model_type", "architectures", "vocab_size", "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer",
    "num_layers", "intermediate_size", "n_inner", "d_ff", "num_attention_heads", "n_head", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "n_positions", "type_vocab_size", "num_labels", "num_local_experts",
    "num_experts", "tie_word_embeddings",
)  # fmt: skip
"""Keys of config.json that decide which tensors there are, and of what shape."""

_TORCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape (?:torch\.Size\()?\[([\d, ]*)\]\)? from checkpoint,"
    r" the shape in current model is (?:torch\.Size\()?\[([\d, ]*)\]"
)
_REPORT = re.compile(
    r"^(\S[^|\n]*?)\s*\|\s*MISMATCH\s*\|.*?ckpt: (?:torch\.Size\()?\[([\d, ]*)\]\)?"
    r" vs model:\s?(?:torch\.Size\()?\[([\d, ]*)\]",
    re.MULTILINE,
)
_OURS = re.compile(r"(\S+) \(\w+\[([\d, ]*)\] saved, \w+\[([\d, ]*)\] here\)")
_NAMED = re.compile(r"(?:checkpoint|step)[-_]\d+(?:\.[0-9a-f]{8})?|[\w=.-]+\.ckpt")
_TRAINABLE = re.compile(r"trainable params:\s*([\d,]{1,24})|Number of trainable parameters = ([\d,]{1,24})")


class Misfit(NamedTuple):
    """A tensor whose shape in the checkpoint isn't that in the model being built."""

    name: str
    saved: tuple[int, ...]
    now: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {list(self.saved)} in the checkpoint, {list(self.now)} in the model being built"


class Optimizer(NamedTuple):
    """A torch optimizer's state as it lies in a file: groups and the state of each parameter."""

    file: str
    groups: tuple[Mapping[Any, Any], ...]
    state: Mapping[Any, Mapping[Any, Any]]

    @property
    def counts(self) -> tuple[int, ...]:
        """Parameters in each group."""
        return tuple(len(p) if isinstance(p := group.get("params"), list) else 0 for group in self.groups)

    @property
    def kind(self) -> str:
        """Its class, as far as the names of its settings tell; "" if they don't."""
        keys = {key for group in self.groups for key in group if isinstance(key, str)}
        held = {key for entry in self.state.values() for key in entry if isinstance(key, str)}
        if "state1" in held:
            return "bitsandbytes"
        if "clip_threshold" in keys or "scale_parameter" in keys:
            return "Adafactor"
        if "betas" in keys:
            return "Adam" if "eps" in keys else "Lion"
        marks = {"centered": "RMSprop", "lr_decay": "Adagrad", "nesterov": "SGD", "rho": "Adadelta"}
        return next((name for key, name in marks.items() if key in keys), "")


def mismatches(text: str) -> list[Misfit]:
    """Every mismatch that a message or transformers' table of them names."""
    found = [*_TORCH.finditer(text), *_REPORT.finditer(text), *_OURS.finditer(text)]
    told = [Misfit(m.group(1).strip(), _extents(m.group(2)), _extents(m.group(3))) for m in found]
    return [misfit for misfit in told if misfit.saved != misfit.now]


def misfits_of(case: Case, text: str) -> list[Misfit]:
    """Those of an exception, and where it only points to a table "above", those of the table."""
    return mismatches(text) or (mismatches(case.log.text) if case.log is not None else [])


def quoted(text: str) -> list[str]:
    """The names in a list of quoted ones."""
    return re.findall(r"[\"']([^\"']+)[\"']", text)


def listed(text: str, what: str) -> list[str]:
    """Names after "Missing key(s) in state_dict: " and the like."""
    match = re.search(rf"{what} key\(s\) in state_dict: (.*)", text)
    return quoted(match.group(1)) if match else []


def some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def subject(case: Case) -> Record | None:
    """The checkpoint that a log is about: the one it names last, else the one that a resume takes."""
    disk = case.disk
    if disk is None:
        return None
    if case.log is not None:
        by_name = {record.name.rpartition("/")[2]: record for record in disk.records}
        for name in reversed(_NAMED.findall(case.log.text)):
            if name in by_name:
                return by_name[name]
    return disk.good or disk.newest


def own(disk: Disk) -> list[Record]:
    """The checkpoints to look at closely that lie on the way that the run is on now, by step."""
    return sorted((r for r in disk.close if r.current), key=lambda record: (record.step, record.seq))


def config(disk: Disk, record: Record, name: str = "config.json") -> Mapping[str, Any]:
    """A configuration, with what a model of text and images says about its text; {} if there is none."""
    value = disk.json(record, name)
    return flat(value) if isinstance(value, dict) else {}


def flat(value: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = value.get("text_config")
    return {**inner, **value} if isinstance(inner, dict) else value


def shaping(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in SHAPING if values.get(key) is not None}


def different(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """`key: left, right` for each key that both have with another value."""
    shared = [key for key in mine if key in theirs and plain(mine[key]) != plain(theirs[key])]
    return [f"{key}: {plain(mine[key])}, {plain(theirs[key])}" for key in shared]


def plain(value: Any) -> Any:
    """Lists of names count whatever their order."""
    if isinstance(value, (list, tuple, set)):
        return ", ".join(sorted(str(item)[:100] for item in value))
    return str(value)[:200] if isinstance(value, (str, dict)) else value


def weights(disk: Disk, record: Record) -> dict[str, Slot]:
    """Name -> slot of every tensor in the checkpoint's model files."""
    found: dict[str, Slot] = {}
    for name in disk.files(record):
        if fnmatchcase(name, "model*.safetensors"):
            found.update(disk.header(record, name))
    return found


def elements(slots: Mapping[str, Slot]) -> int:
    return sum(math.prod(slot.shape) for slot in slots.values())


def optimizer(disk: Disk, record: Record) -> Optimizer | None:
    """The optimizer's state of a checkpoint of transformers or accelerate, if it is one file."""
    for name in ("optimizer.pt", "optimizer.bin"):
        tree = disk.pickled(record, name) if name in disk.files(record) else None
        if not isinstance(tree, dict):
            continue
        groups, state = tree.get("param_groups"), tree.get("state")
        if isinstance(groups, list) and isinstance(state, dict):
            entries = {key: entry for key, entry in state.items() if isinstance(entry, dict)}
            return Optimizer(name, tuple(group for group in groups if isinstance(group, dict)), entries)
    return None


def names_in(tree: Any, limit: int = 100_000) -> set[str]:
    """module.name of every class and function that a pickle names and that isn't plain data."""
    found: set[str] = set()
    pending = [tree]
    while pending and limit > 0:
        limit -= 1
        value = pending.pop()
        if isinstance(value, Node):
            found.add(value.name)
            pending += [value.args, value.items, value.pairs, value.state]
        elif isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            pending += value
        elif isinstance(value, type) and isinstance(name := getattr(value, "inert", None), str):
            found.add(name)
    return found


def trainable(case: Case) -> int | None:
    """The number of trainable parameters that the log gives last; None if it doesn't."""
    found = None if case.log is None else [*_TRAINABLE.finditer(case.log.text)]
    return int((found[-1].group(1) or found[-1].group(2)).replace(",", "") or 0) if found else None


def version(text: object) -> tuple[int, ...]:
    """(5, 23) of "5.23.0"; () for what is no version."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", text) if isinstance(text, str) else None
    return (int(match.group(1)), int(match.group(2))) if match else ()


def archives(disk: Disk, record: Record) -> Iterator[str]:
    """Files of torch.save that hold more than weights."""
    patterns = ("rng_state*.pth", "optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin", "scheduler.bin",
                "random_states_*.pkl", "training_args.bin", "custom_checkpoint_*.pkl", "*.ckpt")  # fmt: skip
    for name in sorted(disk.files(record)):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name


def held(disk: Disk, record: Record, name: str) -> Any:
    """The tree in one of these; a checkpoint that is one file is that file."""
    path = disk.path(record)
    if path.name == name and path.is_file():
        from lastgood.errors import CorruptCheckpoint
        from lastgood.format import archive

        try:
            return archive.load(path)
        except (CorruptCheckpoint, OSError):
            return None
    return disk.pickled(record, name)


def _extents(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip().isdigit() and len(part) < 19)
