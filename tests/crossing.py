"""A run that one set of libraries writes and another reads: `python crossing.py write DIR`, then `read DIR`.

`write` leaves, for each case, a run that was killed at step 5 and what the same run comes to when nobody kills it.
`read` goes on with copies of the runs and says, as one line of JSON, whether each came to the same.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import Trainer

import lastgood

import forked
from training import Case, KillAt, outcome

CASES = {
    "full": Case("full", evaluate=True, noise="torch python numpy"),
    "adapter": Case("adapter", lora=True, rows=10),
}


def write(root: Path) -> None:
    root.mkdir(parents=True)
    for name, case in CASES.items():
        log = root / f"{name}.log"
        base = root / f"{name}-base.safetensors"
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / "a"
            assert forked.run(_train, case, base, whole, root / f"{name}.json", log=log) == 0, log.read_text()
        assert forked.run(_train, case, base, root / name, root / "x", 5, log=log) == -9, log.read_text()


def read(root: Path) -> dict[str, str]:
    """Case -> "exact", "continues" (restored whole, arithmetic differs), or what went wrong."""
    return {name: _read(root, name, case) for name, case in CASES.items()}


def _read(root: Path, name: str, case: Case) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        copy, result, log = Path(scratch) / "run", Path(scratch) / "r.json", Path(scratch) / "log"
        shutil.copytree(root / name, copy)
        if forked.run(_go_on, case, root / f"{name}-base.safetensors", copy, result, log=log) != 0:
            return log.read_text().strip().splitlines()[-1]
        same = json.loads(result.read_text()) == json.loads((root / f"{name}.json").read_text())
        return "exact" if same else "continues"


def _trainer(case: Case, base: Path, run: Path, kill: int | None = None) -> Trainer:
    """From one base in all versions: what a seed gives depends on how they draw it."""
    trainer = case.trainer(run, *([] if kill is None else [KillAt(kill)]))
    if not base.exists():
        save_file({name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}, base)
    trainer.model.load_state_dict(load_file(base), strict=False)
    return lastgood.manage(trainer)


def _train(case: Case, base: Path, run: Path, result: Path, kill: int | None = None) -> None:
    trainer = _trainer(case, base, run, kill)
    trainer.train(resume_from_checkpoint="auto")
    result.write_text(json.dumps(outcome(trainer)))


def _go_on(case: Case, base: Path, run: Path, result: Path) -> None:
    trainer = _trainer(case, base, run)
    trainer.train(resume_from_checkpoint="auto")
    report = trainer.resume_report  # type: ignore[attr-defined]
    parts = {part for part, _ in report.restored}
    assert report.step == 4 and trainer.state.global_step == 8 and not report.missing, report
    assert {"model", "optimizer", "scheduler", "rng", "data"} <= parts, parts
    result.write_text(json.dumps(outcome(trainer)))


if __name__ == "__main__":
    verb, directory = sys.argv[1:]
    if verb == "write":
        write(Path(directory))
    else:
        print(json.dumps(read(Path(directory))))
