"""SIGKILL at many random moments of the demo's training, relaunched by the same command each time, then compared.

    scripts/kills [--kills 60] [--full]

Every second kill waits for a save to be under way. A run is killed until it gets through; then a new one begins.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from demo.__main__ import newest, said, staging
from demo.base import prepare


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--place", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    console, rng = Console(), random.Random(args.seed)
    base = prepare(args.place, steps=80)
    straight = args.place / "kills-straight"
    shutil.rmtree(straight, ignore_errors=True)
    assert launch(args, base, straight, None) == 0, straight.with_suffix(".log").read_text()[-2000:]
    expected = json.loads((straight / "result.json").read_text())

    kills = in_saves = runs = identical = 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("killed and relaunched", total=args.kills)
        while kills < args.kills:
            runs += 1
            out = args.place / f"kills-{runs}"
            shutil.rmtree(out, ignore_errors=True)
            while True:
                status = launch(args, base, out, rng if kills < args.kills else None)
                if status not in (0, -signal.SIGKILL):
                    console.print(out.with_suffix(".log").read_text()[-3000:])
                    console.print(f"[red]a relaunch ended with status {status} after {kills} kills")
                    return 1
                if status == 0:
                    break
                kills += 1
                in_saves += staging(out)
                bar.update(task, completed=kills)
            found = json.loads((out / "result.json").read_text())
            same = all(found[key] == expected[key] for key in ("weights", "loss", "eval_loss"))
            identical += same
            if not same:
                console.print(f"[red]{out} ended differently")
            else:
                shutil.rmtree(out)
    console.print(f"{kills} kills ({in_saves} inside a save) in {runs} runs; {identical} of {runs} ended bit-identical")
    return 0 if identical == runs else 1


def launch(args: argparse.Namespace, base: Path, out: Path, rng: random.Random | None) -> int:
    """Start the training once; with `rng`, kill it at a random moment. Returns its exit status."""
    command = [sys.executable, "-m", "demo.train", "--place", str(args.place), "--model", str(base), "--out", str(out)]
    command += ["--steps", str(args.steps), "--every", "2", *(["--full"] if args.full else [])]
    out.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        begun = newest(out)
        if rng is not None:
            while process.poll() is None and not said(log):
                time.sleep(0.05)
            aimed, wait = rng.random() < 0.5, rng.uniform(0, 14)
            deadline = time.monotonic() + wait
            while process.poll() is None and time.monotonic() < deadline:
                # At least one save ahead of the last launch, so that the run comes to an end.
                if aimed and newest(out) > begun and staging(out):
                    break
                time.sleep(0.0005 if aimed else 0.01)
            process.send_signal(signal.SIGKILL)
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
