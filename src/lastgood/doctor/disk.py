"""A run directory as the rules look at it: read on demand, each file once, nothing unpickled, nothing changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lastgood import ranking
from lastgood.errors import CorruptCheckpoint, LastgoodError
from lastgood.format import archive
from lastgood.format.tensors import Slot, read_header
from lastgood.layouts.found import files_of
from lastgood.layouts.progress import STATE
from lastgood.model import Record
from lastgood.repo.free import free
from lastgood.repo.layout import HIDDEN
from lastgood.resumption import choose
from lastgood.store import local
from lastgood.view import View, look

CLOSE = 3
"""So many of the newest checkpoints are looked at closely: their headers, archives and JSON; all with `full`."""
JSON_LIMIT = 64 << 20


class Disk:
    """full: look at every checkpoint closely, and hash what has hashes."""

    def __init__(self, root: Path, *, full: bool = False) -> None:
        self.root, self.full = root, full
        self.view: View = look(root)
        self._files: dict[str, Mapping[str, int]] = {}
        self._json: dict[tuple[str, str], Any] = {}
        self._trees: dict[tuple[str, str], Any] = {}
        self._problems: dict[str, tuple[str, ...]] = {}

    @property
    def records(self) -> tuple[Record, ...]:
        """All checkpoints, by step."""
        return self.view.records

    @cached_property
    def newest(self) -> Record | None:
        """The last one of this run that is readable, or begun; foreign ones don't count."""
        own = [record for record in self.records if record.state != "foreign" and record.current]
        return max(own, key=lambda record: (record.step, record.seq), default=None)

    @cached_property
    def close(self) -> tuple[Record, ...]:
        """Those to look at closely: the newest, the best, and the one that a resume would take."""
        own = [record for record in self.records if record.state != "foreign"]
        if self.full:
            return tuple(own)
        chosen = sorted(own, key=lambda r: (r.step, r.seq))[-CLOSE:]
        wanted = {record.name for record in (*chosen, self.best, self.good) if record is not None}
        return tuple(record for record in own if record.name in wanted)

    @cached_property
    def best(self) -> Record | None:
        """The best by the run's own metric."""
        if self.view.monitor is None or self.view.mode is None:
            return None
        return ranking.best(self.records, self.view.monitor, self.view.mode)

    @cached_property
    def good(self) -> Record | None:
        """The checkpoint that a resume would take, by sizes and headers; None if there is none."""
        try:
            return choose(self.view, "last", full=False)[0]
        except LastgoodError:  # two runs share the directory: nobody guesses
            return None

    @cached_property
    def free(self) -> int:
        """Bytes that can still be written, by the disk and by the quota, the reserve of the run included."""
        return free(self.root).bytes

    @cached_property
    def inodes(self) -> int:
        """Files that can still be made; -1 where the file system doesn't say."""
        return local.free(self.root)[1]

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """Names in the run directory that aren't checkpoints."""
        there = {record.name.split("/")[0] for record in self.records}
        return tuple(name for name in local.names(self.root) if name not in there and name != HIDDEN)

    def path(self, record: Record) -> Path:
        return self.root / record.name

    def files(self, record: Record) -> Mapping[str, int]:
        """Relative name -> bytes of what really lies there; of a checkpoint that is one file, that file."""
        if record.name not in self._files:
            path = self.path(record)
            alone = local.size(path) if not path.is_dir() else None
            self._files[record.name] = files_of(path) if alone is None else {path.name: alone}
        return self._files[record.name]

    def json(self, record: Record, name: str) -> Any:
        """The content of a JSON file of a checkpoint; None if it isn't there or can't be read."""
        key = (record.name, name)
        if key not in self._json:
            try:
                self._json[key] = json.loads(local.read(self.path(record) / name, JSON_LIMIT))
            except (OSError, ValueError, RecursionError):
                self._json[key] = None
        return self._json[key]

    def state(self, record: Record) -> Mapping[str, Any]:
        """trainer_state.json, or {}."""
        value = self.json(record, STATE)
        return value if isinstance(value, dict) else {}

    def arguments(self, record: Record) -> Mapping[str, object]:
        """The training arguments that the checkpoint was saved under, {} if nothing says."""
        return self.view.arguments(record)

    def header(self, record: Record, name: str) -> Mapping[str, Slot]:
        """Tensor name -> slot (dtype, shape, place) of a safetensors file; {} if it can't be read."""
        try:
            return read_header(self.path(record) / name).slots
        except (CorruptCheckpoint, OSError):
            return {}

    def pickled(self, record: Record, name: str) -> Any:
        """The tree in a torch archive, with inert nodes for what isn't plain; None if it can't be read."""
        key = (record.name, name)
        if key not in self._trees:
            try:
                self._trees[key] = archive.load(self.path(record) / name)
            except (CorruptCheckpoint, OSError):
                self._trees[key] = None
        return self._trees[key]

    def problems(self, record: Record) -> tuple[str, ...]:
        """What is wrong with the structure of a checkpoint (with `full`: and with its hashes)."""
        if record.name not in self._problems:
            self._problems[record.name] = self.view.problems(record, full=self.full)
        return self._problems[record.name]

    def head(self, record: Record, name: str, count: int = 64) -> bytes:
        """The first bytes of a file, b"" if there is none."""
        try:
            with open(self.path(record) / name, "rb") as file:
                return file.read(count)
        except OSError:
            return b""
