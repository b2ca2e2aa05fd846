"""What the verification of a checkpoint has read and the restore behind it needs: its bytes come from the disk once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lastgood.errors import CorruptCheckpoint
from lastgood.format.digests import Place, digests
from lastgood.model import FileEntry, Manifest
from lastgood.store import contents, local
from lastgood.store.checksum import Kind


@dataclass(slots=True)
class Held:
    """Of one checkpoint, by the paths of its files; taken out by whoever uses it.

    state: keep the tensors beside resume.json in memory, for an optimizer that gets just these bytes as its state.
    """

    state: bool = True
    _contents: dict[Path, tuple[memoryview, FileEntry]] = field(default_factory=dict)
    _digests: dict[Path, tuple[dict[str, Place], FileEntry]] = field(default_factory=dict)

    def read(self, directory: Path, name: str, manifest: Manifest) -> FileEntry:
        """Size and hash of a file as it is now; what a restore needs of it is kept. Raises OSError."""
        path, kind = directory / name, manifest.files[name].kind
        if path.suffix != ".safetensors" or manifest.layout:
            return local.digest(path, kind)
        if name in manifest.parts.get("model", ()):
            try:
                found, entry = self.digests(path, kind)
            except CorruptCheckpoint:  # whether it was saved like that is for its hash to say
                return local.digest(path, kind)
            self._digests[path] = found, entry
            return entry
        if not self.state:
            return local.digest(path, kind)
        self._contents[path] = contents.content(path, kind)
        return self._contents[path][1]

    def content(self, path: Path, kind: Kind) -> tuple[memoryview, FileEntry]:
        """All bytes of a file, no longer kept here, with their hash, by `kind`. Raises OSError."""
        return self._contents.pop(path, None) or contents.content(path, kind)

    def digests(self, path: Path, kind: Kind) -> tuple[dict[str, Place], FileEntry]:
        """Each tensor of a safetensors file with its digest, by `kind`. Raises OSError, CorruptCheckpoint."""
        if path in self._digests:
            return self._digests[path]
        entry, found = digests(path, kind)
        return found, entry

    def clear(self) -> None:
        """Another checkpoint is next, or none."""
        self._contents.clear()
        self._digests.clear()
