"""Where in Lightning's loops a save happens, and which counters lead a resumed run back to that very line.

Lightning can start its loops again from counters, but not everywhere: from a state between two batches
it steps some schedulers twice, and from one before a validation it leaves that validation out. So a
checkpoint holds the counters twice: `arriving`, which Lightning's own restart takes to the right line
without side effects, and `exact`, which replaces them there.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

Where = Literal["batch", "validate", "epoch"]
"""batch: before a batch is fetched; validate: before the validation of a step; epoch: before an epoch or at the end."""

BATCHES = "epoch_loop.batch_progress"
VALIDATION = "epoch_loop.val_loop.batch_progress"
EPOCHS = "epoch_progress"
STEPS = ("epoch_loop.automatic_optimization.optim_progress", "epoch_loop.manual_optimization.optim_step_progress")
STATE, LOGGED = "state_dict", "epoch_loop.state_dict"

JSON = dict[str, Any]


def exact(state: JSON, where: Where, *, ended: bool = False, stepped: bool = False) -> JSON:
    """The counters of the fit loop as they have to be when the resumed run arrives at the same line.

    state: fit_loop.state_dict(). ended: the loop has announced the end of an epoch that isn't finished (max_steps).
    stepped: the batch under way ends with an optimizer step, which Lightning counts for loggers when all is over.
    """
    found = copy.deepcopy(state)
    found.get(STATE, {}).pop("combined_loader", None)  # where the data stands is kept elsewhere, exactly
    epochs = found[EPOCHS]
    for count in (epochs["total"], epochs["current"]):
        if where == "epoch":
            # Whatever hooks were still to come: the next thing that happens is that an epoch begins.
            count.update(ready=count["completed"] + 1, started=count["completed"], processed=count["completed"])
        elif ended:
            count["processed"] = count["completed"]
    if where != "epoch":
        # Inside a batch: it is done again. Its hooks are still running: they aren't called again.
        batches = found[BATCHES]
        found[LOGGED]["_batches_that_stepped"] += int(
            stepped and batches["total"]["processed"] > batches["total"]["completed"]
        )
        for count in (batches["total"], batches["current"]):
            done = count["processed"]
            count.update(ready=done, started=done, completed=done)
    return found


def arriving(counters: JSON, where: Where, *, stop_at: int) -> JSON:
    """Counters that Lightning's own restart takes to that line. stop_at: max_steps, -1 for none."""
    found = copy.deepcopy(counters)
    batches, validation = found[BATCHES], found[VALIDATION]
    if where == "epoch":
        for count in (found[EPOCHS]["total"], found[EPOCHS]["current"]):
            count["ready"] = count["completed"]
        for name, value in found.items():
            if name != EPOCHS:
                _zero_current(value)
        batches["is_last_batch"] = False
    elif where == "batch":
        # As if it were saved in on_train_batch_end: from there Lightning goes on to the next batch.
        for count in (batches["total"], batches["current"]):
            count["completed"] -= 1
    else:
        # As if the validation were interrupted in its first batch: Lightning goes back and runs it.
        validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        validation["current"] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
        validation["is_last_batch"] = False
        if 0 <= stop_at <= steps(found):
            # The validation of the last step: with all steps taken Lightning wouldn't even begin.
            found[STEPS[0]]["optimizer"]["step"]["total"]["completed"] -= 1
            found[STEPS[1]]["total"]["completed"] -= 1
    return found


def steps(counters: JSON) -> int:
    """Optimizer steps: one of the two ways of counting is zero."""
    automatic, manual = (counters[name] for name in STEPS)
    return max(int(automatic["optimizer"]["step"]["total"]["completed"]), int(manual["total"]["completed"]))


def _zero_current(value: Any) -> None:
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        if name == "current":
            inner.update(dict.fromkeys(inner, 0))
        else:
            _zero_current(inner)


def land(fit_loop: Any, counters: JSON) -> None:
    """Set the loops to exactly these counters; nothing is left of the restart."""
    fit_loop.load_state_dict(counters)
    settle(fit_loop)


def settle(loop: Any) -> None:
    """The loops go on as if they had never been restarted."""
    loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    loop.reset_restart_stage()
    for inner in vars(loop).values():
        if hasattr(inner, "reset_restart_stage") and inner is not loop:
            settle(inner)
