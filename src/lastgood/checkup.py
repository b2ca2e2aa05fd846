"""What is wrong with the numbers of a checkpoint: by the trail of its run, and by its tensors. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lastgood import health
from lastgood.errors import CorruptCheckpoint
from lastgood.format import archive, finite
from lastgood.format.finite import Stretch
from lastgood.format.tensors import read_header
from lastgood.health import Sample
from lastgood.model import Record
from lastgood.repo import trail
from lastgood.repo.trail import Life
from lastgood.view import View

PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def samples(life: Life, upto: int | None = None) -> Iterator[Sample]:
    """The steps of one process, as the guard looks at them."""
    for entry in life.entries:
        if upto is None or entry.step <= upto:
            yield Sample(entry.step, entry.loss, entry.grad_norm, entry.skipped)


def before(lives: Sequence[Life], checkpoint: str) -> list[Sample]:
    """The steps on the way to the checkpoint with this id, over all processes that made them."""
    makers = {id: (life, step) for life in lives for id, step in life.saves.items()}
    pieces: list[list[Sample]] = []
    seen: set[int] = set()
    while checkpoint in makers and makers[checkpoint][0].number not in seen:
        life, step = makers[checkpoint]
        seen.add(life.number)
        pieces.append([sample for sample in samples(life, step) if sample.step > life.start])
        checkpoint = life.checkpoint
    return [sample for piece in reversed(pieces) for sample in piece]


def watch(way: Sequence[Sample]) -> health.Watch:
    """A watch that knows where a run began and how its last steps were."""
    known = health.Watch()
    end = max(health.BASE, len(way) - 2 * health.WINDOW)
    known.add([*way[: health.BASE], *way[end:]])
    return known


def by_trail(root: Path) -> Mapping[str, str]:
    """checkpoint id -> why the losses say that it is poisoned; what is healthy, or unknown, isn't in it."""
    lives = trail.read(root)
    found: dict[str, str] = {}
    for life in lives:
        if not life.saves:
            continue
        sick = health.periods(samples(life), watch(before(lives, life.checkpoint)))
        for id, step in life.saves.items():
            reason = next((why for first, last, why in sick if first <= step <= last), "")
            if reason:
                found[id] = reason
    return found


def by_tensors(view: View, record: Record) -> tuple[str, ...]:
    """The tensors of a checkpoint, of model and optimizer, that hold NaN or infinity; all bytes are read.

    Raises CorruptCheckpoint for a file that can't be read.
    """
    found: list[str] = []
    base = view.path(record)
    for name in record.manifest.files if record.manifest is not None else ():
        path = base if base.is_file() else base / name
        try:
            bad, _ = finite.look(path, _stretches(path), None)
        except OSError as error:
            raise CorruptCheckpoint(f"{path} can't be read: {error.strerror or error}") from error
        found += [f"{item.name} in {name}: {item.count} of {item.looked_at} are {item.first}" for item in bad]
    return tuple(found)


def _stretches(path: Path) -> Iterable[Stretch]:
    if path.suffix == ".safetensors":
        return [Stretch(key, slot.dtype, slot.begin, slot.end) for key, slot in read_header(path).slots.items()]
    if path.suffix not in PICKLED:
        return []
    try:
        refs = list(archive.tensors(archive.load(path)))
    except (CorruptCheckpoint, ValueError, RecursionError):
        return []  # our guards against a stock Trainer, and pickles that aren't archives
    return [Stretch(key, ref.dtype, ref.begin, ref.begin + ref.bytes) for key, ref in refs if ref.contiguous]
