"""Large files of which nothing is in memory are read past the page cache: the same bytes, whatever refuses it."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood import CheckpointManager
from lastgood.errors import NoCheckpoint
from lastgood.store import contents, direct, fs, local

PAGE = direct.ALIGNED
HERE = Path(__file__).parent
"""A directory on the disk that the repository is on."""


class Watched(fs.FileSystem):
    """Remembers of each reading whether it went past the page cache. broken: which of those that did fails, and how."""

    def __init__(self, broken: int = -1, number: int = errno.EINVAL) -> None:
        self.past: list[bool] = []
        self.broken, self.number = broken, number

    def read_at(self, handle: int, buffer: memoryview, at: int) -> int:
        past = bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)
        self.past.append(past)
        if past and sum(self.past) - 1 == self.broken:
            raise OSError(self.number, os.strerror(self.number))
        return super().read_at(handle, buffer, at)


class Refusing(Watched):
    """A file system that knows no O_DIRECT."""

    def unbuffered(self, handle: int, on: bool) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class Silent(Watched):
    """A system that doesn't say what is in memory."""

    def cached(self, handle: int, buffer: memoryview, at: int) -> None:
        return None


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 KiB, and every file with as many bytes is large."""
    if sys.platform != "linux":
        pytest.skip("what is in memory can be asked on Linux alone")
    monkeypatch.setattr(direct, "LARGE", 4 * PAGE)
    monkeypatch.setattr(contents, "AHEAD", 4 * PAGE)


def cold(path: Path, data: bytes) -> Path:
    """A file of which nothing is in memory."""
    path.write_bytes(data)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    return path


def read(path: Path, data: bytes, system: Watched) -> list[bool]:
    """Which readings went past the page cache; the content is right in any case."""
    with fs.using(system):
        view, entry = contents.content(path)
    assert bytes(view) == data
    assert entry == local.digest(path)
    return system.past


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20 * PAGE), st.sampled_from([0, 1, -1]), st.booleans())
def test_I9_every_length_cold_and_warm(size: int, off: int, warm: bool) -> None:
    data = os.urandom(max(0, size // PAGE * PAGE + off if off else size))
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        path = cold(Path(folder, "file"), data)
        if warm:
            path.read_bytes()
        read(path, data, Watched())


def test_a_cold_file_is_read_past_the_page_cache_and_a_warm_one_is_not(disk: Path) -> None:
    data = os.urandom(9 * PAGE + 5)
    path = cold(disk / "file", data)
    assert read(path, data, Watched()) == [True] * 4, "three blocks, and the page in which the file ends"
    path.read_bytes()
    assert read(path, data, Watched()) == [False] * 3


def test_a_small_file_is_not(disk: Path) -> None:
    data = os.urandom(4 * PAGE - 1)
    assert not any(read(cold(disk / "file", data), data, Watched()))


@pytest.mark.parametrize("system", [Refusing, Silent])
def test_where_the_system_does_not_know_how_it_is_read_as_ever(system: type[Watched], disk: Path) -> None:
    data = os.urandom(9 * PAGE)
    assert not any(read(cold(disk / "file", data), data, system()))


@pytest.mark.parametrize("broken", range(4))
def test_a_flag_that_is_taken_and_a_read_that_is_not(broken: int, disk: Path) -> None:
    data = os.urandom(9 * PAGE + 5)
    assert not all(read(cold(disk / "file", data), data, Watched(broken)))


def test_any_other_error_is_told(disk: Path) -> None:
    path = cold(disk / "file", os.urandom(9 * PAGE))
    with fs.using(Watched(1, errno.ENXIO)), pytest.raises(OSError, match="No such device"):
        contents.content(path)


def test_a_file_that_becomes_shorter_gives_what_is_there_then(disk: Path) -> None:
    """Or an error; never bytes that are in no file. Whoever asked knows the hash of the whole one."""
    path = cold(disk / "file", os.urandom(9 * PAGE + 5))

    class Cutting(Watched):
        def unbuffered(self, handle: int, on: bool) -> None:
            super().unbuffered(handle, on)
            os.truncate(path, path.stat().st_size // PAGE * PAGE - PAGE)

    with fs.using(Cutting()):
        view, entry = contents.content(path)
    assert bytes(view) == path.read_bytes() and entry == local.digest(path)


def test_I8_a_restore_of_a_cold_checkpoint_is_exact_and_finds_damage(disk: Path) -> None:
    def built() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(300, 70)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = built()
    model(torch.randn(3, 300)).sum().backward()
    optimizer.step()
    with CheckpointManager(disk / "run", model=model, optimizer=optimizer, on_error="raise") as ckpt:
        ckpt.restore()
        ckpt.step(1)
        ckpt.save()
    files = sorted((disk / "run" / "checkpoint-1").glob("*.safetensors"))
    for path in files:
        cold(path, path.read_bytes())
    again, other = built()
    with fs.using(watched := Watched()), CheckpointManager(disk / "run", model=again, optimizer=other) as back:
        assert back.restore() == 1
    assert any(watched.past)
    assert torch.equal(again.weight, model.weight)
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    state = next(path for path in files if path.name.startswith("optimizer"))
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    cold(state, bytes(data))
    with fs.using(watched := Watched()), pytest.raises(NoCheckpoint, match="optimizer"):
        CheckpointManager(disk / "run", model=again, optimizer=other).restore()
    assert any(watched.past)
