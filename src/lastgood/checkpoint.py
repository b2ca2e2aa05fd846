"""One checkpoint as a program uses it: what it is, where its files are, its tensors, and what others add to it.

Only `load`, `tensor` and `tensors` need torch, which is imported when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lastgood.errors import Conflict, CorruptCheckpoint, NotSupported, UsageError
from lastgood.format.strict import loads
from lastgood.format.tensors import read_header
from lastgood.model import FileEntry, Manifest, Record, Span, State
from lastgood.repo import journal, metrics, pins, verify
from lastgood.repo.read import held_by, id_at
from lastgood.store import contents
from lastgood.talk import warn

if TYPE_CHECKING:
    import torch

WEIGHTS = ("model", "adapter_model")
"""Beginnings of the names that save_pretrained gives to files of weights."""
EXTRA = "extra.safetensors"
NAMES = "tensors.json"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A handle: what was on disk when the run was asked for it; metrics and names are read anew each time."""

    root: Path
    found: Record

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path} step={self.step} state={self.state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Path, str]:
        return self.root, self.id or self.name

    # ---- what it is ----------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Global (optimizer) step."""
        return self.found.step

    @property
    def name(self) -> str:
        """Its directory's name in the run."""
        return self.found.name

    @property
    def path(self) -> Path:
        """Its directory: load it with from_pretrained."""
        return self.root / self.found.name

    @property
    def state(self) -> State:
        """full, weights, incomplete, stock or foreign (`lastgood.model.State`)."""
        return self.found.state

    @property
    def id(self) -> str:
        """16 hex digits; "" for one without a manifest."""
        return self.found.id

    @property
    def seq(self) -> int:
        """Number of the save within the run, over all branches; 0 for one without a manifest."""
        return self.found.seq

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return self.found.size

    @property
    def ours(self) -> bool:
        """Written by this run, and readable."""
        return self.found.ours

    @property
    def current(self) -> bool:
        """On the branch that the run is on; False for what a resume of an older one left behind."""
        return self.found.current

    @property
    def problem(self) -> str:
        """For incomplete and foreign ones: what was seen."""
        return self.found.problem

    @property
    def layout(self) -> str:
        """The tool whose files these are; "" for ours."""
        return self.found.layout

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was recorded until now, by whatever process."""
        return metrics.read(self.root, self.id) if self.found.ours and self.id else self.found.metrics

    @property
    def pinned(self) -> tuple[str, ...]:
        """Names that hold it now: pins and tags."""
        return held_by(self.root).get(self.id, ()) if self.id else ()

    # ---- what is in it -------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest | None:
        """The commit record; None for one without."""
        return self.found.manifest

    @property
    def files(self) -> Mapping[str, FileEntry]:
        """Relative path -> size and hash."""
        return self.manifest.files if self.manifest is not None else {}

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Part -> its files, as the manifest has it."""
        return self.manifest.parts if self.manifest is not None else {}

    @property
    def arguments(self) -> Mapping[str, object]:
        """The training arguments it was saved under, secrets masked."""
        return self.manifest.arguments if self.manifest is not None else {}

    @property
    def poisoned(self) -> str:
        """Why its state is unhealthy; "" for a good one."""
        return self.found.poisoned

    @property
    def environment(self) -> Mapping[str, str]:
        """Library -> version."""
        return self.manifest.environment if self.manifest is not None else {}

    @property
    def facts(self) -> Mapping[str, object]:
        """What else the save noted: data, adapter, world size, loss."""
        return self.manifest.facts if self.manifest is not None else {}

    @property
    def created(self) -> float:
        """Seconds since 1970, for display."""
        return self.manifest.created if self.manifest is not None else 0.0

    @property
    def lineage(self) -> tuple[Span, ...]:
        """First and last number of each stretch of saves on the way to here, this one included."""
        return self.manifest.lineage if self.manifest is not None else ()

    @property
    def parent(self) -> str | None:
        """Id of the checkpoint that this state continued from."""
        return self.manifest.parent if self.manifest is not None else None

    def problems(self, *, full: bool = True) -> tuple[str, ...]:
        """What is wrong with its files; () if nothing. full: hash every byte."""
        return verify.problems(self.root, self.found, full=full)

    # ---- its tensors ---------------------------------------------------------------------

    def load(self, part: str = "model", *, device: Any = None, dtype: Any = None) -> dict[str, torch.Tensor]:
        """A part's state dict, hashed while it is read; a tied tensor comes under each of its names.

        part: "model", or the name of one of several models (NAME.safetensors). device, dtype: as torch has them, dtype
        for floating tensors only. An adapter's checkpoint holds the adapter. Raises UsageError, NotSupported
        (an optimizer, pickled weights, no torch) or CorruptCheckpoint; then nothing was loaded.
        """
        told = self._told(part)
        return self._read(self._files_of(part, told), told, device, dtype)

    def tensor(self, name: str, *, verify: bool = True) -> torch.Tensor:
        """One tensor by the name it is stored under, in any of the files: an optimizer's too (`state.NAME.exp_avg`).

        Only its own bytes are kept. They are proven by the digest that the model's tensor of this name had, else by the
        hash of the whole file, which is read through for it. verify=False reads its bytes and nothing else: nobody
        says then that they are what was saved. Raises UsageError where no file has it, otherwise as `load`.
        """
        return self._chosen(name.__eq__, f"tensor {name!r}", verify, one=True)[name]

    def tensors(self, pattern: str, *, verify: bool = True) -> dict[str, torch.Tensor]:
        """Those whose names match, such as one layer's: "transformer.h.3.*". Otherwise as `tensor`."""
        return self._chosen(lambda name: fnmatchcase(name, pattern), f"tensor that matches {pattern!r}", verify)

    def _chosen(
        self, wanted: Callable[[str], bool], what: str, verify: bool, *, one: bool = False
    ) -> dict[str, torch.Tensor]:
        self._readable()
        told, found = self._told(""), dict[str, "torch.Tensor"]()
        proofs = [model.get("tensors", {}) for model in (told, *told.get("modules", {}).values())]
        for file in sorted(name for name in self.files if name.endswith(".safetensors")):
            slots = read_header(self.path / file).slots
            pairs = [*zip(slots, slots, strict=True), *told["aliases"].items()]
            names = {name: key for name, key in pairs if key in slots and name not in found and wanted(name)}
            known = {key: [proof[key] for proof in proofs if isinstance(proof.get(key), str)] for key in names.values()}
            if names:
                read = self._loading().chosen(self.path / file, self.files[file] if verify else None, known)
                found |= {name: read[key] for name, key in names.items()}
            if found and one:
                break
        if not found:
            raise UsageError(f"{self.name} has no {what}", hint="`lastgood show --tensors` lists them")
        return found

    def _read(self, names: list[str], told: Mapping[str, Any], device: Any, dtype: Any) -> dict[str, torch.Tensor]:
        files = [(self.path / name, self.files[name]) for name in names]
        found: dict[str, torch.Tensor] = self._loading().load(files, told, device=device, dtype=dtype)
        return found

    def _loading(self) -> Any:
        try:
            from lastgood.weights import load
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "numpy"):
                raise
            raise NotSupported("tensors need torch, which isn't installed", hint="pip install torch") from None
        return load

    def _readable(self) -> None:
        if self.manifest is None:
            raise NotSupported(
                f"{self.name} has no manifest, so nothing says what its files have to hold",
                hint="`lastgood adopt` gives the checkpoints of a stock Trainer one, and changes no file of theirs",
            )
        if self.state == "incomplete":
            raise CorruptCheckpoint(f"{self.name} is incomplete: {self.problem}", hint="use another one")

    def _files_of(self, part: str, told: Mapping[str, Any]) -> list[str]:
        """In the order in which they are read."""
        self._readable()
        if part in ("optimizer", "progress"):
            raise NotSupported(
                f"a live run restores the {part}, with the model that it belongs to; it is no state dict of tensors",
                hint="tensor('state.NAME.exp_avg') gives one of its tensors",
            )
        model = [name for name in self.parts.get("model", ()) if "/" not in name]
        tensors = [name for name in model if name.endswith(".safetensors") and name != EXTRA]
        weights = [name for name in tensors if name.split("-0")[0].removesuffix(".safetensors") in WEIGHTS]
        if part == "model" and weights:
            return weights + [name for name in model if name == EXTRA]
        own = told.get("files")
        if isinstance(own, list) and own and all(name in self.files for name in own):
            return own
        if f"{part}.safetensors" in tensors:
            return [f"{part}.safetensors"]
        if part == "model" and any(name.endswith((".bin", ".pt", ".pth")) for name in self.parts.get("model", ())):
            raise NotSupported(
                f"the weights of {self.name} are pickled, as {self.layout or 'its tool'} wrote them",
                hint="from_pretrained(checkpoint.path) reads them",
            )
        known = ", ".join(sorted(name.removesuffix(".safetensors") for name in tensors if name not in weights))
        there = ", ".join(filter(None, ["model" if weights else "", known])) or "none that is tensors"
        raise UsageError(f"{self.name} has no part {part!r}", hint=f"its parts: {there}")

    def _told(self, part: str) -> dict[str, Any]:
        """What tensors.json says of a model (FORMAT.md); `aliases`: further name -> stored name, of tied tensors."""
        entry = self.files.get(NAMES)
        if entry is None:
            return {"aliases": {}}
        try:
            data, is_now = contents.content(self.path / NAMES, entry.kind)
            whole = loads(bytes(data))
            told = whole if part in ("", "model") else whole.get("modules", {}).get(part, {})
            known = told.get("aliases", {})
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptCheckpoint(f"{self.path / NAMES} can't be read: {error}") from error
        if is_now != entry:
            raise CorruptCheckpoint(f"the content of {self.path / NAMES} is not what was saved (hash differs)")
        aliases = {str(name): str(target) for name, target in known.items()} if isinstance(known, dict) else {}
        return {**told, "aliases": aliases}

    # ---- what others add -----------------------------------------------------------------

    def record(self, values: Mapping[str, float] | None = None, **more: float) -> None:
        """Add metrics, from any process and host, while the run goes on: record(mmlu=0.61). A later value wins.

        They count for best and for retention from its next save on. If the checkpoint was deleted meanwhile, they stay
        in the history (`lastgood log --all`), with a warning. Raises UsageError for what is no number, Conflict if
        another checkpoint has its place by now, OSError.
        """
        self._ours("record")
        checked = {name: metrics.checked(name, value) for name, value in {**(values or {}), **more}.items()}
        if not checked:
            raise UsageError("nothing to record", hint="record(mmlu=0.61)")
        there = id_at(self.path)
        if there not in (None, self.id):
            raise Conflict(
                f"{self.path} holds another checkpoint by now: the run went back, and saved step {self.step} again."
                " Nothing was recorded, for what was measured may be of either",
                hint="open the run again and evaluate what is there",
            )
        metrics.record(self.root, self.id, self.step, checked)
        words = {name: str(value) for name, value in checked.items()}
        journal.append(self.root, "recorded", step=self.step, id=self.id, metrics=words)
        if there is None:
            warn(f"{self.name} isn't there any more; its metrics are kept in the history")

    def pin(self) -> None:
        """Hold it: neither a policy nor `prune` deletes or strips it."""
        self._ours("pin")
        pins.add(self.root, self.id, pins.PIN)

    def unpin(self) -> None:
        """Let go of it again; tags go on holding it."""
        self._ours("unpin")
        pins.remove(self.root, self.id, pins.PIN)

    def tag(self, name: str) -> None:
        """Give it a name that holds it; another checkpoint that has the name loses it. Raises UsageError."""
        self._ours("tag")
        pins.add(self.root, self.id, pins.check_name(name))

    def untag(self, name: str) -> None:
        """Take a name away."""
        self._ours("untag")
        pins.remove(self.root, self.id, name)

    def note(self, text: str | None = None) -> str:
        """Write a line about it ("" removes it); what is written about it now, "" if nothing is."""
        if text is not None:
            self._ours("note")
            if not text.isprintable() or len(text) > 2000:
                raise UsageError("a note is one line of at most 2000 characters that can be printed")
            pins.write_note(self.root, self.id, text)
        return pins.read_notes(self.root).get(self.id, "")

    def _ours(self, verb: str) -> None:
        if not self.id or self.state == "foreign":
            raise UsageError(
                f"{self.name} has no manifest of this run, so there is nothing to {verb}",
                hint="`lastgood adopt` gives the checkpoints of a stock Trainer manifests",
            )
