"""What the rest of lastgood relies on when it asks for something to be done to a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lastgood.store import local
from lastgood.testing import Fault, Faulty, using


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link"])
def test_I3_a_rename_replaces_nothing(kind: str, tmp_path: Path) -> None:
    """The system alone would put a file in the place of another, and a directory in that of an empty one."""
    source, target, elsewhere = tmp_path / "source", tmp_path / "target", tmp_path / "elsewhere"
    if kind == "directory":
        source.mkdir()
        target.mkdir()
    else:
        source.write_text("new")
        if kind == "file":
            target.write_text("old")
        else:
            target.symlink_to(elsewhere)
            if kind == "link":
                elsewhere.write_text("old")
    before = sorted(tmp_path.iterdir()), target.lstat().st_ino
    with pytest.raises(FileExistsError):
        local.rename(source, target)
    assert (sorted(tmp_path.iterdir()), target.lstat().st_ino) == before


@pytest.mark.parametrize("what", ["ENOSPC", "EIO", "short"])
def test_I3_a_file_that_could_not_be_written_is_not_there(what: str, tmp_path: Path) -> None:
    for point in (1, 2, 3, 4):
        with using(Faulty(Fault(point, what))):
            try:
                told = local.write(tmp_path / "file", [b"one", b"two"])
            except OSError:
                assert what != "short", "a short write is gone on with"
                assert not (tmp_path / "file").exists()
                continue
        assert told == local.digest(tmp_path / "file")
        (tmp_path / "file").unlink()


def test_I3_a_replacement_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for point in range(1, 5):  # open, write, sync, close; then come the replacement and the directory
        with using(Faulty(Fault(point, "EIO"))), pytest.raises(OSError, match=r"EIO|Input/output"):
            local.replace(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
    local.replace(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_line_that_a_crash_tore_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    local.append(path, b"one\n", sync=True)
    with path.open("ab") as file:
        file.write(b"tw")
    local.append(path, b"three\n", sync=False)
    assert path.read_bytes() == b"one\ntw\nthree\n"
