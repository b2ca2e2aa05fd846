"""What is known of a checkpoint that another tool wrote."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lastgood.store import local


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """path: a directory, or a file for Lightning. step: -1 if nothing says. parts: part -> files, relative to `path`.

    state: "full" if a resume by the tool that wrote it finds what it needs, "weights", or "incomplete".
    """

    path: Path
    layout: str
    step: int
    state: str
    parts: Mapping[str, tuple[str, ...]]
    files: Mapping[str, int]
    problem: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    created: float = 0.0

    @property
    def size(self) -> int:
        return sum(self.files.values())


def files_of(directory: Path) -> dict[str, int]:
    """Relative path -> bytes of every regular file inside; links and devices are left out, nothing is followed."""
    found: dict[str, int] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(directory / prefix) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if prefix.count("/") < 8:
                            pending.append(f"{prefix}{entry.name}/")
                    elif entry.is_file(follow_symlinks=False):
                        found[prefix + entry.name] = entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return dict(sorted(found.items()))


def modified(path: Path) -> float:
    """When it was last written, for display only."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def is_directory(path: Path) -> bool:
    """A real one, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def folders(path: Path) -> list[Path]:
    """The directories in a directory, by name."""
    return [path / name for name in local.names(path) if is_directory(path / name)]
