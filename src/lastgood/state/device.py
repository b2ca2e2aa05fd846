"""Tensors of an accelerator -> host memory, while training goes on.

The copies run on a stream of their own, behind what training has enqueued so far, into pinned memory. The host waits
for none of them: a thread does, and then lets go of what was copied. What training enqueues next may not overwrite what
is still being copied: its stream waits (`Flight.fence`), which holds the accelerator and not the host.

CUDA is the model; anything behind `torch.accelerator` with streams and events will do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lastgood.errors import SaveFailed
from lastgood.talk import warn

TOGETHER = 64 << 20
"""Bytes (64 MiB) that are copied before the next event: the writer begins with what is there so far."""

Pair = tuple[torch.Tensor, memoryview]
"""A tensor that `flies`, and where its bytes go."""


def pinned(count: int) -> memoryview | None:
    """So many bytes that an accelerator writes to by itself; None where the system gives none, which is said.

    torch's allocator may round up to a power of two.
    """
    try:
        memory = torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except (RuntimeError, MemoryError) as error:  # none left, a limit of the system, or no such memory at all
        why = str(error).partition("\n")[0]
        warn(f"no memory could be pinned ({why}): training waits for the copies of a save, which are as good as any")
        return None
    return memoryview(memory.numpy().data).cast("B")


def flies(tensor: torch.Tensor) -> bool:
    """Whether it can be copied so: dense, in the order of its elements, on an accelerator that has streams."""
    return (
        tensor.device.type not in ("cpu", "meta")
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
        and _lane(tensor.device) is not None
    )


def batches(sizes: Sequence[int], most: int = TOGETHER) -> list[range]:
    """Runs of consecutive numbers: each ends with the one that makes its sizes `most` or more, but for the last."""
    found, begin, total = [], 0, 0
    for n, size in enumerate(sizes):
        total += size
        if total >= most:
            found.append(range(begin, n + 1))
            begin, total = n + 1, 0
    if begin < len(sizes):
        found.append(range(begin, len(sizes)))
    return found


@dataclass(slots=True, eq=False)
class Mark:
    """Copies up to an event. kept: what they read and write, so that nobody else gets its memory before."""

    device: torch.device
    event: torch.Event
    kept: list[torch.Tensor]
    error: Exception | None = None
    landed: bool = False

    def wait(self) -> None:
        """Until its copies are done. Raises nothing: see `error`."""
        if self.landed:
            return
        try:
            self.event.synchronize()
        except Exception as error:
            self.error = error
        self.kept, self.landed = [], True

    def fence(self) -> None:
        """What is enqueued on the current stream from now on runs behind its copies."""
        if self.landed:
            return
        if captured():  # nothing of what runs now can be waited for in a graph; the host does it, once
            self.wait()
        else:
            torch.accelerator.current_stream(self.device).wait_event(self.event)

    def check(self) -> None:
        """Wait. Raises SaveFailed if its copies came to nothing."""
        self.wait()
        if self.error is not None:
            raise SaveFailed(
                f"copying the state from {self.device} failed: {self.error}; earlier checkpoints are intact",
                hint="the error is the accelerator's: what ran on it before may be at fault",
            ) from self.error


@dataclass(slots=True, eq=False)
class Flight:
    """The copies of one save, in the order in which they were begun."""

    marks: list[Mark] = field(default_factory=list)

    def launch(self, pairs: Sequence[Pair]) -> list[Mark]:
        """Copy these, behind what training has enqueued so far; for each pair the mark that it is done with."""
        done: list[Mark | None] = [None] * len(pairs)
        for device in dict.fromkeys(tensor.device for tensor, _ in pairs):
            here = [n for n, (tensor, _) in enumerate(pairs) if tensor.device == device]
            lane, start = _lane(device), torch.Event(device=device)
            assert lane is not None, "asked for what doesn't fly"
            start.record(torch.accelerator.current_stream(device))
            lane.wait_event(start)
            for batch in batches([len(pairs[n][1]) for n in here]):
                kept: list[torch.Tensor] = []
                with _on(lane):
                    for n in (here[i] for i in batch):
                        source, target = flat(pairs[n][0]), torch.frombuffer(pairs[n][1], dtype=torch.uint8)
                        kept += [source, target]
                        target.copy_(source, non_blocking=True)
                event = torch.Event(device=device)
                event.record(lane)
                mark = Mark(device, event, kept)
                self.marks.append(mark)
                for i in batch:
                    done[here[i]] = mark
        return [mark for mark in done if mark is not None]

    def depart(self) -> None:
        """Have a thread wait for them, so that nothing is kept any longer than necessary."""
        if all(mark.landed for mark in self.marks):
            return
        try:
            threading.Thread(target=self.land, name="lastgood copies", daemon=True).start()
        except RuntimeError:  # at a limit of the system, or at the end of the interpreter: whoever writes waits
            return

    def fence(self, marks: Sequence[Mark] | None = None) -> None:
        """To be called before anything changes what is copied; of each device the last one is enough."""
        for mark in {mark.device: mark for mark in (self.marks if marks is None else marks)}.values():
            mark.fence()

    def land(self) -> None:
        """Wait until all of them are done."""
        for mark in self.marks:
            mark.wait()


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, in the same memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


_lanes: dict[torch.device, torch.Stream | None] = {}


def _lane(device: torch.device) -> torch.Stream | None:
    """The stream of a device for copies, one for the whole process; None where there are no streams."""
    if device not in _lanes:
        try:
            ours = torch.accelerator.current_accelerator()
            _lanes[device] = torch.Stream(device=device) if ours is not None and ours.type == device.type else None
        except (RuntimeError, NotImplementedError, AttributeError):
            _lanes[device] = None
    return _lanes[device]


@contextmanager
def _on(stream: torch.Stream) -> Iterator[None]:
    """To set a stream is to set its device as well: both are put back."""
    here, before = torch.accelerator.current_stream(), torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_stream(here)


def captured() -> bool:
    """Whether what is enqueued now becomes part of a CUDA graph instead of running."""
    return torch.cuda.is_available() and bool(torch.cuda.is_current_stream_capturing())
