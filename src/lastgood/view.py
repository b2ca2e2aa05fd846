"""A run as people look at it: managed or not, every tool's checkpoints in one list. Read-only, without torch.

A checkpoint that another tool wrote gets the record it would have if it were adopted, so that
`latest`, `best` and a policy can be asked about it. Only retention keeps to what is really ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lastgood import policy
from lastgood.errors import LastgoodError
from lastgood.model import TRAINERS, FileEntry, Manifest, Record
from lastgood.policy import Keep
from lastgood.ranking import Mode, known_mode
from lastgood.repo import pins
from lastgood.repo.layout import HIDDEN, step_of
from lastgood.repo.protect import protected
from lastgood.repo.read import identify, records, whole
from lastgood.repo.run import read_policy
from lastgood.store import local

if TYPE_CHECKING:
    from lastgood.layouts.found import Found

LONGEST = 200
"""Characters in the name of a metric that is looked at: what a name means takes the square of its words."""


class View(msgspec.Struct, frozen=True):
    """native: what is on disk by the one definition. records: the same and other tools' checkpoints, all readable.

    monitor, mode: the metric that "best" means. keep: the run's own policy, if it is known. sure: see `look`.
    """

    root: Path
    native: tuple[Record, ...]
    records: tuple[Record, ...]
    found: Mapping[str, Found] = {}
    monitor: str | None = None
    mode: Mode | None = None
    keep: Keep | None = None
    notes: Mapping[str, str] = {}
    sure: bool = False

    @property
    def run(self) -> str | None:
        """The id of the managed run; None for one that isn't managed."""
        return identify(self.root)

    @property
    def protect(self) -> Mapping[str, str]:
        """id -> why it stays, whatever the policy says."""
        return protected(self.root, self.native, self.run)

    @property
    def metric(self) -> dict[str, Any]:
        """The options monitor and mode of a policy that ranks as the run does, by all metrics of its own policy."""
        if self.keep is not None and self.keep.monitors:
            return {"monitor": self.keep.monitor, "mode": self.keep.mode}
        return {} if self.monitor is None else {"monitor": self.monitor, "mode": self.mode}

    @property
    def layout(self) -> str:
        """The tool that wrote the run: "lastgood", or another's name."""
        kinds = {record.layout or "lastgood" for record in self.records if record.state != "foreign"}
        return "lastgood" if "lastgood" in kinds or not kinds else sorted(kinds)[0]

    def path(self, record: Record) -> Path:
        return self.root / record.name

    def adopted_or_ours(self, record: Record) -> bool:
        """Whether it carries a manifest of this run."""
        return bool(record.id) and record.ours

    def decisions(self) -> tuple[policy.Decision, ...]:
        """What the run's own policy says of each checkpoint now: why it is kept."""
        keep = self.keep or Keep(monitor=self.monitor, mode=self.mode)
        return policy.decide(self.records, keep, protect=self.protect)

    def problems(self, record: Record, *, full: bool, progress: Any = None) -> tuple[str, ...]:
        """What is wrong with a checkpoint: by its hashes if it has any, by its structure otherwise."""
        if record.name in self.found:
            from lastgood.layouts import scan

            return scan.problems(self.path(record), record.layout, full=full)
        if record.state == "foreign" and record.manifest is not None:
            record = msgspec.structs.replace(record, state="full")
        from lastgood.repo import verify

        return verify.problems(self.root, record, full=full, sure=self.sure, progress=progress)

    def arguments(self, record: Record) -> Mapping[str, object]:
        """The training arguments that it was saved under."""
        if record.name in self.found or record.layout:
            return _trainer_arguments(self.path(record), record.layout)
        return record.manifest.arguments if record.manifest is not None else {}


def look(root: Path, *, outline: bool = False, sure: bool = False) -> View:
    """Everything there is in a run directory. outline: without arguments and environment, for listings.

    sure: whoever goes on from it, or deletes: raise Unreadable if something couldn't be looked at just now.
    """
    native = records(root, outline=outline, sure=sure)
    found = _others(root, native)
    managed = any(record.ours for record in native)
    order = sorted(found, key=lambda name: (found[name].step, name))
    others = {name: _record(name, found[name], place, managed) for place, name in enumerate(order, 1)}
    everything = [others.get(record.name, record) for record in native]
    there = {record.name for record in native}
    everything += [record for name, record in others.items() if name not in there]
    everything.sort(key=lambda record: (record.step, record.seq, record.name))
    keep = own_policy(root)
    monitor, mode = _metric(root, everything, keep)
    return View(root, native, tuple(everything), found, monitor, mode, keep, pins.read_notes(root), sure)


def _others(root: Path, native: Sequence[Record]) -> dict[str, Found]:
    """Name in the run -> what another tool wrote there."""
    stock = [record.name for record in native if record.state == "stock"]
    if not stock and all(step_of(name) is not None or name == HIDDEN for name in local.names(root)):
        return {}  # a managed run, mostly: no need to know any other tool
    from lastgood.layouts import scan

    found = {name: scan.look(root / name) for name in stock}
    return found | {item.path.relative_to(root).as_posix(): item for item in scan.scan(root)}


def _trainer_arguments(path: Path, layout: str) -> Mapping[str, object]:
    if layout not in TRAINERS:
        return {}
    from lastgood.layouts import trainer

    return trainer.arguments(path)


def _record(name: str, item: Found, place: int, managed: bool) -> Record:
    manifest = Manifest(
        format=0,
        id="",
        run="",
        step=max(item.step, 0),
        seq=place,
        lineage=((1, place),),
        created=item.created,
        parts=dict(item.parts),
        files={file: FileEntry(size) for file, size in item.files.items()},
        facts={} if item.loss is None else {"loss": item.loss},
        layout=item.layout,
    )
    state: Any = item.state
    return Record(
        name=name,
        step=item.step,
        state=state,
        manifest=manifest,
        metrics=item.metrics,
        current=not managed,
        problem=item.problem,
        layout=item.layout,
    )


def own_policy(root: Path) -> Keep | None:
    """What the run was last started with; None if that isn't known."""
    options: dict[str, Any] = read_policy(root)
    named = options.get("monitor", "")
    if any(len(str(name)) > LONGEST for name in (named if isinstance(named, list) else [named])):
        return None
    try:
        return Keep(**options) if options else None
    except (LastgoodError, TypeError):  # written by a version with other options
        return None


def _metric(root: Path, everything: Sequence[Record], keep: Keep | None) -> tuple[str | None, Mode | None]:
    """The policy's metric, else that in the newest checkpoint's arguments, else a well-known one that is recorded."""
    if keep is not None and keep.monitors:
        return keep.primary
    newest = max((r for r in everything if r.ours), key=lambda r: (r.current, r.seq), default=None)
    if newest is None:
        return None, None
    saved = _arguments(root, newest)
    name = saved.get("metric_for_best_model")
    if isinstance(name, str) and 0 < len(name) <= LONGEST:
        greater = saved.get("greater_is_better")
        mode: Mode | None = known_mode(name) if greater is None else "max" if greater else "min"
        full = name if any(name in r.metrics for r in everything) else f"eval_{name.removeprefix('eval_')}"
        return full, mode
    recorded = {metric for record in everything for metric in record.metrics if len(metric) <= LONGEST}
    for metric in ("eval_loss", "val_loss", *sorted(recorded)):
        if metric in recorded and known_mode(metric) is not None:
            return metric, known_mode(metric)
    return None, None


def _arguments(root: Path, record: Record) -> Mapping[str, object]:
    if record.layout:
        return _trainer_arguments(root / record.name, record.layout)
    full = whole(root, record)
    return full.arguments if full is not None else {}
