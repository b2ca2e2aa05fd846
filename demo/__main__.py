"""Run the job twice, once straight through and once killed during a save, and compare. See scripts/demo --help."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from demo import show
from demo.base import prepare

LIMIT = 3
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA adapter")
    parser.add_argument("--model", help="name or path of a causal language model instead of the small GPT-2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=4, help="steps between saves")
    parser.add_argument("--place", type=Path, default=Path("build/demo"), help="where everything is put")
    args = parser.parse_args()

    begun = time.monotonic()
    base = prepare(args.place, steps=80)
    kind = "full" if args.full else "lora"
    straight, broken = args.place / f"{kind}-straight", args.place / f"{kind}-killed"
    for out in (straight, broken):
        shutil.rmtree(out, ignore_errors=True)

    console.rule("1  straight through")
    train(args, base, straight, "training")
    console.rule("2  the same command, killed during a save")
    killed = train(args, base, broken, "training", kill_from=args.steps // 2)
    # Asked of the disk after the kill: a save may have got through between the look and the signal.
    moment = "while" if staging(broken) else "just after"
    console.print(f"SIGKILL {moment} the checkpoint of step {killed} was being written")
    console.rule("3  the same command again")
    train(args, base, broken, "resuming")
    report = said(log(broken))
    console.print("\n".join(report), highlight=False)

    console.rule("what was kept, and why")
    console.print(show.checkpoints(broken, LIMIT))
    first, second = (json.loads((out / "result.json").read_text()) for out in (straight, broken))
    console.print(f"best model: {second['best']}")
    resumed = next(int(line.rpartition(" ")[2]) for line in report if "resuming from" in line)
    run = show.lastgood.open(broken)
    kept = [record.step for record in run.checkpoints]
    deleted = [event["step"] for event in run.history if event["event"] == "deleted"]
    picture = args.place / f"{kind}.png"
    show.plot(picture, second, kept=kept, deleted=deleted, killed=killed, resumed=resumed)
    console.print(f"loss curve: {picture}")
    console.rule("killed and resumed against never interrupted")
    equal = show.proof(console, first, second)
    console.print(f"{time.monotonic() - begun:.0f} seconds in all")
    return 0 if equal else 1


def train(args: argparse.Namespace, base: Path, out: Path, title: str, kill_from: int | None = None) -> int:
    """Run the training script to its end, or kill it during the first save from `kill_from` on; returns that step."""
    command = [sys.executable, "-m", "demo.train", "--place", str(args.place), "--model", str(args.model or base)]
    command += [
        "--out",
        str(out),
        "--steps",
        str(args.steps),
        "--every",
        str(args.every),
        *(["--full"] if args.full else []),
    ]
    out.mkdir(parents=True, exist_ok=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with log(out).open("w") as output, bar:
        task = bar.add_task(title, total=args.steps)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            saved = newest(out)
            bar.update(task, completed=saved)
            if kill_from is not None and saved + args.every >= kill_from and staging(out):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return saved + args.every
            time.sleep(0.0005 if kill_from is not None and saved + args.every >= kill_from else 0.1)
        bar.update(task, completed=newest(out))
    if process.returncode != 0 or kill_from is not None:
        console.print(log(out).read_text()[-3000:])
        raise SystemExit(f"training ended with status {process.returncode}")
    return 0


def said(path: Path) -> list[str]:
    """What lastgood printed, between other libraries' progress bars."""
    return [line[line.index("lastgood:") :] for line in path.read_text().splitlines() if "lastgood:" in line]


def log(out: Path) -> Path:
    return out.with_suffix(".log")


def newest(out: Path) -> int:
    """The highest step that was saved."""
    steps = [int(name[11:]) for name in os.listdir(out) if name.startswith("checkpoint-") and name[11:].isdigit()]
    return max(steps, default=0)


def staging(out: Path) -> bool:
    """Whether a save is under way: a staging directory that has files in it."""
    place = out / ".lastgood" / "tmp"
    try:
        return any(os.listdir(place / name) for name in os.listdir(place))
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
