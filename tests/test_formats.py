"""safetensors files and manifests: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lastgood.errors import CorruptCheckpoint, NotSupported, UsageError
from lastgood.format import manifest as codec
from lastgood.format import tensors as safetensors
from lastgood.model import FileEntry, Manifest, extend, on_lineage
from lastgood.state import tree
from lastgood.state.tensors import DTYPE_OF, digest, from_bytes, named, same_bits
from lastgood.store import local

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    dtype = DTYPE_OF[draw(st.sampled_from(sorted(DTYPE_OF)))]
    shape = draw(SHAPES)
    size = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype) if size else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


COMMON = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@COMMON
@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), tensors(), max_size=5))
def test_I9_tensors_come_back_bit_for_bit(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    total, chunks = safetensors.encode(named(state), {"format": "pt"})
    entry = local.write(path, chunks)
    assert entry.size == total == path.stat().st_size
    assert local.digest(path) == entry
    found = {name: from_bytes(value) for name, value in safetensors.load(path).items()}
    assert found.keys() == state.keys()
    assert all(same_bits(found[name], state[name]) and digest(found[name]) == digest(state[name]) for name in state)


def test_I9_the_safetensors_library_reads_them(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5, dtype=torch.int8),
        "c": torch.tensor(2.5, dtype=torch.bfloat16),
    }
    _, chunks = safetensors.encode(named(state), {"format": "pt"})
    local.write(tmp_path / "x", chunks)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), state[name]) for name in state)


@pytest.mark.parametrize(
    "header",
    [
        "[]", "{", '{"a":1}', '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}', '{"a":{"dtype":"F32","shape":[4611686018427387904,0],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
        "{" + '"a":' * 3000, '{"__metadata__":{"a":1},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', '{"__metadata__":3}',
    ],
)  # fmt: skip
def test_I22_hostile_headers_are_refused(header: str, tmp_path: Path) -> None:
    text = header.encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CorruptCheckpoint, match="x"):
        safetensors.read_header(tmp_path / "x")


@COMMON
@given(st.binary(max_size=200))
def test_I22_any_bytes_are_refused_or_read(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    try:
        safetensors.load(tmp_path / "x")
    except CorruptCheckpoint:
        pass
    with pytest.raises(CorruptCheckpoint):
        codec.decode(data, "x")


MANIFEST = Manifest(
    format=1, id="a" * 16, run="b" * 16, step=500, seq=3, lineage=((1, 3),), parent="c" * 16, created=1.5,
    parts={"model": ("model.safetensors",), "progress": ("resume.json",)},
    files={"model.safetensors": FileEntry(size=10, xxh3="0" * 32), "resume.json": FileEntry(size=2, blake3="1" * 64)},
    environment={"torch": "2.13.0"}, arguments={"learning_rate": 0.1}, facts={"data": {"length": 3}},
)  # fmt: skip


def test_a_manifest_comes_back() -> None:
    assert codec.decode(codec.encode(MANIFEST), "m") == MANIFEST


@given(st.integers(0), st.integers(0, 7))
def test_I7_a_flipped_bit_in_a_manifest_is_found(position: int, bit: int) -> None:
    data = bytearray(codec.encode(MANIFEST))
    data[position % len(data)] ^= 1 << bit
    try:
        found = codec.decode(bytes(data), "m")
    except CorruptCheckpoint:
        return
    assert found == MANIFEST, "only white space between the fields may change unnoticed"


@given(st.integers(0))
def test_I7_a_cut_manifest_is_found(length: int) -> None:
    data = codec.encode(MANIFEST)
    cut = data[: length % (len(data) - 2)]
    with pytest.raises(CorruptCheckpoint):
        codec.decode(cut, "m")


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "a/../../x", "a//b", "a\\b", "C:x", "x\0", "a/.", "", "lastgood.json", "a.", "a ", "x" * 300, "\x1b[2J"],
)  # fmt: skip
def test_I22_no_file_name_leads_out_of_a_checkpoint(name: str) -> None:
    from blake3 import blake3

    fields = json.loads(codec.encode(MANIFEST))
    fields.pop("digest")
    fields["files"] = {**fields["files"], name: {"size": 1, "blake3": "0" * 64}}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    text = json.dumps({**fields, "digest": blake3(canonical).hexdigest()})
    with pytest.raises(CorruptCheckpoint, match="outside"):
        codec.decode(text.encode(), "m")


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    | st.sampled_from([np.float32(1.5), np.int64(-3), torch.float16, torch.device("cpu")])
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.just("$x"), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(TREES)
def test_I9_python_state_comes_back_with_its_types(value: Any) -> None:
    text = json.dumps(tree.encode(value, {}, "x"), allow_nan=False)
    found = tree.decode(json.loads(text), {})
    assert repr(found) == repr(value)


def test_I9_what_needs_pickle_is_refused_at_the_save_with_its_place() -> None:
    with pytest.raises(NotSupported, match=r"scheduler\.a\.1 .*object"):
        tree.encode({"a": [1, object()]}, {}, "scheduler")
    with pytest.raises(NotSupported, match="sparse"):
        list(named({"sparse": torch.eye(3).to_sparse()}))
    with pytest.raises(UsageError, match=r"twice|two"):
        safetensors.encode([*named({"a": torch.ones(1)}), *named({"a": torch.ones(1)})])


@given(st.lists(st.integers(1, 6), max_size=8))
def test_a_lineage_names_exactly_the_saves_on_the_way(jumps: list[int]) -> None:
    lineage: tuple[tuple[int, int], ...] = ()
    path, seq = [], 0
    for jump in jumps:
        seq += jump
        lineage = extend(lineage, seq)
        path.append(seq)
    assert [n for n in range(seq + 2) if on_lineage(n, lineage)] == path
