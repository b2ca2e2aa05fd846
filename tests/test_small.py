"""Many small tensors: gathered into blocks, and the same bits as one by one."""

from __future__ import annotations

import struct

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood.format import tensors as safetensors
from lastgood.format.tensors import Tensor
from lastgood.state.tensors import CODE_OF, SMALL, named, to_bytes

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
