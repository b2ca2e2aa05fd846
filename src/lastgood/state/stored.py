"""Tensors that are in a file and not in memory: read straight into live ones, and hashed where they arrive."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lastgood.format.digests import signature
from lastgood.format.tensors import Slot, Tensor
from lastgood.state.tensors import DTYPE_OF, from_bytes, window
from lastgood.store import contents, local
from lastgood.store.checksum import Each, Kind, kind_of, of

SMALL = 1 << 16
"""Bytes (64 KiB) below which neighbours in a file are read by one call."""
TOGETHER = 8 << 20
"""Bytes that one thread reads before it takes more work (8 MiB): small tensors by the thousand, large ones alone."""


@dataclass(frozen=True, slots=True)
class Stored:
    """digest: of what the verified file holds there, in the form of tensors.json."""

    path: Path
    name: str
    slot: Slot
    digest: str

    def tensor(self) -> torch.Tensor:
        """A copy in memory, on the CPU. Raises OSError."""
        slot = self.slot
        if slot.dtype not in DTYPE_OF or slot.begin == slot.end:
            return from_bytes(Tensor(self.name, slot.dtype, slot.shape, memoryview(b"")))
        found = torch.empty(slot.shape, dtype=DTYPE_OF[slot.dtype])
        with local.opened(self.path) as file:
            contents.fill(file.fileno(), window(found), slot.begin)
        return found


def open_to(live: torch.Tensor) -> bool:
    """Whether a file can be read into its memory: a dense tensor of this process in the order of its elements."""
    return (
        type(live) in (torch.Tensor, torch.nn.Parameter)
        and live.device.type == "cpu"
        and live.layout is torch.strided
        and live.is_contiguous()
        and not (live.is_inference() or live.is_conj() or live.is_neg() or live.is_quantized)
    )


def fill(pairs: Sequence[tuple[torch.Tensor, Stored]]) -> list[str]:
    """Read each stored tensor into a live one of its shape and dtype that is `open_to` it.

    Returns the digests of what the live ones hold then, hashed in the memory where the bytes arrived. Raises OSError.
    """
    order = sorted(range(len(pairs)), key=lambda n: (pairs[n][1].path, pairs[n][1].slot.begin))
    groups = list(_together(order, pairs))
    told = local.at_once(lambda group: _read([pairs[n] for n in group]), groups, limit=os.cpu_count() or 1)
    # Autograd counts what torch writes, and whoever asks whether a tensor has changed since asks for that.
    for live, _ in pairs:
        torch.autograd.graph.increment_version(live)
    found = dict(zip((n for group in groups for n in group), (text for texts in told for text in texts), strict=True))
    return [found[n] for n in range(len(pairs))]


def _together(order: Iterable[int], pairs: Sequence[tuple[torch.Tensor, Stored]]) -> Iterator[list[int]]:
    """The work in pieces that are worth a thread's while, each in one file."""
    group: list[int] = []
    size, path = 0, None
    for n in order:
        stored = pairs[n][1]
        if group and (size >= TOGETHER or stored.path != path):
            yield group
            group, size = [], 0
        group.append(n)
        size, path = size + stored.slot.end - stored.slot.begin, stored.path
    if group:
        yield group


def _read(pairs: Sequence[tuple[torch.Tensor, Stored]]) -> list[str]:
    told = []
    with local.opened(pairs[0][1].path) as file:
        for some in _neighbours(pairs):
            first, last = some[0][1].slot, some[-1][1].slot
            read = memoryview(bytearray(last.end - first.begin if len(some) > 1 else 0))
            contents.fill(file.fileno(), read, first.begin)
            for live, stored in some:
                view, slot = window(live), stored.slot
                if read:
                    view[:] = read[slot.begin - first.begin : slot.end - first.begin]
                    found = of(view, kind_of(stored.digest))
                else:
                    found = _alone(file.fileno(), view, slot.begin, kind_of(stored.digest))
                told.append(f"{signature(slot.dtype, slot.shape)}:{found}")
    return told


def _neighbours(pairs: Sequence[tuple[torch.Tensor, Stored]]) -> Iterator[Sequence[tuple[torch.Tensor, Stored]]]:
    """Small ones that lie side by side in the file, some at a time; each other one alone."""
    begin = 0
    for n, (_, stored) in enumerate(pairs):
        start, slot = pairs[begin][1].slot.begin, stored.slot
        apart = n > begin and (slot.begin != pairs[n - 1][1].slot.end or slot.end - start > local.BLOCK)
        if apart or slot.end - slot.begin >= SMALL:
            if n > begin:
                yield pairs[begin:n]
            begin = n
        if slot.end - slot.begin >= SMALL:
            yield pairs[n : n + 1]
            begin = n + 1
    if begin < len(pairs):
        yield pairs[begin:]


def _alone(handle: int, view: memoryview, at: int, kind: Kind) -> str:
    """Read one, and hash it where it arrives."""
    each = Each([len(view)], kind)
    for begin in range(0, len(view), local.BLOCK):
        block = view[begin : begin + local.BLOCK]
        contents.fill(handle, block, at + begin)
        each.update(block)
    return each.told[0]
