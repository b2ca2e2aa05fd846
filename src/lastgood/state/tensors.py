"""One torch tensor <-> the bytes of one safetensors entry, bit for bit, and its digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from blake3 import blake3

from lastgood.errors import NotSupported
from lastgood.format.tensors import CODES, Tensor

CODE_OF: dict[torch.dtype, str] = {getattr(torch, name): code for name, code in CODES.items() if hasattr(torch, name)}
DTYPE_OF: dict[str, torch.dtype] = {code: dtype for dtype, code in CODE_OF.items()}


def to_bytes(name: str, tensor: torch.Tensor) -> Tensor:
    """The entry for `tensor`; a contiguous CPU tensor is not copied, so write it before it changes.

    Raises NotSupported, with the tensor's name, for what could not be read back bit-identically.
    """
    plain = tensor.detach()
    code = CODE_OF.get(plain.dtype)
    if code is None or plain.layout is not torch.strided or plain.is_quantized:
        kind = f"dtype {plain.dtype}, layout {plain.layout}"
        raise NotSupported(
            f"tensor {name!r} ({kind}) can't be stored bit-identically",
            hint="make it a dense tensor of a standard dtype, or take it out of the state that is saved",
        )
    if plain.is_meta:
        raise NotSupported(f"tensor {name!r} has no data (meta device)", hint="materialise the model before saving")
    plain = plain.resolve_conj().resolve_neg().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy().data.cast("B")
    return Tensor(name=name, dtype=code, shape=tuple(plain.shape), data=data)


def from_bytes(entry: Tensor) -> torch.Tensor:
    """A CPU tensor that shares memory with `entry.data`, which has to be writable."""
    dtype = DTYPE_OF.get(entry.dtype)
    if dtype is None:
        raise NotSupported(f"tensor {entry.name!r} has dtype {entry.dtype}, which this torch does not know")
    if len(entry.data) == 0:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(entry.data, dtype=torch.uint8).view(dtype).reshape(entry.shape)


def digest(tensor: torch.Tensor, name: str = "") -> str:
    """`dtype[shape]:hash` of the values: two tensors with the same digest hold the same bits."""
    entry = to_bytes(name, tensor)
    hasher = blake3(entry.data, max_threads=blake3.AUTO) if len(entry.data) > 1 << 20 else blake3(entry.data)
    return f"{signature(tensor)}:{hasher.hexdigest(length=16)}"


def signature(tensor: torch.Tensor) -> str:
    """`dtype[shape]`, the first half of a digest."""
    return f"{CODE_OF.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)}"


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of dtype, shape and every bit (NaN equals NaN, 0.0 differs from -0.0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    mine = left.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return torch.equal(mine, right.detach().cpu().contiguous().reshape(-1).view(torch.uint8))


def ready(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether `to_bytes` copies none of them: then all may be asked for at once."""
    return all(t.is_cpu and t.is_contiguous() and not (t.is_conj() or t.is_neg()) for t in tensors)


def named(tensors: Mapping[str, torch.Tensor]) -> list[Tensor]:
    """Entries in the order given."""
    return [to_bytes(name, tensor) for name, tensor in tensors.items()]
