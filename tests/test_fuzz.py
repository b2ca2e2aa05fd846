"""Every parser against any bytes: an error of ours or an answer, never anything else, never a write, never a bomb.

Each target runs in a process of its own with a gigabyte and a minute: what grows fails the test and not the machine.
`./scripts/fuzz` looks longer, with other examples each time; `./scripts/fuzz --atheris` goes by coverage.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bombs import bombs
from parsers import TARGETS, try_one

import cli
import forked

MEMORY, SECONDS = 1 << 30, 60
PATHS = (
    "/etc/passwd", "..", "../x", "a/../../x", "a\0b", "a\\..\\b", "C:/x", "CON", "a.", "a ", "x" * 4096, "e\u0301", "\u00e9",
    "A", "a", "\ud800", "\x1b[2J", "-rf", "@{", "x.lock", "", ".", "\u202e", "x/" * 600,
)  # fmt: skip
NUMBERS = (
    0,
    -1,
    2**31,
    2**53,
    2**62,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**4000,
    float("nan"),
    float("inf"),
    1e308,
    -0.0,
    True,
)
LEAVES = st.sampled_from([*PATHS, *NUMBERS, None, [], {}, [[]], {"": 0}, "nan", "inf"])
WORDS = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"\xff\xfe", b"\0", b'{"a":1,"a":2}', b"[" * 2000, b"\xed\xa0\x80",
    b"../", b"\\", b"\x80\x04", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\xff" * 8, bytes(64), b"\n", b"~", b"e", b".",
    b"true", b"null", b'"format": 99', b"R", b"b", b"(", b"t", b"cos\nsystem\n", b"&a *a", b"!!python/object:os.system ",
)  # fmt: skip


@st.composite
def damaged(draw: Any, seeds: tuple[bytes, ...]) -> bytes:
    """One that a real writer wrote, after a few accidents."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        size = len(data)
        near = st.integers(0, min(300, size))
        at = draw(st.one_of(near, near.map(lambda n, size=size: size - n), st.integers(0, size)))
        length = draw(st.sampled_from([0, 1, 2, 8, 64, 4096]))
        kind = draw(st.sampled_from(["flip", "cut", "zeros", "word", "bytes", "twice", "number"]))
        if kind == "flip" and at < size:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + length if draw(st.booleans()) else size]
        elif kind == "zeros":
            data[at : at + length] = bytes(length)
        elif kind == "word":
            data[at : at + length] = draw(st.sampled_from(WORDS))
        elif kind == "bytes":
            data[at : at + length] = draw(st.binary(max_size=16))
        elif kind == "twice":
            data[at:at] = data[at : at + length]
        elif kind == "number":
            data[at : at + 8] = draw(st.sampled_from([0, 1, 2**31, 2**62, 2**63, 2**64 - 1])).to_bytes(8, "little")
    return bytes(data)


@st.composite
def twisted(draw: Any, seeds: tuple[bytes, ...]) -> bytes:
    """JSON as it was written, with other values, and other keys, in a few places."""
    lines = [_json(line) for seed in seeds for line in (seed, *seed.split(b"\n"))]
    known = [value for value in lines if isinstance(value, (dict, list)) and value]
    if not known:
        return draw(st.binary(max_size=50))
    value = draw(st.sampled_from(known))
    for _ in range(draw(st.integers(1, 3))):
        value = _twist(draw, value)
    return json.dumps(value).encode(errors="surrogatepass") + b"\n"


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _twist(draw: Any, value: Any) -> Any:
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.sampled_from(["value", "value", "inside", "key", "gone"]))
        rest = {k: v for k, v in value.items() if k != key}
        if kind == "key":
            return {**rest, draw(st.sampled_from(PATHS)): value[key]}
        return rest if kind == "gone" else {**value, key: draw(LEAVES) if kind == "value" else _twist(draw, value[key])}
    if isinstance(value, list) and value:
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _twist(draw, value[at]), *value[at + 1 :]]
    return draw(LEAVES)


def limited(function: Callable[..., Any], *args: Any) -> None:
    """In this process, with so much more memory and time, and no more digits in a number than Python comes with."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    function(*args)


def fuzz(name: str, folder: Path, examples: int) -> None:
    known = TARGETS[name].seeds

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(damaged(known), damaged(known), twisted(known), st.binary(max_size=100)))
    def examine(data: bytes) -> None:
        try_one(name, data, folder)

    for seed in known:
        try_one(name, seed, folder)
    examine()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("name", TARGETS)
def test_I22_I7_any_bytes_are_read_or_refused(name: str, quick: Path) -> None:
    (quick / "work").mkdir()
    status = forked.run(limited, fuzz, name, quick / "work", 40, log=quick / "log", timeout=300)
    assert status == 0, (quick / "log").read_text()[-6000:]


def blow(folder: Path, name: str) -> None:
    for number, (target, data) in enumerate(bombs()):
        if target == name:
            print(f"bomb {number}: {len(data)} bytes, {data[:40]!r}", flush=True)
            try_one(target, data, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("name", sorted({name for name, _ in bombs()}))
def test_I22_no_bomb_goes_off(name: str, quick: Path) -> None:
    (quick / "work").mkdir()
    status = forked.run(limited, blow, quick / "work", name, log=quick / "log", timeout=300)
    assert status == 0, (quick / "log").read_text()[-6000:]


VERBS = (
    ("log",),
    ("log", "--all", "--json"),
    ("show",),
    ("verify", "--full"),
    ("resume", "--check"),
    ("doctor",),
    ("df",),
)
PLACES = (
    ".lastgood/run.json", ".lastgood/head.json", ".lastgood/policy.json", ".lastgood/pins.json", ".lastgood/journal.jsonl",
    ".lastgood/trail.jsonl", ".lastgood/lock.json", ".lastgood/poisoned.json", "checkpoint-2/lastgood.json",
    "checkpoint-2/trainer_state.json", "checkpoint-2/model.safetensors", "checkpoint-2/training_args.bin",
    "checkpoint-2/adapter_config.json", "checkpoints/x.ckpt", "step-2/.metadata", "checkpoint_0/random_states_0.pkl",
)  # fmt: skip
SEEDS = tuple(seed for target in TARGETS.values() if not target.text for seed in target.seeds)


def looks(folder: Path, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(PLACES), st.one_of(damaged(SEEDS), twisted(SEEDS), st.binary()), min_size=2))
    def examine(files: dict[str, bytes]) -> None:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        for place, data in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(data)
        before = cli.snapshot(folder)
        for words in VERBS:
            code, out, err = cli.call("-C", folder, *words)
            assert code in (0, 1, 2, 3, 4, 5, 6, 10, 11) and "Traceback" not in err, (words, code, err)
            assert not cli.raw_controls(out + err), (words, out + err)
            assert cli.snapshot(folder) == before, f"{words} changed something"

    examine()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_I22_looking_at_garbage_never_ends_in_a_traceback(quick: Path) -> None:
    status = forked.run(limited, looks, quick / "run", 15, log=quick / "log", timeout=300)
    assert status == 0, (quick / "log").read_text()[-6000:]


FOUND = sorted((Path(__file__).parent / "data" / "found").iterdir())
"""What `./scripts/fuzz --atheris` found, each file called by its target."""


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_I22_what_was_found_once_stays_found(path: Path, tmp_path: Path) -> None:
    try_one(path.name.partition("-")[0], path.read_bytes(), tmp_path)
