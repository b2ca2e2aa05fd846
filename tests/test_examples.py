"""The examples are real programs: killed in the middle of a step and launched again, they end where they would have."""

from __future__ import annotations

import importlib
import inspect
import os
import random
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import lastgood

import forked
from training import digest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

ROWS: dict[str, tuple[int, int]] = {
    "accelerate_loop.py": (45, 31),
    "plain_loop.py": (30, 27),
    "two_models.py": (24, 37),
    "trainer.py": (16, 13),
}
"""example -> its steps, and the update of an optimizer behind which it is killed."""


def die_behind(update: int) -> None:
    """SIGKILL to this process when its optimizers have made so many updates: the step isn't complete then."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made == update:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)


def command(example: str, out: Path, steps: int, kill: int = 0) -> None:
    """As `python examples/...` does it, without paying for the imports again.

    A new run begins with the same generators each time, those that the example leaves alone included; any other
    launch with generators that have nothing to do with it.
    """
    random.seed(None if out.exists() else 0)
    np.random.seed(None if out.exists() else 0)
    torch.set_num_threads(1)
    if kill:
        die_behind(kill)
    sys.argv = [example, str(out), "--steps", str(steps)]
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")


def files(run: Path) -> dict[str, bytes]:
    """Weights, the optimizers' state, schedules, generators and the place in the data of the last step, as bytes."""
    last = run / lastgood.open(run).latest().name
    return {file.name: file.read_bytes() for file in last.glob("*") if file.suffix == ".safetensors"} | {
        "resume.json": (last / "resume.json").read_bytes(),
        "tensors.json": (last / "tensors.json").read_bytes(),
    }


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What the examples import, and what torch imports with the first optimizer: once, for all processes."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    torch.optim.SGD([torch.zeros(1)])


@pytest.mark.parametrize("example", ROWS)
def test_an_example_that_is_killed_ends_as_if_it_never_was(example: str, tmp_path: Path) -> None:
    steps, kill = ROWS[example]
    log = tmp_path / "log"
    assert forked.run(command, example, tmp_path / "whole", steps, log=log) == 0, log.read_text()
    assert forked.run(command, example, tmp_path / "killed", steps, kill, log=log) == -signal.SIGKILL, log.read_text()
    assert 0 < lastgood.open(tmp_path / "killed").latest().step < steps
    assert forked.run(command, example, tmp_path / "killed", steps, log=log) == 0, log.read_text()
    assert [r.step for r in lastgood.open(tmp_path / "killed").checkpoints][-1] == steps
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def train(name: str, out: Path, result: Path, kill: int = 0) -> None:
    """The example's loop; a hash of the weights at its end goes to `result`."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    loop = importlib.import_module(name)
    if kill:
        die_behind(kill)
    result.write_text(digest(loop.train(str(out), 30).state_dict()))


def ends(name: str, where: Path) -> list[str]:
    """What the weights are at the end: of a run that nobody disturbed, and of one that was killed at step 27."""
    results = []
    for run, kills in (("whole", (0,)), ("killed", (27, 0))):
        for kill in kills:
            args = (name, where / name / run, where / "result", kill)
            status = forked.run(train, *args, log=where / "log")
            assert status == (-signal.SIGKILL if kill else 0), (where / "log").read_text()
        results.append((where / "result").read_text())
    return results


def test_the_loop_with_torch_save_goes_on_to_somewhere_else(tmp_path: Path) -> None:
    whole, killed = ends("torch_save_loop", tmp_path)
    assert (tmp_path / "torch_save_loop" / "killed" / "ckpt.pt").exists()
    assert killed != whole


def test_the_page_shows_the_two_loops_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    page = (ROOT / "docs" / "loop.md").read_text()
    ours, theirs = (
        inspect.getsource(importlib.import_module(name).train) for name in ("plain_loop", "torch_save_loop")
    )
    assert f"```python\n{ours}```" in page
    assert f"```python\n{theirs}```" in page
    assert len(ours.splitlines()) <= len(theirs.splitlines()) + 3
    assert f"{len(ours.splitlines())} lines instead of {len(theirs.splitlines())}" in page


def test_each_example_is_described() -> None:
    page = (EXAMPLES / "README.md").read_text()
    assert not [file.name for file in EXAMPLES.glob("*.py") if f"`{file.name}`" not in page]
