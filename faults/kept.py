"""Verdicts kept on disk while a lane runs, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

BUILD = Path("build/faults")
DOCS = Path(__file__).parent.parent / "docs"


def load(name: str) -> dict[str, str]:
    """point -> verdict; {} if there is nothing yet, or nothing that can be read."""
    try:
        found: dict[str, str] = json.loads((BUILD / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def store(name: str, found: dict[str, str]) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    new = BUILD / f"{name}.json.new"
    new.write_text(json.dumps(found, indent=1))
    os.replace(new, BUILD / f"{name}.json")


def publish(name: str, command: str, counts: Mapping[str, tuple[int, int]]) -> None:
    """What a lane has found, for the docs: what was tried -> (points, bad)."""
    rows = {what: {"points": points, "bad": bad} for what, (points, bad) in counts.items()}
    (DOCS / f"faults-{name}.json").write_text(f"{json.dumps({'command': command, 'tried': rows}, indent=1)}\n")


def sweep(
    name: str,
    points: Sequence[str],
    run: Callable[[str], str],
    console: Console,
    *,
    fresh: bool = False,
    settled: Callable[[str], bool] = lambda verdict: not verdict,
) -> dict[str, str]:
    """The verdicts of all points. Run are those without one, and those whose isn't settled: a fault may be mended."""
    found = {} if fresh else load(name)
    todo = [point for point in points if point not in found or not settled(found[point])]
    try:
        with Progress(console=console) as progress:
            for number, point in enumerate(progress.track(todo, description=name)):
                found[point] = run(point)
                if number % 20 == 0:
                    store(name, found)
                if not settled(found[point]):
                    progress.console.print(f"{point}: {found[point]}", highlight=False, markup=False)
    finally:
        store(name, found)
    return {point: found[point] for point in points}
