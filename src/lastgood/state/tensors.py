"""One torch tensor <-> the bytes of one safetensors entry, bit for bit, and its digest."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from lastgood.errors import NotSupported
from lastgood.format import digests
from lastgood.format.tensors import ALIGNED, CODES, Tensor
from lastgood.store.checksum import NOW, Kind, kind_of

CODE_OF: dict[torch.dtype, str] = {getattr(torch, name): code for name, code in CODES.items() if hasattr(torch, name)}
DTYPE_OF: dict[str, torch.dtype] = {code: dtype for dtype, code in CODE_OF.items()}
SMALL = 1 << 14
"""Bytes (16 KiB) up to which a tensor is copied faster than it is asked for its memory."""
PLAIN = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32})
"""Dtypes of which many small tensors are copied by one call."""
_OF_NUMPY = frozenset({torch.float32, torch.float64, torch.int64, torch.int32})
"""Dtypes of which Python can look at the bytes without torch's help."""
ROW = (1 << 15) - 1
"""Numbers that `torch.cat` copies one behind the other; of more it makes an iterator for each tensor, which takes five
times as long for small ones of different sizes (GRAIN_SIZE in ATen/Parallel.h, cat_out_cpu in TensorShape.cpp)."""


def to_bytes(name: str, tensor: torch.Tensor) -> Tensor:
    """The entry for `tensor`; a contiguous CPU tensor is not copied, so write it before it changes.

    Raises NotSupported, with the tensor's name, for what could not be read back bit-identically.
    """
    plain, code = tensor.detach() if tensor.requires_grad else tensor, code_of(name, tensor)
    if not (plain.is_cpu and plain.is_contiguous()) or plain.is_conj() or plain.is_neg():  # rare: each call costs a bit
        plain = plain.resolve_conj().resolve_neg().cpu().contiguous()
    if plain.dtype in _OF_NUMPY and plain.numel():  # half the time, for nearly every tensor that there is
        data = plain.numpy().data.cast("B")
    else:
        data = plain.reshape(-1).view(torch.uint8).numpy().data
    return Tensor(name, code, tuple(plain.shape), data)


def code_of(name: str, plain: torch.Tensor) -> str:
    """The word for its dtype in a file. Raises NotSupported, as `to_bytes` does."""
    code = CODE_OF.get(plain.dtype)
    if code is None or plain.layout is not torch.strided or plain.is_quantized:
        kind = f"dtype {plain.dtype}, layout {plain.layout}"
        raise NotSupported(
            f"tensor {name!r} ({kind}) can't be stored bit-identically",
            hint="make it a dense tensor of a standard dtype, or take it out of the state that is saved",
        )
    if plain.is_meta:
        raise NotSupported(f"tensor {name!r} has no data (meta device)", hint="materialise the model before saving")
    return code


def from_bytes(entry: Tensor) -> torch.Tensor:
    """A CPU tensor that shares memory with `entry.data`, which has to be writable."""
    dtype = DTYPE_OF.get(entry.dtype)
    if dtype is None:
        raise NotSupported(f"tensor {entry.name!r} has dtype {entry.dtype}, which this torch does not know")
    if len(entry.data) == 0:
        return torch.empty(entry.shape, dtype=dtype)
    flat = torch.frombuffer(entry.data, dtype=dtype)
    return flat if len(entry.shape) == 1 else flat.view(entry.shape)


def in_place(entries: Mapping[str, Tensor], buffer: memoryview) -> dict[str, torch.Tensor]:
    """Tensors of a file that was read into `buffer`, where they are, unless torch would have put them elsewhere.

    Its own memory begins at multiples of 64 bytes. At any other place a library of linear algebra may add up in another
    order, and an optimizer that multiplies its state (LBFGS) would not go on bit for bit. What is moved gives the pages
    that it leaves back at once, so that no two copies of a whole state are in memory.
    """
    base = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() if len(buffer) else 0
    found: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        tensor = from_bytes(entry)
        if tensor.numel() and tensor.data_ptr() % ALIGNED:
            found[name] = tensor.clone()
            _give_back(buffer.obj, tensor.data_ptr() - base, len(entry.data))
        else:
            found[name] = tensor
    return found


def _give_back(memory: object, begin: int, count: int) -> None:
    """The pages that lie inside these bytes alone, of a mapping; it reads as zeros there from then on."""
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + count) // mmap.PAGESIZE * mmap.PAGESIZE
    if isinstance(memory, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and last > first:
        memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def window(tensor: torch.Tensor) -> memoryview:
    """The memory of a dense, contiguous CPU tensor, to be written to."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    plain = tensor.detach()
    return memoryview((plain if plain.dim() else plain.view(1)).view(torch.uint8).numpy().data).cast("B")


def digest(tensor: torch.Tensor, name: str = "", kind: Kind = NOW) -> str:
    """`dtype[shape]:hash` of the values: two tensors with the same digest hold the same bits."""
    return digests.digest(to_bytes(name, tensor), kind)


def holds(tensor: torch.Tensor, want: str) -> bool:
    """Whether this is the digest of its values, by whatever algorithm."""
    return signature(tensor) == want.partition(":")[0] and digest(tensor, kind=kind_of(want)) == want


def by_digest(tensors: Iterable[torch.Tensor], wanted: Iterable[str]) -> dict[str, torch.Tensor]:
    """digest -> tensor, by every algorithm that one of the wanted digests was computed by."""
    kinds = {kind_of(want) for want in wanted}
    return {digest(tensor, kind=kind): tensor for tensor in tensors for kind in kinds}


def signature(tensor: torch.Tensor) -> str:
    """`dtype[shape]`, the first half of a digest."""
    return digests.signature(f"{CODE_OF.get(tensor.dtype, tensor.dtype)}", tensor.shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of dtype, shape and every bit (NaN equals NaN, 0.0 differs from -0.0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    mine = left.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return torch.equal(mine, right.detach().cpu().contiguous().reshape(-1).view(torch.uint8))


@dataclass(frozen=True, slots=True)
class Named:
    """Entries in the order given, one at a time: what has to be brought from a device isn't all there at once.

    Whoever copies them later asks for the tensors themselves. since: the same object as long as this very mapping has
    the same tensors at the same places, where somebody knows that.
    """

    tensors: Mapping[str, torch.Tensor]
    since: object = None

    def surely(self, last: Named | None) -> bool:
        """Whether somebody knows that it is what `last` was."""
        if last is None or self.since is None:
            return False
        return self.tensors is last.tensors and self.since is last.since

    def __iter__(self) -> Iterator[Tensor]:
        small = self.small()
        return (small.get(name) or to_bytes(name, tensor) for name, tensor in self.tensors.items())

    def small(self, limit: int = SMALL) -> dict[str, Tensor]:
        """The small ones on the CPU (`limit` bytes), copied into a block for each dtype.

        To ask torch for the memory of each takes longer than that, and a count of steps, or a bias, of thousands of
        parameters would be most of the time of a save.
        """
        found: dict[str, torch.Tensor] = {}
        for name, tensor in self.tensors.items():
            # Nothing that isn't plain: torch.cat must not have to convert anything.
            plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.dtype in PLAIN and tensor.is_cpu
            if plain and tensor.layout is torch.strided and tensor.nbytes <= limit:
                found[name] = tensor
        return {name: entry for some in in_rows(found) for name, entry in _in_a_row(some)}


named = Named


def in_rows(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """As many of one dtype as one call copies fast; each comes once."""
    waiting: dict[torch.dtype, tuple[dict[str, torch.Tensor], list[int]]] = {}
    for name, tensor in tensors.items():
        some, room = waiting.setdefault(tensor.dtype, ({}, [ROW]))
        if some and tensor.numel() > room[0]:
            yield some
            some, room = waiting[tensor.dtype] = {}, [ROW]
        some[name] = tensor
        room[0] -= tensor.numel()
    yield from (some for some, _ in waiting.values())


def _in_a_row(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Of one dtype."""
    with torch.no_grad():
        block = torch.cat([tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors.values()])
    code, data, at = CODE_OF[block.dtype], block.view(torch.uint8).numpy().data, 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        yield name, Tensor(name, code, tuple(tensor.shape), data[at:end])
        at = end
