"""A plan as a picture: disk use of each system, and which checkpoint is there from when to when. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lastgood.errors import UsageError
from lastgood.planner.outcome import Crash, Outcome
from lastgood.planner.plan import Plan
from lastgood.units import size

KINDS = (".png", ".svg", ".pdf")
COLOURS = {"lastgood": "#1b6ca8", "Trainer": "#d1603d", "Trainer, load_best": "#7a4fa3"}
PALE, BEST, CRASH, LIMIT = 0.35, "#e8a200", "#333333", "#b00020"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
"""Of the axis of bytes, by powers of 1024."""


def check(path: Path) -> None:
    """Raise UsageError for a kind of file that isn't drawn."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path.name!r}: a picture is one of {', '.join(KINDS)}", hint="--plot - draws it as text")


def draw(plan: Plan, path: Path) -> None:
    """Write the picture. Raises UsageError for another kind of file, or where matplotlib isn't installed."""
    check(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "a picture needs matplotlib", hint="pip install 'lastgood[plot]'; --plot - needs nothing"
        ) from None
    outcomes = plan.outcomes
    panels = [1.6, *(max(0.9, min(1.6, 0.06 * len(o.lives))) for o in outcomes)]
    figure = Figure(figsize=(10, 2.2 * sum(panels) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=panels)
    figure.suptitle(_title(plan), fontsize=11, x=0.01, ha="left")
    _use(axes[0], plan)
    for axis, outcome in zip(axes[1:], outcomes, strict=True):
        _timeline(axis, outcome, plan.schedule.max_steps)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(0, plan.schedule.max_steps * 1.01)
    figure.align_ylabels(axes)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror or error}") from None


def _title(plan: Plan) -> str:
    about = f"{plan.model}, {plan.training.train}, {plan.training.optim}: {size(plan.sizes.full)} a checkpoint"
    return f"{about}\n{plan.lastgood.policy}"


def _use(axis: Any, plan: Plan) -> None:
    """Bytes over steps; the thin spikes are the saves: a new checkpoint is there before an old one goes."""
    top = max([1, *(o.peak for o in plan.outcomes)])
    power = max(p for p in range(len(UNITS)) if p == 0 or top >= 1024**p)
    scale = 1024.0**power
    drawn: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in plan.outcomes:  # curves that lie on each other are one, with both names
        drawn.setdefault(_coarse(outcome), []).append(outcome)
    for same in drawn.values():
        outcome, last = same[0], plan.schedule.max_steps
        steps, held = [0], [0.0]
        for use in outcome.uses:
            steps += [use.step, use.step, use.step]
            held += [held[-1], use.peak / scale, use.bytes / scale]
        steps.append(max(last, steps[-1]))
        held.append(held[-1])
        colour, style = COLOURS[outcome.name], "-" if outcome.system == "lastgood" else "--"
        names = " = ".join(o.name for o in same)
        axis.plot(steps, held, style, color=colour, lw=1.4, label=f"{names}: peak {size(outcome.peak)}")
        if outcome.peak_at is not None:
            axis.plot([outcome.peak_at], [outcome.peak / scale], "v", color=colour, ms=6, zorder=4)
    room = None if plan.machine.disk is None else (plan.machine.disk - plan.machine.used) / scale
    if room is not None and room < 3 * top / scale:
        axis.axhline(room, color=LIMIT, lw=1.2, ls=":", label=f"room on the disk: {size(round(room * scale))}")
    crash = plan.lastgood.crash
    if crash is not None:
        axis.axvline(crash.step, color=CRASH, lw=1, ls="-.", label=f"crash at step {crash.step}")
    axis.set_ylabel(f"on disk, {UNITS[power]}")
    axis.set_ylim(0, max([top / scale, *([room] if room is not None and room < 3 * top / scale else [])]) * 1.08)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, fontsize=8, frameon=False)


def _coarse(outcome: Outcome) -> tuple[Any, ...]:
    """The curve to a thousandth of its height: files of the same parts differ by a few bytes."""
    unit = max(1, outcome.peak // 1000)
    return tuple((use.step, round(use.peak / unit), round(use.bytes / unit)) for use in outcome.uses)


def _timeline(axis: Any, outcome: Outcome, last: int) -> None:
    """One bar per checkpoint, from its save until it is deleted; pale where its weights alone are left."""
    colour = COLOURS[outcome.name]
    gap = last / max(1, len(outcome.lives))
    for life in outcome.lives:
        end = last * 1.01 if life.until is None else life.until
        middle = end if life.weights_from is None else life.weights_from
        axis.barh(life.step, middle - life.step, left=life.step, height=gap * 0.7, color=colour, lw=0)
        if middle < end:
            axis.barh(life.step, end - middle, left=middle, height=gap * 0.7, color=colour, alpha=PALE, lw=0)
    if outcome.crash is not None:
        _mark(axis, outcome.crash, last)
    axis.set_ylabel("checkpoint")
    axis.set_ylim(-gap, last + gap)
    stripped = any(life.weights_from is not None for life in outcome.lives)
    axis.set_title(
        f"{outcome.name} ({outcome.policy})" + (", pale: the weights alone" if stripped else ""), fontsize=9, loc="left"
    )
    axis.grid(axis="x", alpha=0.3)


def _mark(axis: Any, crash: Crash, last: int) -> None:
    """Where the crash is, what a relaunch resumes from, and what is the best."""
    axis.axvline(crash.step, color=CRASH, lw=1, ls="-.")
    if crash.resume is not None:
        axis.plot([crash.step], [crash.resume], ">", color=CRASH, ms=8, zorder=5, label=f"resume from {crash.resume}")
    if crash.best is not None:
        axis.plot(
            [crash.step], [crash.best], "*", color=BEST, mec=CRASH, mew=0.5, ms=13, zorder=6,
            label=f"best there: {crash.best}",
        )  # fmt: skip
    axis.legend(loc="upper left", fontsize=8, framealpha=0.9)  # where no bar can be
