"""What saving does to a training that goes on: how long it stands still, and how much longer it takes in all.

A real loop (forward, backward, AdamW on the CPU) with a save every so many steps, once without saves and once with
each way of saving, each in a process of its own, in turn. Slowdown is the time of the loop to that of the loop without
saves in the same round. Durable is when files and names are safe from a power cut: where a library leaves that out, it
is made good behind it. Memory is anonymous and shared memory of the process and its children above what training had
before.

    python benchmarks/stall.py [--state gpt2-125m] [--every 8] [--saves 5] [--repeat 3] [--install DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import track

from benchmarks import figures
from benchmarks.states import NAMES, made
from benchmarks.ways import VENVS, WAYS

LOOKS = 0.03
"""Seconds between two looks at how much memory there is in use."""
LIMIT = 1800.0
"""Seconds for one run of one way: what takes longer hangs."""

KEPT = {
    "MALLOC_MMAP_THRESHOLD_": f"{4 << 30}",
    "MALLOC_TRIM_THRESHOLD_": f"{8 << 30}",
    "MALLOC_TOP_PAD_": f"{256 << 20}",
}
"""Have glibc (mallopt(3)) keep what training frees. By itself it gives large blocks back to the system, and each step
faults them in again: of a step of gpt2-125m that is from a fifth to two thirds, and differs so much from one step to
the next that what a save takes is lost in it."""

# ---- one way, in this process ----------------------------------------------------------------


def train(name: str, args: argparse.Namespace, place: Path, out: Any) -> None:
    """The loop, with its measurements as lines of JSON: one when memory counts from, one with all the rest."""
    import torch

    torch.set_num_threads(args.threads)
    state = made(args.state, batch=args.batch, length=args.length)
    for _ in range(args.warm):
        state.train()
    way = WAYS[name](state, place)
    print(json.dumps({"bytes": state.bytes}), file=out, flush=True)
    before = _processor()
    calls: list[float] = []
    begun = time.perf_counter()
    for number in range(1, args.every * (args.saves + 1) + 1):
        state.train()
        way.step(number)
        if number % args.every == 0 and number <= args.every * args.saves:
            called = time.perf_counter()
            way.save(number)
            calls.append(time.perf_counter() - called)
    loop = time.perf_counter() - begun
    way.finish()
    stalls = way.stalls(calls) if name != "nothing" else []
    written = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) // args.saves
    found = {"stalls": stalls, "loop": loop, "durable": way.durable, "written": written, "before": before}
    print(json.dumps(found), file=out, flush=True)


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---- all of them, each in a process of its own -----------------------------------------------


def apart(name: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """One run of one way. {"failed": why} where it can't be."""
    out = Path(tempfile.mkdtemp(dir=place))
    command = [str(interpreter(name, args.install)), __file__, "--way", name, "--place", str(out)]
    for option in ("state", "every", "saves", "threads", "batch", "length", "warm"):
        command += [f"--{option}", str(getattr(args, option))]
    reading, writing = os.pipe()
    # Told to end between a child's start and our knowing of it, we would leave it behind. A mask would be this thread's
    # alone, and the one that draws the progress would be told.
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    with open(place / "log", "wb") as log:
        child = subprocess.Popen(
            [*command, "--report", str(writing)], env={**os.environ, **(KEPT if args.allocator == "kept" else {})},
            pass_fds=[writing], stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    os.close(writing)
    try:
        signal.signal(signal.SIGTERM, before)
        if told:
            sys.exit(143)
        lines, peak = _watched(child.pid, reading)
        _, status, usage = os.wait4(child.pid, 0)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):  # whatever it started belongs to its session
            os.killpg(child.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child.pid, 0)
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
    if len(lines) < 2 or status:
        said = (place / "log").read_text(errors="replace").strip().splitlines()
        return {"failed": said[-1][:160] if said else f"status {status}"}
    found: dict[str, Any] = {**lines[0], **lines[1], "memory": peak}
    found["processor"] = usage.ru_utime + usage.ru_stime - found.pop("before")
    return found


def _watched(pid: int, reading: int) -> tuple[list[dict[str, Any]], int]:
    """What it reported, and by how many bytes its memory grew behind the first line, at most."""
    text, base, peak, end = b"", 0, 0, time.monotonic() + LIMIT
    while time.monotonic() < end:
        if select.select([reading], [], [], LOOKS)[0]:
            piece = os.read(reading, 1 << 16)
            if not piece:
                break
            text += piece
        now = memory(pid)
        if b"\n" in text and not base:
            base = now
        peak = max(peak, now)
        if text.count(b"\n") >= 2:
            break
    else:
        os.killpg(pid, signal.SIGKILL)
    return [json.loads(line) for line in text.splitlines() if line.endswith(b"}")], max(0, peak - base) if base else 0


def memory(pid: int) -> int:
    """Bytes of a process and its children: anonymous ones of all, shared ones of the one that has most of them."""
    own, shared = 0, 0
    for one in _family(pid):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:
            continue
        found = {line.partition(":")[0]: line for line in lines if line.startswith(("RssAnon", "RssShmem"))}
        counts = {name: int(line.split()[1]) * 1024 for name, line in found.items()}
        own += counts.get("RssAnon", 0)
        shared = max(shared, counts.get("RssShmem", 0))
    return own + shared


def _family(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(child))]


def interpreter(name: str, install: Path | None) -> Path:
    """Of the way: this one, or that of its own environment, which sees our packages behind its own."""
    if name not in VENVS or install is None:
        return Path(sys.executable)
    place = install / name
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", VENVS[name]], check=True)
        if name == "orbax":
            subprocess.run([python, "-m", "pip", "install", "-q", VENVS[name]], check=True)
        if name == "torchsnapshot":
            more = ["aiofiles", "aiohttp", "nest-asyncio", "importlib-metadata", "psutil"]
            subprocess.run([python, "-m", "pip", "install", "-q", *more], check=True)
        (next((place / "lib").iterdir()) / "site-packages" / "ours.pth").write_text(sysconfig.get_path("purelib"))
        (place / "ready").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", choices=NAMES, default="gpt2-125m")
    parser.add_argument("--every", type=int, default=8, help="steps from a save to the next")
    parser.add_argument("--saves", type=int, default=5, help="in a run; the first is told apart")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="these ways, beside `nothing`")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the training")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--warm", type=int, default=2, help="steps before the clock runs")
    parser.add_argument("--install", type=Path, metavar="DIRECTORY", help="other libraries' environments are made here")
    parser.add_argument("--allocator", choices=("kept", "system"), default="kept", help="whether glibc keeps memory")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=int, help=argparse.SUPPRESS)
    figures.options(parser)
    args = parser.parse_args()
    if min(args.every, args.saves, args.repeat, args.threads) < 1:
        parser.error("--every, --saves, --repeat and --threads are at least 1")
    if args.way:
        with os.fdopen(args.report, "w") as out:
            train(args.way, args, args.place, out)
        return
    figures.check(args)
    place = Path(tempfile.mkdtemp(dir=args.place))
    ways = [way for way in WAYS if way == "nothing" or way in args.only]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    missing: dict[str, str] = {}
    try:
        for number in track(range(args.repeat * len(ways)), "interleaved runs"):
            turn, index = divmod(number, len(ways))
            way = ways[(index + turn) % len(ways)]  # so that none is always behind the same other one
            if way in missing:
                continue
            if way in VENVS and args.install is None:
                missing[way] = "--install DIRECTORY makes an environment for it"
                continue
            run = one(way, args, place)
            if "failed" in run and way == "nothing":
                raise SystemExit(f"training without saves failed: {run['failed']}")
            if "failed" in run:
                missing[way] = run["failed"]
            else:
                found[way].append(run)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    found = {way: runs for way, runs in found.items() if len(runs) == args.repeat}
    facts = {name: getattr(args, name) for name in ("state", "every", "saves", "threads", "allocator")}
    document = figures.write(args.json, "stall", **facts, runs=found, missing=missing)
    show(document)
    if args.plot:
        draw(document, args.plot)


def one(way: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    try:
        return apart(way, args, place)
    except subprocess.CalledProcessError as error:
        return {"failed": f"could not be installed: {error}"}


# ---- what came of it -------------------------------------------------------------------------

COLUMNS = ("", "stall", "first", "worst", "slowdown", "durable", "memory", "CPU s a save", "on disk")


def slowdowns(document: dict[str, Any], way: str) -> list[float]:
    """To `nothing` in the same round."""
    pairs = zip(document["runs"][way], document["runs"]["nothing"], strict=True)
    return [mine["loop"] / other["loop"] for mine, other in pairs]


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each way that was measured: the table here, and that of docs/performance.md."""
    table: list[tuple[str, ...]] = []
    base = document["runs"]["nothing"]
    for way, runs in document["runs"].items():
        if way == "nothing":
            continue
        later = [figures.middle(run["stalls"][1:] or run["stalls"]) for run in runs]
        durable = [figures.middle(run["durable"][1:] or run["durable"]) for run in runs if run["durable"]]
        extra = [run["processor"] - other["processor"] for run, other in zip(runs, base, strict=True)]
        above = [run["memory"] - other["memory"] for run, other in zip(runs, base, strict=True)]
        table.append(
            (
                way,
                figures.seconds(later),
                figures.seconds([figures.middle(run["stalls"][0] for run in runs)]),
                figures.seconds([max(max(run["stalls"]) for run in runs)]),
                figures.spread(slowdowns(document, way), 3),
                figures.seconds(durable) if durable else "never",
                figures.size(max(0.0, figures.middle(above))),
                f"{max(0.0, figures.middle(extra)) / document['saves']:.2f}",
                figures.size(figures.middle(run["written"] for run in runs)),
            )
        )
    return table


def title(document: dict[str, Any]) -> str:
    runs = document["runs"]["nothing"]
    step = figures.middle(run["loop"] for run in runs) / (document["every"] * (document["saves"] + 1))
    return (
        f"{document['state']}, {figures.size(runs[0]['bytes'])}: a save every {document['every']} steps of"
        f" {figures.seconds([step])}, {document['threads']} threads, {len(runs)} rounds"
    )


def show(document: dict[str, Any]) -> None:
    figures.show(title(document), COLUMNS, rows(document), width=170)
    for way, why in document["missing"].items():
        Console(width=170).print(f"not measured: {way}: {why}", markup=False, highlight=False)


def draw(document: dict[str, Any], file: Path) -> None:
    runs = {way: some for way, some in document["runs"].items() if way != "nothing"}
    stalls = {way: [figures.middle(run["stalls"][1:] or run["stalls"]) for run in some] for way, some in runs.items()}
    durable = {way: [figures.middle(run["durable"]) for run in some if run["durable"]] for way, some in runs.items()}
    slower = {way: [100 * (ratio - 1) for ratio in slowdowns(document, way)] for way in runs}
    panels = [("stall per save, s", stalls, True), ("slowdown, %", slower, False), ("until durable, s", durable, False)]
    figures.bars(file, title(document), panels)


if __name__ == "__main__":
    main()
