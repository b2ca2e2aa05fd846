"""Large files past the page cache: the same bytes, the same hash, and after any failure no file."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lastgood import CheckpointManager
from lastgood.model import FileEntry
from lastgood.store import checksum, direct, local
from lastgood.store.checksum import Each
from lastgood.testing import Crash, Cut, Fault, Faulty, FileSystem, Recorder, cuts, using

from faults import lanes

REAL = Path(__file__).parent
"""A directory on the disk that the repository is on."""

MEMORY = Path("/dev/shm")

BUFFER = 1 << 14
"""Bytes of a buffer in most of these tests, so that little data fills many."""


class Written(NamedTuple):
    """One call: its bytes, whether it went past the page cache, whether anything else could have been."""

    count: int
    direct: bool


class Watched(FileSystem):
    """Does what is asked for, and remembers how it was written."""

    def __init__(self) -> None:
        self.writes: list[Written] = []

    def write(self, handle: int, data: bytes | memoryview) -> int:
        """See FileSystem, as for all of these."""
        past = bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)
        self.writes.append(Written(len(data), past))
        return super().write(handle, data)


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of 16 KiB, and every file with as many bytes is large."""
    if sys.platform != "linux":
        pytest.skip("there is no writing past the page cache but on Linux")
    sizes = {"BUFFER": BUFFER, "STEP": BUFFER, "PIECE": BUFFER // 4, "LARGE": BUFFER, "_idle": []}
    for name, value in sizes.items():
        monkeypatch.setattr(direct, name, value)


@pytest.fixture(params=["real", "memory"])
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on a real disk, and one in memory."""
    at = REAL if request.param == "real" else MEMORY
    if not os.access(at, os.W_OK):
        pytest.skip(f"{at} isn't there to write to")
    with tempfile.TemporaryDirectory(dir=at) as folder:
        yield Path(folder)


def content(count: int) -> bytes:
    """So many bytes, no block like another one."""
    return random.Random(0).randbytes(count)


def written(path: Path, chunks: list[bytes], *, sync: bool = True, each: Each | None = None) -> FileEntry:
    return local.write(path, iter(chunks), size=sum(map(len, chunks)), sync=sync, each=each)


# ---- the same file -----------------------------------------------------------------------


@given(lengths=st.lists(st.one_of(st.integers(0, 50), st.integers(0, 3 * BUFFER)), max_size=30), data=st.data())
def test_any_sequence_of_buffers_gives_the_same_bytes_and_hash(lengths: list[int], data: st.DataObject) -> None:
    direct.STEP = data.draw(st.sampled_from([BUFFER // 4, BUFFER]), "step")  # put back by `little`
    whole = content(sum(lengths))
    chunks, at = [], 0
    for length in lengths:
        chunks.append(whole[at : at + length])
        at += length
    root = data.draw(st.sampled_from([REAL, MEMORY] if MEMORY.exists() else [REAL]))
    with tempfile.TemporaryDirectory(dir=root) as folder:
        plain, past = Path(folder, "plain"), Path(folder, "past")
        told = Each(lengths), Each(lengths)
        entry = written(past, chunks, each=told[0])
        assert entry == local.write(plain, chunks, each=told[1]) == local.digest(past)
        assert told[0].told == told[1].told == [checksum.of(memoryview(chunk)) for chunk in chunks]
        assert past.read_bytes() == plain.read_bytes() == whole


EDGES = sorted(
    {edge + off for edge in (0, 4096, BUFFER // 4, BUFFER, 3 * BUFFER, 8 * BUFFER) for off in (-1, 0, 1)} - {-1}
)


def test_every_edge_of_blocks_pieces_and_buffers(place: Path) -> None:
    for size in EDGES:
        path = place / str(size)
        assert written(path, [content(size)]) == local.digest(path)
        assert path.read_bytes() == content(size), size


def test_with_the_sizes_that_are_in_use(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"BUFFER": 8 << 20, "STEP": 1 << 20, "PIECE": 1 << 19, "LARGE": 4 << 20, "_idle": []}
    for name, value in sizes.items():
        monkeypatch.setattr(direct, name, value)
    watched = Watched()
    for size in (direct.LARGE - 1, direct.LARGE, direct.LARGE + 4097):
        with using(watched):
            entry = written(disk / str(size), [content(size)])
        assert entry == local.digest(disk / str(size)) and entry.size == size
    assert [w.direct for w in watched.writes] == [False, *[True] * 4, *[True] * 5, False]
    assert watched.writes[-1].count == 1
    for size, step in ((40 << 20, 2 << 20), (200 << 20, 8 << 20)):  # a sixteenth at a time, in whole MiB
        with using(watched := Watched()):
            written(disk / str(size), [content(1 << 20)] * (size >> 20))
        assert {w.count for w in watched.writes[:-1]} == {step}


def test_all_but_less_than_a_block_goes_past_the_page_cache(disk: Path) -> None:
    watched = Watched()
    with using(watched):
        written(disk / "file", [content(5), content(3 * BUFFER), content(4100)])
    *blocks, rest = watched.writes
    assert all(write.direct and write.count % direct.ALIGNED == 0 for write in blocks)
    assert not rest.direct and rest.count == (5 + 3 * BUFFER + 4100) % direct.ALIGNED
    assert sum(write.count for write in watched.writes) == 5 + 3 * BUFFER + 4100


def test_nothing_is_preferred_for_a_file_of_unknown_or_small_size(disk: Path) -> None:
    watched = Watched()
    with using(watched):
        local.write(disk / "unknown", [content(4 * BUFFER)])
        written(disk / "small", [content(BUFFER - 1)])
    assert not any(write.direct for write in watched.writes)


def test_the_file_is_what_was_hashed_even_if_a_buffer_changes_meanwhile(disk: Path) -> None:
    shared = bytearray(content(64 * BUFFER))

    def chunks() -> Iterator[memoryview]:
        for at in range(0, len(shared), 4096):
            yield memoryview(shared)[at : at + 4096]
            shared[at // 2 : at // 2 + 4096] = bytes(4096)

    entry = local.write(disk / "file", chunks(), size=len(shared))
    assert entry == local.digest(disk / "file")


def test_a_tensor_has_the_hash_of_what_was_written_even_if_it_changes_meanwhile(disk: Path) -> None:
    shared = bytearray(content(8 * BUFFER))

    class Changed(Each):
        """Right before it is hashed."""

        def update(self, data: memoryview) -> None:
            shared[:] = bytes(len(shared))
            super().update(data)

    each = Changed([len(shared)])
    local.write(disk / "file", [memoryview(shared)], size=len(shared), each=each)
    data = (disk / "file").read_bytes()
    assert any(data) and each.told == [checksum.of(memoryview(data))]


def test_a_length_that_was_announced_wrongly_is_an_error(disk: Path) -> None:
    for size in (3 * BUFFER - 1, 3 * BUFFER + 1, 9 * BUFFER):
        announced = size if size > 3 * BUFFER else 4 * BUFFER
        with pytest.raises(OSError, match="another length"):
            local.write(disk / "file", [content(3 * BUFFER)], size=announced)
        assert not list(disk.iterdir())


# ---- failures ----------------------------------------------------------------------------


def calls(place: Path) -> list[str]:
    with using(counted := Faulty()):
        written(place / "file", [content(3 * BUFFER), content(77)])
    (place / "file").unlink()
    return counted.calls


def test_I3_every_error_at_every_call_leaves_no_file_and_is_raised(disk: Path) -> None:
    names = calls(disk)
    assert names == ["open", "unbuffered", "allocate", *["write"] * 3, "unbuffered", "write", "sync", "close"]
    for point, name in enumerate(names, 1):
        for what in lanes.ERRORS:
            with using(Faulty(Fault(point, what))):
                if point == 2:  # a file system that has no such way: no error, and nothing missing
                    assert written(disk / "file", [content(3 * BUFFER), content(77)]) == local.digest(disk / "file")
                    (disk / "file").unlink()
                    continue
                with pytest.raises(OSError, match=re.escape(os.strerror(getattr(errno, what)))):
                    written(disk / "file", [content(3 * BUFFER), content(77)])
            assert not list(disk.iterdir()) and _writers() == [], (point, name, what)


def test_a_refusal_at_any_write_or_of_the_allocation_is_no_error(disk: Path) -> None:
    for point, name in enumerate(calls(disk)[:6], 1):
        for what in ("EINVAL", "EOPNOTSUPP", "ENOSYS") if name != "open" else ():
            with using(broken := Faulty(Fault(point, what))):
                entry = written(disk / "file", [content(3 * BUFFER), content(77)])
            assert broken.struck and entry == local.digest(disk / "file") and entry.size == 3 * BUFFER + 77
            (disk / "file").unlink()


def test_I3_short_writes_are_gone_on_with(disk: Path) -> None:
    for point, name in enumerate(calls(disk), 1):
        for sticky in (False, True):
            with using(Faulty(Fault(point, "short", sticky))):
                entry = written(disk / "file", [content(3 * BUFFER), content(77)])
            assert entry == local.digest(disk / "file"), (point, name)
            assert (disk / "file").read_bytes() == content(3 * BUFFER) + content(77)
            (disk / "file").unlink()


def test_I1_a_crash_at_every_call(disk: Path) -> None:
    for point, _ in enumerate(calls(disk), 1):
        for what in ("crash-before", "crash-torn", "crash-after"):
            with using(Faulty(Fault(point, what))), pytest.raises(Crash):
                written(disk / "file", [content(3 * BUFFER), content(77)])
            local.unlink(disk / "file")
    assert _writers() == []


def test_what_breaks_in_the_source_of_the_bytes_leaves_no_file_thread_or_descriptor(disk: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def broken(after: int, error: BaseException) -> Iterator[bytes]:
        yield content(after)
        raise error

    for after in (0, 10, BUFFER, 20 * BUFFER + 5):
        for error in (ValueError("from the source"), KeyboardInterrupt()):
            with pytest.raises(type(error)):
                local.write(disk / "file", broken(after, error), size=99 * BUFFER)
            assert not list(disk.iterdir()) and _writers() == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_I3_a_full_disk(small: Path) -> None:
    free = os.statvfs(small).f_bfree
    for system in (FileSystem(), Unallocated()):
        with using(system), pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            local.write(small / "file", (bytes(1 << 20) for _ in range(100)), size=100 << 20)
    assert not list(small.iterdir()) and os.statvfs(small).f_bfree == free


class Unallocated(FileSystem):
    """A file system that can't allocate ahead, as many can't."""

    def allocate(self, handle: int, size: int) -> None:
        """See FileSystem."""
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


class Impatient(FileSystem):
    """Whoever waits for the first write is interrupted, and once more; remembers what was closed during it."""

    def __init__(self) -> None:
        self.handle = -1
        self.writing = False
        self.closed_meanwhile = False
        self.heard = 0

    def write(self, handle: int, data: bytes | memoryview) -> int:
        """See FileSystem."""
        self.handle, self.writing = handle, True
        while self.heard < 2:  # one that comes right before a wait doesn't end it
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            threading.Event().wait(0.01)
        count = super().write(handle, data)
        self.writing = False
        return count

    def close(self, handle: int) -> None:
        """See FileSystem."""
        self.closed_meanwhile |= self.writing
        super().close(handle)

    def interrupt(self, *_: object) -> None:
        """The handler of the signal."""
        self.heard += 1
        if self.heard <= 2:
            raise KeyboardInterrupt


def test_I3_nothing_is_written_to_a_file_that_an_impatient_user_had_closed(disk: Path) -> None:
    there = Impatient()
    before = signal.signal(signal.SIGINT, there.interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), using(there):
            written(disk / "file", [content(9 * BUFFER)])
    finally:
        signal.signal(signal.SIGINT, before)
    for _ in range(12_000):  # Python itself takes a thread for ended once the wait for its end was interrupted
        if direct.busy:
            threading.Event().wait(0.01)
    assert not there.closed_meanwhile and not list(disk.iterdir()) and not there.writing and not direct.busy
    with suppress(OSError):
        os.close(there.handle)


def test_at_the_end_of_the_interpreter_too(disk: Path) -> None:
    code = (
        "import atexit, sys; from pathlib import Path; from lastgood.store import direct, local\n"
        "direct.LARGE = 1\n"
        "atexit.register(lambda: local.write(Path(sys.argv[1]), [bytes(100_000)], size=100_000))"
    )
    subprocess.run([sys.executable, "-c", code, str(disk / "file")], check=True, timeout=120)
    assert (disk / "file").read_bytes() == bytes(100_000)


# ---- power cuts --------------------------------------------------------------------------


def test_I2_what_went_past_the_page_cache_may_be_lost_until_it_is_synced(disk: Path) -> None:
    whole = content(3 * BUFFER) + content(77)
    for model in ("ordered", "posix"):
        for folder in disk.iterdir():
            (folder / "file").unlink()
            folder.rmdir()
        (disk / model).mkdir()
        recorder = Recorder(disk / model)
        with using(recorder):
            local.write(disk / model / "file", [whole], size=len(whole))
        states: list[Cut] = list(cuts(recorder.before, recorder.events, model))  # type: ignore[arg-type]
        last = len(recorder.events)
        assert states and {state.after for state in states} >= {last}
        # The name isn't durable before its directory is; the bytes are, once the call has returned.
        assert all(state.files.get("file", whole) == whole for state in states if state.after == last)
        found = {state.files.get("file") for state in states}
        assert bytes(len(whole)) in found, "allocated, and nothing written"
        hole = whole[:BUFFER] + bytes(BUFFER) + whole[2 * BUFFER :]
        assert model == "ordered" or hole in found, "one write lost, the next one there"


SAMPLES = {"crash": 5, "error": 71, "power": 29, "twice": 173}


@pytest.mark.parametrize("lane", SAMPLES)
def test_I1_I2_I3_I4_a_save_whose_files_all_go_past_the_page_cache(
    lane: str, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "LARGE", 1)
    bench = lanes.Bench(lanes.named("next_save(three)"), quick)
    assert "allocate" in bench.calls
    some = list(lanes.points(lane, bench, SAMPLES[lane]))
    bad = {point: wrong for point in some if (wrong := lanes.run(lane, bench, point))}
    assert some and not bad, bad


def _writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lastgood-write"]


# ---- in a save -------------------------------------------------------------------------


class Borrowing:
    """A part whose state_dict() uses the model's own memory for a moment, as some averages of weights do."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, int]:
        """It is there again when this returns."""
        with torch.no_grad():
            kept = [parameter.clone() for parameter in self.model.parameters()]
            for parameter in self.model.parameters():
                parameter.zero_()
            threading.Event().wait(0.02)
            for parameter, value in zip(self.model.parameters(), kept, strict=True):
                parameter.copy_(value)
        return {"calls": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to put back."""


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_part_that_borrows_the_models_memory_spoils_no_file(disk: Path, contiguous: bool) -> None:
    def parts() -> dict[str, Any]:
        model = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.Linear(300, 20))
        if not contiguous:  # such tensors are copied to be written, and go another way
            model[0].weight = torch.nn.Parameter(torch.randn(200, 300).t())
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(4, 200)).sum().backward()
        optimizer.step()
        return {"borrowing": Borrowing(model), "model": model, "optimizer": optimizer}

    first = parts()
    with CheckpointManager(disk / "run", **first, on_error="raise", save_steps=1) as saving:
        saving.restore()
        saving.step(1)
    second = parts()
    with CheckpointManager(disk / "run", **second) as restoring:
        assert restoring.restore("last") == 1
    for mine, saved in zip(second["model"].parameters(), first["model"].parameters(), strict=True):
        assert torch.equal(mine, saved)
