"""Everything of ours that reads bytes which somebody else may have written, as functions of these bytes.

Each target takes any bytes and a directory to put them into, and returns if they were read or refused as documented;
whatever else happens is a bug. Shared by tests/test_fuzz.py (hypothesis) and tests/coverage_guided.py (atheris).
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

import seeds
from lastgood import formula, rev, units
from lastgood.convert import dcp as dcp_import
from lastgood.convert import managed, pickles
from lastgood.doctor import arguments
from lastgood.doctor import log as doctor_log
from lastgood.errors import CorruptCheckpoint, LastgoodError, NoCheckpoint, NotSupported, UsageError
from lastgood.format import archive, inert
from lastgood.format import manifest as codec
from lastgood.format import tensors as safetensors
from lastgood.format.manifest import safe_name
from lastgood.layouts import accelerate, dcp, lightning, scan, trainer
from lastgood.repo import after, journal, leases, metrics, pins, poison, request, trail
from lastgood.repo.layout import HIDDEN, boot
from lastgood.repo.lock import RunLock, at_work, described
from lastgood.repo.read import records
from lastgood.repo.run import read_head, read_policy, read_run
from lastgood.state import tree
from lastgood.weights import adapter
from seeds import unchanged

Feed = Callable[[bytes, Path], None]


@dataclass(frozen=True)
class Target:
    """feed: gives it some bytes. seeds: bytes that the real writers wrote. text: it reads text, not a file."""

    name: str
    feed: Feed
    seeds: tuple[bytes, ...]
    text: bool = False


TARGETS: dict[str, Target] = {}


def target(*known: bytes, text: bool = False) -> Callable[[Feed], Feed]:
    def add(feed: Feed) -> Feed:
        TARGETS[feed.__name__] = Target(feed.__name__, feed, known, text)
        return feed

    return add


def try_one(name: str, data: bytes, folder: Path) -> None:
    """Feed it in an empty directory; nothing there may be changed by reading."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    TARGETS[name].feed(data, folder)


def refused(error: LastgoodError, *names: str) -> None:
    """An error says what to do for people: a text of a bearable length, that names the file."""
    text = str(error)
    assert not names or any(name in text for name in names), text[:300]
    assert len(text) < 20_000, len(text)


def put(folder: Path, place: str, data: bytes) -> Path:
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# ---- targets -------------------------------------------------------------------------------


def sealed(data: bytes) -> bytes:
    """With a digest that is right, as an attacker would write it."""
    body = data.rstrip().removesuffix(b"}").rstrip(b" ,\n") + b",\n "
    return body + f'"digest": "{blake3(body).hexdigest()}"\n}}\n'.encode()


@target(codec.encode(seeds.MANIFEST))
def manifest(data: bytes, folder: Path) -> None:
    bare = data.rpartition(b'"digest"')[0] or data
    for text in (data, sealed(data), sealed(bare)):
        for read in (codec.decode, codec.outline):
            try:
                found = read(text, "lastgood.json")
            except CorruptCheckpoint as error:
                refused(error, "lastgood.json")
                continue
            assert len(found.id) == 16 and found.step >= 0 and found.seq >= 1
            assert all(safe_name(name) and entry.size >= 0 for name, entry in found.files.items())
            assert not any(os.path.isabs(name) or ".." in name.split("/") for name in found.files)


@target(codec.encode(seeds.MANIFEST))
def checkpoint(data: bytes, folder: Path) -> None:
    """The same in a run that is listed."""
    put(folder, "checkpoint-500/model.safetensors", bytes(10))
    put(folder, "checkpoint-500/sub/resume.json", b"{}")
    put(folder, "checkpoint-500/lastgood.json", sealed(data.rpartition(b'"digest"')[0] or data))
    put(folder, f"{HIDDEN}/run.json", b'{"format": 1, "run": "' + b"b" * 16 + b'"}')
    with unchanged(folder):
        assert [record.name for record in records(folder)] == ["checkpoint-500"]


@target(seeds.TENSORS)
def tensors(data: bytes, folder: Path) -> None:
    path = put(folder, "x.safetensors", data)
    for read in (
        safetensors.read_header,
        safetensors.load,
        lambda p: safetensors.decode(p, memoryview(bytearray(data))),
    ):
        try:
            found: Any = read(path)
        except CorruptCheckpoint as error:
            refused(error, "x.safetensors")
            continue
        slots = found.slots.values() if isinstance(found, safetensors.Header) else ()
        assert sum(slot.end - slot.begin for slot in slots) <= len(data)


@target(seeds.LIGHTNING, seeds.OPTIMIZER)
def zipped(data: bytes, folder: Path) -> None:
    path = put(folder, "x.ckpt", data)
    for full in (False, True):
        assert isinstance(archive.check(path, full=full), str)
    archive.is_archive(path)
    try:
        loaded = archive.load(path)
    except CorruptCheckpoint as error:
        refused(error, "x.ckpt")
        return
    for _, ref in archive.tensors(loaded):
        assert 0 <= ref.begin <= ref.limit <= len(data)
        archive.number(ref)


@target(pickle.dumps({"a": [1, (2.5, None)], "b": {"c"}}, 2), pickle.dumps(Path("x"), 4))
def pickled(data: bytes, folder: Path) -> None:
    try:
        inert.bounded(inert.loads(data, "x.pkl"), 1 << 20)
    except CorruptCheckpoint as error:
        refused(error)


@target(seeds.LIGHTNING, seeds.OPTIMIZER, seeds.PLAIN)
def unpickled(data: bytes, folder: Path) -> None:
    """By torch's own loader for plain data."""
    with suppress(CorruptCheckpoint, NotSupported):
        pickles.load_bytes(data, "x.pt")


@target(seeds.LINES, seeds.TRAIL, b'{"step": 2, "metrics": {"eval_loss": 1.5, "x": "nan"}}\n')
def lines(data: bytes, folder: Path) -> None:
    for name in ("journal.jsonl", "trail.jsonl", f"metrics/{'a' * 16}.jsonl"):
        put(folder, f"{HIDDEN}/{name}", data)
    with unchanged(folder):
        assert all(isinstance(event, dict) for event in journal.read(folder))
        for life in trail.read(folder):
            assert life.number >= 0 and all(entry.step >= 0 for entry in life.entries)
        assert all(type(value) is float for value in metrics.read(folder, "a" * 16).values())


@target(b'{"' + b"a" * 16 + b'": ["good", "pinned"]}', b'{"' + b"a" * 16 + b'": "a text"}')
def said(data: bytes, folder: Path) -> None:
    """Pins, notes, marks, and what an evaluation left: what can't be read must hold, not free."""
    for name in ("pins.json", "notes.json", "poisoned.json", f"metrics/{'a' * 16}.after.json"):
        put(folder, f"{HIDDEN}/{name}", data)
    with unchanged(folder):
        for read in (pins.read, poison.read):
            with suppress(ValueError):  # as documented: a CorruptCheckpoint for those who change them
                assert all(isinstance(id, str) for id in read(folder))
        try:
            pins.readable(folder)
        except CorruptCheckpoint as error:
            refused(error, "pins.json")
        poison.marks(folder)
        assert all(isinstance(text, str) for text in pins.read_notes(folder).values())
        after.read(folder, "a" * 16)


@target(
    b'{"format": 1, "run": "bbbb"}', b'{"run": "bbbb", "lineage": [[1, 3]], "next": 4}', b'{"last": 3, "monitor": "x"}',
    b'{"host": "h", "pid": 5, "start": "1", "boot": "b", "since": 1.5, "command": "x", "nonce": "00"}',
    b'{"host": "h", "pid": 5, "until": 1.5, "seconds": 60.0, "boot": null, "uptime": 5.0, "beat": 1}',
)  # fmt: skip
def small(data: bytes, folder: Path) -> None:
    """run.json, head.json, policy.json, lock.json, leases, requests."""
    import socket

    lease = f"leases/{'a' * 16}.00000000"
    here = data.replace(b'"h"', json.dumps(socket.gethostname()).encode()).replace(b'"b"', json.dumps(boot()).encode())
    for name in ("run.json", "head.json", "policy.json", "lock.json", lease, request.SAVE):
        put(folder, f"{HIDDEN}/{name}", here)
    with unchanged(folder):
        run = read_run(folder)
        read_head(folder, run)
        assert isinstance(read_policy(folder), dict)
        lock = RunLock(folder)
        assert isinstance(described(lock.holder()), str)
        lock.held_by_another()
        at_work(folder)
        assert all(isinstance(reason, str) for reason in leases.in_force(folder).values())
        assert records(folder) == ()


@target(seeds.STATE, b'{"weight_map": {"w": "a.safetensors"}}', b'{"r": 2, "lora_alpha": 4, "peft_type": "LORA"}')
def stock(data: bytes, folder: Path) -> None:
    """A Trainer's checkpoint: its state, the index of its shards, an adapter's settings."""
    home = folder / "checkpoint-2"
    names = ("trainer_state.json", "model.safetensors.index.json", "adapter_config.json", "config.json")
    for name in names:
        put(home, name, data)
    put(home, "adapter_model.safetensors", seeds.LORA)
    with unchanged(folder):
        found = trainer.look(home)
        assert isinstance(found.step, int)
        assert all(type(value) is float and math.isfinite(value) for value in found.metrics.values())
        trainer.problems(home, full=True)
        trainer.history(home)
        trainer.inspect(home)
        scan.scan(folder)
        with suppress(LastgoodError):
            adapter.Adapter.open(home)


@target(seeds.LIGHTNING, seeds.OPTIMIZER)
def foreign(data: bytes, folder: Path) -> None:
    """Archives and pickles where other tools have them."""
    home = folder / "checkpoint-2"
    for name in ("training_args.bin", "optimizer.pt", "random_states_0.pkl"):
        put(home, name, data)
    put(home, "model.safetensors", seeds.TENSORS)
    put(folder, "x.ckpt", data)
    with unchanged(folder):
        assert isinstance(trainer.arguments(home), dict)
        for full in (False, True):
            trainer.problems(home, full=full)
            accelerate.problems(home, full=full)
            lightning.problems(folder / "x.ckpt", full=full)
        accelerate.look(home)
        lightning.look(folder / "x.ckpt")


@target(seeds.METADATA)
def distributed(data: bytes, folder: Path) -> None:
    home = folder / "step-2"
    put(home, "__0_0.distcp", seeds.DATA)
    put(home, ".metadata", data)
    with unchanged(folder):
        try:
            dcp.read(home)
        except CorruptCheckpoint as error:
            refused(error, ".metadata")
        dcp.look(home)
        for full in (False, True):
            dcp.problems(home, full=full)
        with suppress(CorruptCheckpoint, NotSupported):
            dcp_import.read(home)


@target(
    b'{"format": 1, "optimizer": {"class": "", "state": {"w": {"step": 3}}, "groups": [{"names": ["w"], "values": {"lr": 1}}],'
    b' "rest": {}}, "scheduler": {"a": {"$tuple": [1, {"$float": "nan"}]}}, "scaler": null, "rng": null, "data": null,'
    b' "callbacks": [], "progress": {"global_step": 3, "epoch": 1.0}}',
    b'{"$map": [[{"$bytes": "AA=="}, {"$scalar": ["<f4", "AAAAAA=="]}], [1, {"$array": ["<f4", [1], "AAAAAA=="]}]]}',
    b'{"a": {"$dtype": "float16"}, "b": {"$device": "cpu"}, "c": {"$set": [1]}, "d": {"$tensor": "w"}}',
)  # fmt: skip
def resume(data: bytes, folder: Path) -> None:
    """resume.json, what it says in words that JSON hasn't, and a whole checkpoint of ours as an export reads it."""
    with suppress(ValueError, RecursionError):
        value = json.loads(data)
        with suppress(CorruptCheckpoint):
            tree.decode(value, {})
    put(folder, "model.safetensors", seeds.TENSORS)
    for name in ("resume.json", "tensors.json"):
        put(folder, name, data)
    with unchanged(folder), suppress(CorruptCheckpoint, NotSupported):
        managed.read(folder, None)


@target(b'{"save_steps": 5, "output_dir": "x"}', b"train:\n  save_steps: 5\n", text=True)
def settings(data: bytes, folder: Path) -> None:
    for name in ("x.json", "x.yaml"):
        path = put(folder, name, data)
        try:
            assert isinstance(arguments.load(path), dict)
        except UsageError as error:
            refused(error, name)


@target(
    b"Traceback (most recent call last):\n  File \"x.py\", line 1, in <module>\n    f()\nValueError: no\n{'loss': 1.5}\n",
    text=True,
)
def console(data: bytes, folder: Path) -> None:
    doctor_log.read(data)
    doctor_log.read(data.decode(errors="replace"))


@target(b"latest~2", b"best:loss:min", b"step:2", b"good", b"0000", text=True)
def names(data: bytes, folder: Path) -> None:
    """Revisions, tags and names of metrics."""
    text = data.decode(errors="replace")
    try:
        assert rev.resolve(text, seeds.RECORDS) in seeds.RECORDS
    except (NoCheckpoint, UsageError) as error:
        refused(error)
    try:
        assert pins.check_name(text) == text
    except UsageError as error:
        refused(error)
    else:
        assert text.isprintable() and ".." not in text and not text.startswith(("-", "/", "."))
    with suppress(UsageError):
        metrics.checked(text, 1.0)
    safe_name(text)


@target(b"1.5 GiB", b"90m", b"300ms", b"10Gb/s", text=True)
def quantities(data: bytes, folder: Path) -> None:
    text = data.decode(errors="replace")
    for parse in (units.parse_size, units.parse_duration, units.parse_rate):
        with suppress(ValueError):  # as documented
            assert 0 <= parse(text) < math.inf


@target(b"0.5*mmlu + 0.5*gsm8k", b"max(a, -b)/(2 - log(c))", text=True)
def formulas(data: bytes, folder: Path) -> None:
    try:
        found = formula.parse(data.decode(errors="replace"))
    except UsageError as error:
        refused(error)
        return
    for value in (0.0, 1e308, -1.0):
        result = None if found is None else found.value(lambda name, value=value: value)
        assert result is None or math.isfinite(result)
