"""Many small tensors: gathered into blocks, and the same bits as one by one."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood.errors import UsageError
from lastgood.format import tensors as safetensors
from lastgood.format.tensors import Tensor
from lastgood.repo import draft
from lastgood.state import quick
from lastgood.state.tensors import CODE_OF, SMALL, named, to_bytes
from lastgood.store.memory import Arena

ODD = [b"\x00\x00\xa1\x7f", b"\x00\x00\x00\x80", b"\x01\x00\xc0\xff"]
"""A signalling NaN, minus zero, a NaN with a payload: what a copy by value could change."""


def like(dtype: torch.dtype, shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    count = 4 * (dtype.itemsize * (torch.Size(shape).numel() + 2) // 4 + 1)
    data = bytearray((ODD[seed % 3] * count)[: count * 4])
    if dtype is torch.bool:
        data = bytearray(b & 1 for b in data)
    flat = torch.frombuffer(data, dtype=torch.uint8)[: dtype.itemsize * torch.Size(shape).numel()]
    tensor = flat.clone().view(dtype).reshape(shape) if flat.numel() else torch.empty(shape, dtype=dtype)
    if kind == "transposed" and tensor.dim() == 2:
        tensor = tensor.t()
    if kind == "part" and tensor.dim() and tensor.shape[0] > 1:
        tensor = tensor[1:]
    if kind == "trained" and dtype.is_floating_point and dtype.itemsize > 1:
        tensor = torch.nn.Parameter(tensor)
    if kind == "conjugate" and dtype.is_complex:
        tensor = tensor.conj()
    return tensor


one = st.builds(
    like,
    st.sampled_from(sorted(CODE_OF, key=str)),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from(["plain", "transposed", "part", "trained", "conjugate"]),
    st.integers(0, 2),
)


@given(st.lists(one, max_size=12))
@settings(max_examples=60)
def test_I9_a_block_of_small_tensors_holds_the_bits_that_each_has(some: list[torch.Tensor]) -> None:
    tensors = {f"t{number}": tensor for number, tensor in enumerate(some)}
    tensors["large"] = torch.arange(SMALL, dtype=torch.float32)
    entries = list(named(tensors))
    assert entries == [to_bytes(name, tensor) for name, tensor in tensors.items()]
    assert [entry.name for entry in entries] == list(tensors)


def test_I9_what_a_block_holds_does_not_change_with_the_tensor() -> None:
    tensor = torch.ones(3)
    (entry,) = named({"a": tensor})
    tensor.zero_()
    assert entry.data == struct.pack("<3f", 1, 1, 1)


@given(st.lists(st.sampled_from([0, 1, 100, 65_535, 65_536, 200_000]), max_size=30))
@settings(max_examples=30)
def test_I9_a_file_is_the_same_however_its_bytes_are_gathered(sizes: list[int]) -> None:
    entries = [Tensor(f"t{n:02}", "U8", (size,), memoryview(bytes([n]) * size)) for n, size in enumerate(sizes)]
    count, chunks = safetensors.encode(entries)
    pieces = [bytes(chunk) for chunk in chunks]
    content = b"".join(pieces)
    assert len(content) == count
    assert content.endswith(b"".join(bytes(entry.data) for entry in safetensors.ordered(entries)))
    assert len(pieces) <= 2 + 2 * sum(size >= safetensors.SMALL for size in sizes) + sum(sizes) // safetensors.GATHERED


@given(st.lists(st.sampled_from([0, 1, 100, draft.SMALL - 1, draft.SMALL, draft.GATHERED + 1]), max_size=60))
@settings(max_examples=30)
def test_I9_what_is_copied_side_by_side_is_what_each_was(sizes: list[int]) -> None:
    data = [bytearray([n]) * size for n, size in enumerate(sizes)]
    entries = [Tensor(f"t{n}", "U8", (len(one),), memoryview(one)) for n, one in enumerate(data)]
    copies = list(draft.kept(iter(entries), Arena(budget=1 << 28)))
    assert copies == entries
    for one in data:
        one[:] = b"\xff" * len(one)
    assert [bytes(copy.data) for copy in copies] == [bytes([n]) * size for n, size in enumerate(sizes)]


@given(st.dictionaries(st.text(), st.lists(st.integers(0, 1 << 62)), max_size=8))
def test_I9_the_beginning_of_a_file_is_what_json_makes_of_it(header: dict[str, Any]) -> None:
    start = safetensors.header_bytes(header)
    (count,) = struct.unpack("<Q", start[:8])
    assert len(start) == 8 + count
    assert len(start) % safetensors.ALIGNED == 0
    assert start[8:].rstrip() == json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(value)
def test_I9_json_of_many_names_is_what_json_makes_of_it(value: Any) -> None:
    assert json.loads(quick.dumps(value)) == value
    assert json.loads(quick.dumps({"of json": msgspec.Raw(json.dumps(value).encode()), "odd": "\ud800"})) == {
        "of json": value, "odd": "\ud800",
    }  # fmt: skip
    assert quick.loads(quick.dumps(value)) == value
    assert quick.loads(json.dumps(value).encode()) == value


def test_what_json_alone_reads_is_read_by_json() -> None:
    assert math.isnan(quick.loads(b"[NaN]")[0])
    assert quick.loads(b"[1e400]") == [math.inf]
    with pytest.raises(ValueError, match="char 1"):
        quick.loads(b"{")
    with pytest.raises(RecursionError):
        quick.loads(b"[" * 100_000)
    with pytest.raises(TypeError, match="set has no word"):
        quick.dumps([{1}, "\ud800"])


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (Tensor("a", "F7", (1,), memoryview(b"1")), "no word for"),
        (Tensor("a", "U8", (2,), memoryview(b"1")), "not those of its shape"),
        (Tensor("b", "U8", (1,), memoryview(b"1")), "two tensors are called 'b'"),
        (Tensor("__metadata__", "U8", (1,), memoryview(b"1")), "two tensors are called '__metadata__'"),
    ],
)
def test_what_no_file_can_hold_is_told_before_it_is_written(entry: Tensor, told: str) -> None:
    good = Tensor("b", "U8", (1,), memoryview(b"1"))
    for asked in (safetensors.check, safetensors.encode):
        with pytest.raises(UsageError, match=told):
            asked([good, entry])
