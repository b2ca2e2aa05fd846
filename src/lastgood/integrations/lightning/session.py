"""One `fit` of a Lightning trainer: from the lock to the last deletion. Events come from callback.py."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lastgood.errors import NoCheckpoint, NotSupported, Preempted
from lastgood.integrations.lightning import about, metrics, moment, state
from lastgood.integrations.lightning.metrics import Fresh, Means
from lastgood.integrations.lightning.moment import Where
from lastgood.integrations.lightning.state import Moment, Weights
from lastgood.integrations.lightning.steady import steady
from lastgood.integrations.lightning.stream import Keeping, Watched, Watching, keeps_state
from lastgood.integrations.lightning.target import Landing, Target, verified
from lastgood.manager import Manager
from lastgood.model import Record, checkpoint_name
from lastgood.recovery import Found
from lastgood.repo import journal
from lastgood.repo.staging import Staging
from lastgood.report import Report
from lastgood.signals import Overheard
from lastgood.state import lightning as files
from lastgood.state import rng
from lastgood.state.fingerprint import live_tensors
from lastgood.state.lazy import Pace
from lastgood.state.steps import Steps
from lastgood.talk import say, warn


@dataclass(slots=True)
class Session:
    """Attributes are in the order in which a fit fills them."""

    manager: Manager
    weights_only: bool = False
    target: Target | None = None
    trainer: Any = None
    module: Any = None
    weights: Weights | None = None
    checkpoint: dict[str, Any] | None = None  # what Lightning was given to load
    landing: Landing | None = None
    resumed: int = -1  # the step that was resumed from
    report: Report | None = None
    watching: Watching = field(init=False)
    training: bool = False
    due: bool = False
    saved_step: int = 0
    clean: rng.Rng | None = None  # the generators where the last batch or validation began
    steps_before: int = 0  # global step when the batch under way began
    fresh: Fresh = field(default_factory=Fresh)
    noted: dict[str, float] = field(default_factory=dict)
    noted_step: int = -1
    means: Means | None = None
    staging: Staging | None = None
    now: Moment | None = None
    told: bool = False
    ending: bool = False  # the fit is over, whatever becomes of the save
    leave: Preempted | None = None  # raised because a save found no room
    overheard: Overheard = field(default_factory=Overheard)
    pace: Pace = field(default_factory=Pace)
    stack: ExitStack = field(default_factory=ExitStack)  # what lasts until the end of the fit

    def __post_init__(self) -> None:
        self.watching = Watching(self.fetching)
        self.manager.grace.since = lambda: self.overheard.at

    # ---- begin ---------------------------------------------------------------------------

    def find(self, what: Any) -> Target | None:
        """The newest good checkpoint of this directory; None if it has none at all, which is no error."""
        everything = self.manager.records()
        if not any(record.state in ("full", "weights", "incomplete") for record in everything):
            return None
        found: Found = self.manager.find(what)
        self.manager.quarantine(found.damaged)
        path = self.manager.root / found.record.name
        self.target = Target(path=path, record=found.record, own=True, skipped=found.skipped)
        return self.target

    def at(self, path: Path) -> Target:
        """The checkpoint with this path, verified. Raises CorruptCheckpoint or NoCheckpoint."""
        if self.target is not None and self.target.path.resolve() == path.resolve():
            return self.target
        record = verified(path, full=self.manager.verify == "full")
        own = path.resolve().parent == self.manager.root.resolve() and record.ours
        self.target = Target(path=path, record=record, own=own)
        return self.target

    def load(self, path: Path, trainer: Any) -> dict[str, Any]:
        """Lightning's dictionary for a resume from `path`; what Lightning can't restore exactly is kept back."""
        target = self.at(path)
        if target.record.state != "full":
            raise NoCheckpoint(
                f"{path} holds the weights alone: training can't go on from it",
                hint="name a full checkpoint, or load the weights: Model.load_from_checkpoint("
                f"lastgood.lightning_file({str(path)!r}))",
            )
        saved, tensors = files.read_json(path / files.RESUME), files.load(path / files.STATE, missing=True)
        if "lightning" not in saved:
            raise NotSupported(
                f"{path} wasn't written by a Lightning run; a Lightning trainer can't resume from it",
                hint="resume it with the kind of loop that wrote it, or load its weights",
            )
        self.landing = Landing(saved, tensors)
        self.checkpoint = files.read_whole(path, target.record.manifest.files if target.record.manifest else ())
        self.checkpoint["loops"] = {
            **self.checkpoint["loops"],
            "fit_loop": moment.arriving(saved["lightning"]["exact"], self.landing.where, stop_at=trainer.max_steps),
        }
        self.watching.resuming, self.watching.dormant = True, self.landing.where == "epoch"
        self.watching.train = [] if self.watching.dormant else self.landing.places("loaders")
        self.watching.evaluation = self.landing.places("evaluation") if self.landing.where == "validate" else []
        return self.checkpoint

    def begin(self, trainer: Any, module: Any) -> None:
        """Weights are loaded and optimizers exist: check what came, load what goes by name, begin the run."""
        self.model_ready(module)
        self.trainer, self.module = trainer, module
        target, landing = self.target, self.landing
        if target is None or landing is None:
            self._begin_fresh(trainer)
            return
        restored = [("model", self._restore_weights(target, landing))]
        restored += state.restore_optimizers(trainer.optimizers, live_tensors(module), landing.saved, landing.tensors)
        assert self.checkpoint is not None
        self.checkpoint["optimizer_states"] = []  # they are loaded, by parameter name and without casts
        state.restore_averages(trainer, landing.tensors)
        schedulers = landing.saved["schedulers"]
        if schedulers:
            restored.append(("scheduler", f"{len(schedulers)}"))
        consumed = landing.saved["data"]["consumed"]
        restored += [
            ("loops", {"batch": "between two batches", "validate": "before a validation"}.get(landing.where, "epoch")),
            ("rng", "python, numpy, torch"),
            ("data", f"epoch {landing.saved['progress']['epoch']}, batch {consumed}"),
        ]
        if target.own:
            self.manager.begin_from(target.record)
            self.manager.saved[target.record.step] = target.record
        else:
            self.manager.begin_fresh()
            journal.append(self.manager.door, "continued", source=target.path.name, step=target.record.step)
        self.saved_step = self.resumed = target.record.step
        left = landing.saved["lightning"]["left_out"]
        self.report = Report(
            source=target.path.name,
            step=target.record.step,
            restored=tuple(restored),
            skipped=target.skipped,
            notes=(
                *(() if target.own else ("a checkpoint of another run: its state is continued here as a new run",)),
                *((f"hyper-parameters that were not stored: {', '.join(left)}",) if left else ()),
            ),
        )

    def started(self) -> None:
        """The loaders are there: say what came back and what is different now."""
        self.training = True
        self.overheard.begin()
        self.stack.enter_context(Steps(self.manager, self._steady, self.pace).heard())
        if self.report is not None and self.target is not None and self.target.record.manifest is not None:
            changed = about.changes(self.target.record.manifest, about.facts(self.trainer, self.module))
            self.report = replace(self.report, changed=tuple(changed))
            say(str(self.report))

    def _begin_fresh(self, trainer: Any) -> None:
        there = [record.name for record in self.manager.records() if record.ours]
        if there and not trainer.ckpt_path:
            say(
                f"starting a new run although {self.manager.root} holds {len(there)} checkpoints of an earlier one"
                f" ({', '.join(there[-3:])}): they stay as they are; trainer.fit(ckpt_path='last') continues from them"
            )
        self.manager.begin_fresh()
        if trainer.ckpt_path:
            journal.append(self.manager.door, "continued", source=str(trainer.ckpt_path), step=trainer.global_step)

    def model_ready(self, module: Any) -> None:
        """The model is built and nothing was loaded into it yet."""
        if self.weights is None:
            self.weights = Weights.begin(module)

    def _restore_weights(self, target: Target, landing: Landing) -> str:
        assert self.weights is not None
        counts = self.weights.restore(self.module, target.path, landing.tensors)
        return f"all {sum(counts.values())} tensors proven"

    def _steady(self) -> list[Any]:
        return steady(self.trainer, self.module, self.now.where) if self.now is not None else []

    # ---- arriving ------------------------------------------------------------------------

    def land(self) -> None:
        """The loops are at the line where the save was made: everything becomes exactly as it was there."""
        landing, self.landing = self.landing, None
        assert landing is not None
        trainer, mine = self.trainer, landing.saved["lightning"]
        moment.land(trainer.fit_loop, mine["exact"])
        trainer.should_stop = mine["should_stop"]
        for loop, name in state.reloads(trainer):
            setattr(loop, name, mine["reloads"][name])
        self.watching.resuming = self.watching.dormant = False
        for loader in loaders(trainer.fit_loop):
            if type(loader) is Keeping and not keeps_state(loader.loader):
                loader.__class__ = Watched  # type: ignore[assignment]
        for loader, place in zip(loaders(trainer.fit_loop), landing.places("loaders"), strict=False):
            loader.set_own(place.own)  # also of one that isn't read any more in this epoch
        if landing.where != "validate":
            validation = loaders(trainer.fit_loop.epoch_loop.val_loop)
            for loader, place in zip(validation, landing.places("evaluation"), strict=False):
                loader.set_own(place.own)
        self.means = metrics.restore(trainer, self.module, mine["metrics"], landing.tensors)
        if landing.where == "epoch":
            self.means = None
        live = live_tensors(self.module)
        for name in mine["gradients"]:
            parameter = live[name]
            parameter.grad = landing.tensors[f"gradient.{name}"].to(parameter.device)
        state.wake_averaging(trainer, self.module, landing.saved, landing.tensors, inside=landing.where != "epoch")
        for problem in rng.restore(rng.decode(landing.saved["rng"])):
            say(problem)
        self.checkpoint = None

    def fetching(self, number: int) -> None:
        """A batch is about to be fetched: everything about the one before is done."""
        if not self.training:
            return  # Lightning looks ahead before the loops begin
        if self.landing is not None:
            self.land()
        elif self.due:
            self.save("batch", ahead=self._ahead(popped=True))
        self.clean = rng.capture()

    def _ahead(self, *, popped: bool = False) -> int:
        """Batches that were fetched and not trained on: Lightning keeps one where it doesn't know the length."""
        fetcher = self.trainer.fit_loop._data_fetcher
        return len(getattr(fetcher, "batches", ())) + int(popped and fetcher is not None and fetcher.length is None)

    # ---- saving --------------------------------------------------------------------------

    def save(self, where: Where, *, ahead: int = 0, ended: bool = False, clean: bool = True) -> Record | None:
        """The checkpoint of the current step, then retention. clean: not in the middle of a batch or validation."""
        trainer, step = self.trainer, self.trainer.global_step
        self.due = False
        if step == self.saved_step:
            return None
        loop = trainer.fit_loop
        batches = loop.epoch_loop.batch_progress.current
        undone = where == "batch" and batches.ready > batches.processed
        if undone:
            ahead = int(loop._data_fetcher.length is None)
        drawn = rng.capture()
        self.now = Moment(
            where=where,
            counters=moment.exact(
                loop.state_dict(), where, ended=ended, stepped=not loop.epoch_loop._should_accumulate()
            ),
            rng=drawn if clean or self.clean is None else self.clean,
            train=[loader.position(ahead, undone=undone) for loader in loaders(loop)],
            evaluation=[loader.beginning() for loader in loaders(loop.epoch_loop.val_loop)],
            accumulating=where == "batch" and self._accumulating(),
        )
        record = self.manager.save(
            step,
            self._write,
            estimate=state.estimate(trainer, self.module, full=not self.weights_only),
            environment=about.environment(),
            arguments=about.arguments(trainer, self.module),
            facts=about.facts(trainer, self.module),
            now=self.ending,
            skip=where == "batch",
        )
        rng.restore(drawn)  # whatever the hooks of a save may have drawn
        self.now = None
        if record is None:
            if self.manager.space.lack is not None and not self.ending:
                self._stop(step)
            return None
        self.saved_step = step
        if self.noted_step == step and self.noted:
            self.manager.record(step, self.noted)
        self.manager.retain()
        return record

    def heed(self) -> None:
        """What failed behind training's back is told; the run may have to stop for it."""
        self.manager.heed()
        self.manager.warm(lambda: state.estimate(self.trainer, self.module, full=not self.weights_only))
        self._saved_at_all()
        if self.manager.space.lack is not None and not self.ending:
            self._stop(self.trainer.global_step)

    def _saved_at_all(self) -> None:
        if self.saved_step > 0 and self.saved_step not in self.manager.saved:
            self.saved_step = max(0, self.resumed)  # the save of that step came to nothing
        self.due = self.due or bool(self.manager.owed)  # its copy was spoilt: the state of now goes in its place

    def settle(self) -> None:
        """Wait for the save under way; what became of it is told."""
        self.manager.settle()
        self._saved_at_all()

    def settle_whatever(self) -> None:
        """What becomes of the save under way must not keep the last one from being tried."""
        try:
            self.manager.settle()
        except Exception as failed:
            warn(str(failed))
        self._saved_at_all()

    def _stop(self, step: int) -> None:
        why = f"stopped (no room for the checkpoint of step {step}) at step {step}"
        say(f"{why}; the same command continues with ckpt_path='last'")
        self.leave = Preempted(f"{why}; relaunch to continue")
        raise self.leave from self.manager.space.lack

    def _accumulating(self) -> bool:
        """Whether gradients wait for the next optimizer step."""
        loop = self.trainer.fit_loop
        if self.module.automatic_optimization:
            return bool(loop._should_accumulate())
        return bool(self.steps_before == self.trainer.global_step)

    def _write(self, staging: Staging) -> None:
        self.staging = staging
        try:
            # Lightning collects, with all its hooks, and hands over to our CheckpointIO, which calls `write`.
            path = self.manager.root / checkpoint_name(self.trainer.global_step)
            self.trainer.save_checkpoint(path, weights_only=self.weights_only)
        finally:
            self.staging = None

    def write(self, checkpoint: Mapping[str, Any]) -> None:
        """Stage what Lightning collected."""
        assert self.staging is not None
        assert self.now is not None
        assert self.weights is not None
        left = state.write(self.staging, checkpoint, self.trainer, self.module, self.now, self.weights)
        if left and not self.told:
            self.told = True
            for name, why in left.items():
                say(f"hyper-parameter {name!r} is not stored ({why}); give it to load_from_checkpoint")

    def note(self, values: Mapping[str, float]) -> None:
        """Metrics of the current step: they belong to the checkpoint of this step and to no other."""
        step = self.trainer.global_step
        if self.noted_step != step:
            self.noted, self.noted_step = {}, step
        self.noted |= values
        if values and step in self.manager.saved:
            self.manager.record(step, values)
            self.manager.retain()

    # ---- end -----------------------------------------------------------------------------

    def close(self, event: str, **facts: str) -> None:
        if self.landing is not None and event == "finished":
            # Nothing was left to train, so nothing was fetched: whoever goes on behind it has the run's own generators.
            rng.restore(rng.decode(self.landing.saved["rng"]))
        self.training = False
        try:
            self.stack.close()
        finally:
            self.manager.close(event, **facts)
            self.overheard.end()


def loaders(loop: Any) -> list[Watched]:
    """The followed loaders of a loop, in Lightning's order."""
    combined = loop._combined_loader
    return [] if combined is None else [loader for loader in combined.flattened if isinstance(loader, Watched)]
