"""The part `model`: what `save_pretrained` decides to write, and the proof that it can be put back.

At a save the model's own `save_pretrained` chooses names, tied weights, shards and
conversions; the tensors it hands to its safetensors writer are taken over before a byte is
written. Live tensors that those files don't hold (a parameter unfrozen beside an adapter, a
buffer that changed and isn't persistent) are stored as well, under their live names. At a
restore each live tensor is found by its digest, whatever its name on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from lastgood.errors import Incompatible, IncompleteRestore
from lastgood.state.capturing import Capturing
from lastgood.state.conversions import converted
from lastgood.state.digests import Digests, Split, identity
from lastgood.state.fingerprint import Fingerprints, live_tensors
from lastgood.state.known import Known
from lastgood.state.match import some
from lastgood.state.members import Members, members
from lastgood.state.meta import all_filled, give_memory
from lastgood.state.optimizer import clean
from lastgood.state.replaced import replaced
from lastgood.state.stored import Stored, fill, open_to
from lastgood.state.tensors import by_digest, digest, holds, same_bits, signature
from lastgood.state.tokenizers import Tokenizers
from lastgood.store.checksum import kind_of

T = TypeVar("T")

WRITERS = (
    ("transformers.modeling_utils", "safe_save_file"),
    ("peft.peft_model", "safe_save_file"),
    ("safetensors.torch", "save_file"),
)
"""Where the libraries keep the function that writes a safetensors file."""

UNWANTED = frozenset({"training_args.bin"})
"""Pickles that hold nothing a resume needs, and the hub token in clear: never written."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One safetensors file as a library wanted it: path relative to the checkpoint, tensors by saved name.

    since: of one that is remembered, the `build` of the model's `Known` that it holds for.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] | None
    since: object = None


@contextmanager
def taken_over(directory: str) -> Iterator[list[TensorFile]]:
    """While active, safetensors files meant for `directory` are collected instead of written.

    Calls for any other place go through, so other threads don't notice.
    """
    root = Path(directory).resolve()
    files: list[TensorFile] = []

    def inside(target: Any) -> str | None:
        if not isinstance(target, (str, Path)):
            return None
        path = Path(target).resolve()
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else None

    def taking(original: Callable[..., Any]) -> Callable[..., Any]:
        def save_file(tensors: dict[str, torch.Tensor], filename: Any, metadata: Any = None) -> Any:
            name = inside(filename)
            if name is None:
                return original(tensors, filename, metadata=metadata)
            files.append(TensorFile(name, dict(tensors), metadata))
            return None

        return save_file

    def skipping(original: Callable[..., Any]) -> Callable[..., Any]:
        def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
            name = inside(f)
            return None if name in UNWANTED else original(obj, f, *args, **kwargs)

        return save

    with replaced([(module, name, taking) for module, name in WRITERS] + [("torch", "save", skipping)]):
        yield files


@dataclass(slots=True)
class Coverage:
    """Remembers, per run, what the model was at the start, and what was tried once.

    proven: live tensors that the conversions lead back to. stored: those that nothing leads back to, which are
    stored under their live names. known: what the last save found out; capturing: the same of an optimizer, tokenizers:
    and of what is saved with the model.
    """

    initial: dict[str, str]
    prints: Fingerprints
    known: Known = field(default_factory=Known)
    capturing: Capturing = field(default_factory=Capturing)
    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    proven: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    _calm: tuple[object, object] = (None, None)  # of a save at which no tensor was in doubt

    @classmethod
    def begin(cls, model: torch.nn.Module) -> Coverage:
        """To be called before training or a restore changes the model."""
        prints = Fingerprints()
        return cls(initial=prints.of(live_tensors(model)), prints=prints)

    def look(self, model: torch.nn.Module, every: Members) -> None:
        """A save begins, of these: what the last one found out holds as long as the model is built the same."""
        self.known.look(model, every)

    def members(self, model: torch.nn.Module) -> Members:
        """`lastgood.state.members.members`, quicker if they are those of the last time."""
        return self.known.walk.through(model)

    @contextmanager
    def collecting(self, model: torch.nn.Module, directory: str) -> Iterator[list[TensorFile]]:
        """`taken_over` for the save_pretrained of this model."""
        with taken_over(directory) as files, self.known.reused(model), self.tokenizers.reused():
            yield files

    def collected(self, collect: Callable[[], tuple[TensorFile, T]]) -> tuple[TensorFile, T]:
        """What `collect` makes of the model's state dict, or made of it before."""

        def lasting() -> tuple[TensorFile, T]:
            file, about = collect()
            return replace(file, since=self.known.build), about

        return self.known.once("state dict", lasting) if self.known.ordinary() else collect()

    def aliases(self, model: torch.nn.Module, files: Sequence[TensorFile]) -> dict[str, str]:
        """See `aliases`."""
        names = tuple(name for file in files for name in file.tensors)
        return self.known.once(("aliases", names), lambda: aliases(model, names))

    def computed(self, model: torch.nn.Module) -> set[str]:
        """See `computed`."""
        return self.known.once("computed", lambda: computed(model))

    def extras(
        self, model: torch.nn.Module, live: Mapping[str, torch.Tensor], files: list[TensorFile]
    ) -> tuple[Digests, dict[str, torch.Tensor]]:
        """(digests of all live tensors, the live tensors that `files` would not bring back).

        Nothing that the files hold as it is gets hashed here: whoever writes them does that, see Digests.
        """
        split = self._split(live, files)
        held, known = split.held, self._known(split, live)
        digests = Digests(list(live), known, split.later)
        if self._calm[0] is split and self._calm[1] is known:  # both remembered, and nothing else has a say in it
            return digests, {}
        # What is neither trained nor changed comes with the model: the frozen base under an adapter, which
        # no adapter checkpoint stores, and buffers that are computed when the model is built.
        loose = {name: live[name] for name in split.loose if name not in self.proven}
        own = set[str]()
        if loose and not hasattr(model, "peft_config"):
            own = {clean(name) for name in model.state_dict(keep_vars=True)}
        doubtful = [
            name
            for name, tensor in loose.items()
            if tensor.requires_grad or name in own or self.initial.get(name) != known[name]
        ]
        if not doubtful:
            self._calm = split, known
        same = held.digests({known[name] for name in doubtful})
        lost = [name for name in doubtful if known[name] not in same]
        untried = [name for name in lost if name not in self.stored]
        if untried:
            saved = {name: tensor for file in files for name, tensor in file.tensors.items()}
            candidates = converted(model, saved)
            led_back = {name for name in untried if name in candidates and same_bits(candidates[name], live[name])}
            self.proven |= led_back
            self.stored |= set(untried) - led_back
        return digests, {name: live[name] for name in lost if name in self.stored}

    def _split(self, live: Mapping[str, torch.Tensor], files: Sequence[TensorFile]) -> Split:
        find = partial(Split.of, live, files, self.prints)
        contents: list[Any]
        if all(file.since is self.known.build for file in files):
            contents = [(file.name, id(file.tensors)) for file in files]
        elif all(self.known.owns(file.tensors) for file in files):
            contents = [(file.name, list(file.tensors), list(map(id, file.tensors.values()))) for file in files]
        else:  # copies: they aren't kept in memory for this
            return find()
        frozen = [tensor.requires_grad for tensor in live.values()]
        return self.known.unless("split", (frozen, contents), find)

    def _known(self, split: Split, live: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Digests of what isn't written as it is; those of a frozen base hold until something writes to it."""
        find = partial(split.known, live, self.prints)
        tensors = {name: live[name] for name in split.frozen}
        if len(tensors) != len(split.now) or not self.known.owns(tensors):
            return find()
        written_to = [tensor._version for tensor in tensors.values()]
        return self.known.unless("frozen", (list(tensors), written_to), find)


def aliases(model: torch.nn.Module, stored: Collection[str]) -> dict[str, str]:
    """Further name -> stored name, of tensors that the model's state dict has under several names: tied ones.

    save_pretrained stores them once; whoever loads the files without the model's class can't know the other names.
    """
    stored = set(stored)
    names: dict[tuple[Any, ...], list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            names.setdefault(identity(tensor), []).append(clean(key))
    found: dict[str, str] = {}
    for same in names.values():
        target = next((name for name in same if name in stored), None)
        found |= {name: target for name in same if target is not None and name not in stored}
    return found


def restore(
    model: torch.nn.Module,
    expected: Mapping[str, str],
    load: Callable[[], dict[str, torch.Tensor]],
    *,
    stored: Iterable[Stored] = (),
    allow_base: bool = False,
    unstored: Collection[str] = (),
) -> dict[str, int]:
    """Give every live tensor the value whose digest is in `expected`: `prepare` and `Prepared.apply` in one."""
    return prepare(model, expected, load, stored=stored, allow_base=allow_base, unstored=unstored).apply()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A restore that is known to be whole; nothing was changed yet.

    live: the tensors of the model; sources: live name -> what goes into it; counts: how many tensors are unchanged,
    copied, converted and different.
    """

    live: Mapping[str, torch.Tensor]
    expected: Mapping[str, str]
    sources: Mapping[str, torch.Tensor | Stored]
    counts: dict[str, int]

    def apply(self) -> dict[str, int]:
        """Returns the counts. Raises IncompleteRestore if a tensor doesn't hold what was saved even now."""
        for name in self.sources:
            if self.live[name].is_meta:
                give_memory(self.live[name])
        straight = {
            name: source
            for name, source in self.sources.items()
            if isinstance(source, Stored) and open_to(self.live[name])
        }
        try:
            told = fill([(self.live[name], source) for name, source in straight.items()])
            held = dict(zip(straight, told, strict=True))
            for name, source in self.sources.items():
                if name not in straight:
                    put(self.live[name], source.tensor() if isinstance(source, Stored) else source)
                    held[name] = digest(self.live[name], kind=kind_of(self.expected[name]))
        except OSError as error:
            raise IncompleteRestore(
                f"a file that was good a moment ago can't be read any more ({error}): the model is restored in part",
                hint="don't train on; launch again",
            ) from error
        wrong = [name for name, now in held.items() if now != self.expected[name]]
        if wrong:
            raise IncompleteRestore(f"after the restore these tensors don't hold what was saved: {some(wrong)}")
        return self.counts


def put(live: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy in place; a tensor that was made in inference mode can be written to nowhere else."""
    with torch.inference_mode() if live.is_inference() else torch.no_grad():
        live.copy_(tensor)


def prepare(
    model: torch.nn.Module,
    expected: Mapping[str, str],
    load: Callable[[], dict[str, torch.Tensor]],
    *,
    stored: Iterable[Stored] = (),
    empty: Mapping[str, torch.Tensor] | None = None,
    allow_base: bool = False,
    unstored: Collection[str] = (),
) -> Prepared:
    """Find what goes into every live tensor by the digests in `expected`.

    stored: tensors of verified files, which are read straight into the live ones. load: all saved tensors in memory,
    for what none of `stored` is: conversions need them. empty: tensors of the model that have no memory yet.
    allow_base: frozen tensors that differ and aren't stored (another base model) stay as they are.
    unstored: names in `expected` of what `computed` gave at the save and nothing holds; another version of a library
    may build a model without them, or with others.
    Raises Incompatible (names or shapes differ) or IncompleteRestore (no saved tensor leads to a live one).
    """
    live = {**live_tensors(model), **(empty or {})}
    _same_names(set(live) - (computed(model) - set(expected)), set(expected) - (set(unstored) - set(live)))
    expected = {name: want for name, want in expected.items() if name in live}
    places: dict[str, torch.Tensor | Stored] = {item.digest: item for item in stored}
    # What is trained has changed, so it isn't hashed to find that out; what isn't may be many gigabytes of a frozen
    # base that no checkpoint holds, or memory that can't be written to.
    waiting = {
        name: want
        for name, want in expected.items()
        if live[name].is_meta or (want in places and live[name].requires_grad) or not holds(live[name], want)
    }
    counts = {"unchanged": len(expected) - len(waiting), "copied": 0, "converted": 0}
    sources = {name: places[want] for name, want in waiting.items() if want in places}
    rest = {name: want for name, want in waiting.items() if name not in sources}
    if rest:
        saved = load()
        if not places:
            found = by_digest(saved.values(), rest.values())
            sources |= {name: found[want] for name, want in rest.items() if want in found}
    counts["copied"] = len(sources)
    if rest := {name: want for name, want in rest.items() if name not in sources}:
        for name, tensor in converted(model, saved).items():
            if name in rest and holds(tensor, rest[name]):
                sources[name] = tensor
                counts["converted"] += 1
    if allow_base:
        base = {name for name in waiting if not (live[name].requires_grad or live[name].is_meta)}
        other = {name for name in base if name not in sources}
        counts["different"] = len(other)
        waiting = {name: want for name, want in waiting.items() if name not in other}
    _all_found(waiting, sources, live)
    return Prepared(live, expected, sources, counts)


def computed(model: torch.nn.Module) -> set[str]:
    """Names of the buffers that aren't part of the model's state: made when it is built, as causal masks are."""
    buffers = {clean(name) for name in members(model)[1]}
    return buffers - {clean(name) for name in model.state_dict(keep_vars=True)} if buffers else buffers


def _same_names(live: set[str], saved: set[str]) -> None:
    if live != saved:
        raise Incompatible(
            f"the model's tensors differ from those in the checkpoint"
            f" (only in the run: {some(live - saved)}; only in the checkpoint: {some(saved - live)})",
            hint="build the same model and adapter (PEFT config, tied weights, new tokens) as when it was saved",
        )


def _all_found(
    waiting: Mapping[str, str], sources: Mapping[str, torch.Tensor | Stored], live: Mapping[str, torch.Tensor]
) -> None:
    other_shape = [
        f"{name} ({want.partition(':')[0]} saved, {signature(live[name])} here)"
        for name, want in waiting.items()
        if want.partition(":")[0] != signature(live[name])
    ]
    if other_shape:
        raise Incompatible(
            f"tensors of another shape or dtype than the checkpoint's: {some(other_shape)}",
            hint="use the model configuration, vocabulary and dtype of the saved run",
        )
    missing = [name for name in waiting if name not in sources]
    all_filled(missing, live)
    if missing:
        raise IncompleteRestore(
            f"{len(missing)} tensors of the model can't be brought back from the checkpoint: {some(missing)}",
            hint="frozen weights aren't stored with an adapter: start from the same base model as the saved run"
            " (allow_missing=['base_model'] goes on with this one)",
        )
