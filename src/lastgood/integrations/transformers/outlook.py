"""At the start of train(): whether the checkpoints to come fit on the disk, by the tensors and the policy of this run.

Not at manage(): the optimizer, the length of the run and the step that it goes on from are known only now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lastgood.doctor.case import Case
from lastgood.doctor.diagnose import rule
from lastgood.doctor.finding import Finding
from lastgood.doctor.rule import Sight
from lastgood.errors import UsageError
from lastgood.integrations.transformers.preflight import tell
from lastgood.manager import RESERVE, Manager
from lastgood.model import Record
from lastgood.planner import live
from lastgood.planner.ahead import Ahead, Coming, ahead, steps_to_come
from lastgood.planner.sizes import LOG_ROW, Training, sizes
from lastgood.planner.suggest import suggest
from lastgood.policy import Keep
from lastgood.repo import bin
from lastgood.repo.free import free as free_for
from lastgood.repo.run import read_head
from lastgood.schedule import absolute_steps
from lastgood.talk import note, say
from lastgood.units import size

if TYPE_CHECKING:
    from lastgood.integrations.transformers.session import Session

LARGE = 1 << 30
"""Bytes of a save from which on the plan is always said (1 GiB)."""
SHARE = 5
"""... or from a fifth of the free space on."""
NO_ROOM = {"wait": "training waits where a save finds no room", "stop": "the run stops where a save finds no room"}
"""on_full -> what a plan that doesn't fit means; for the others such saves are left out."""
ENOUGH = 100
"""Saves that a policy has to get through to be suggested."""


def look_ahead(session: Session) -> None:
    """Warn of a disk that will be full, and say what a large run takes; never fails a training."""
    try:
        _look_ahead(session)
    except UsageError as error:
        note(f"no plan: {error.message}")
    except Exception as error:  # a forecast that goes wrong must not cost the run that it is about
        note(f"no plan: {type(error).__name__}: {error}")


def _look_ahead(session: Session) -> None:
    manager, keep = session.live, session.live.keep
    there = [record for record in manager.records() if record.ours and record.current]
    coming = saves_to_come(session.trainer, there, session.updates_per_epoch, paced=_paced(session))
    if not coming.steps or (keep.within is not None and coming.pace <= 0):
        return  # nobody knows yet how long a step takes
    own = sum(record.size for record in there)
    free = free_for(manager.root).bytes
    # What `prune` removed is emptied by a save that needs the space.
    space = free + own + bin.size(manager.root) - RESERVE
    found = ahead(coming, keep, space, there=there, head=read_head(manager.root, manager.run))
    if found.full_at is not None:
        tell(_finding(coming, keep, found, manager, there, free=free, space=space))
    elif coming.size > LARGE or found.peak * SHARE > free + own:
        count = len(coming.steps)
        say(
            f"plan: {count} checkpoint{'s' * (count > 1)} of {size(coming.size)}, at most {found.count} at a time:"
            f" {size(found.peak)} of {size(free + own)} {'free or its own' if own else 'free'}"
        )


def _paced(session: Session) -> int | None:
    """Steps between saves under save_steps="auto"; as long as nothing is measured, as if there were twenty in all."""
    tempo, state = session.occasions.tempo, session.trainer.state
    if tempo.wanted is None:
        return None
    return tempo.choice.steps if tempo.choice is not None else max(1, (state.max_steps - state.global_step) // 20)


def saves_to_come(trainer: Any, there: list[Record], per_epoch: int, *, paced: int | None = None) -> Coming:
    """When this run will save from here on, and how much. there: its checkpoints so far.

    paced: so many steps apart besides, whatever the arguments say of steps.
    Raises UsageError where the size can't be told, neither from the tensors nor from a checkpoint that is there.
    """
    args, at, end = trainer.args, trainer.state.global_step, trainer.state.max_steps
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    strategy = "steps" if paced is not None and strategy == "no" else strategy
    evaluated = live.evaluations(args, end, per_epoch)
    every = {"steps": paced or absolute_steps(args.save_steps, end), "epoch": per_epoch, "best": evaluated}.get(
        strategy
    )
    full, weights = _bytes(trainer, there, end)
    made = [record.manifest.created for record in there if record.manifest is not None]
    return Coming(
        steps=steps_to_come(strategy, every, at, end), end=end,
        full=None if args.save_only_model else full, weights=weights,
        evaluated=evaluated, improving=strategy == "best", now=made[-1] if made else 0.0,
        pace=max(0.0, (made[-1] - made[0]) / (len(made) - 1)) if len(made) > 1 else 0.0,
    )  # fmt: skip


def _bytes(trainer: Any, there: list[Record], end: int) -> tuple[int, int]:
    """(full, weights alone) of a save to come."""
    try:
        taken = sizes(live.model_of_trainer(trainer), Training(optim=live.optimizer_of(trainer)))
    except UsageError:
        last = next((record for record in reversed(there) if record.state == "full"), None)
        if last is None or last.manifest is None:
            raise
        model = sum(last.manifest.files[name].size for name in last.manifest.parts.get("model", ()))
        return last.size, model
    every = absolute_steps(trainer.args.logging_steps, end) if trainer.args.logging_strategy == "steps" else 0
    rows = LOG_ROW * (trainer.state.global_step + end) // 2 // every if every > 0 else 0
    return taken.full + rows, taken.weights + rows


def _finding(
    coming: Coming, keep: Keep, found: Ahead, manager: Manager, there: list[Record], *, free: int, space: int
) -> Finding:
    """CKS005, with a policy under which it fits."""
    own = sum(record.size for record in there)
    mine = f" besides {size(own)} of this run" if own else ""
    verb = "won't fit" if found.sure else "may not fit (it depends on which turn out to be the best)"
    history = list(coming.events(keep, falling=coming.improving))
    tried = suggest(history if keep.every is not None else history[: 2 * ENOUGH], keep, space)
    instead = " in place of save_total_limit" if keep.total is not None else ""
    fix = [f"keep={_as_code(one.keep)}{instead}: at most {size(one.peak)}" for one in tried]
    if not fix:
        fix = [f"make room: a save takes {size(coming.size)}, and {size(RESERVE)} are held in reserve"]
    last = coming.step(len(coming.steps) - 1)
    sight = Sight(
        where=str(manager.root),
        saw=f"the save at step {found.full_at} {verb}: each takes {size(coming.size)}, {size(free)} are free{mine},"
        f" {len(coming.steps)} saves are to come up to step {last}",
        means=f'with "{keep.describe()}" they take {size(found.peak)} at the most;'
        f" {NO_ROOM.get(manager.on_full or '', 'saves that find no room are left out')}",
        fix=tuple(fix),
    )
    return rule("CKS005").finding(Case(), sight, sight.where)


def _as_code(keep: Keep) -> str:
    return f"lastgood.Keep({', '.join(f'{name}={value!r}' for name, value in keep.options().items())})"
