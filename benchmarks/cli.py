"""The command line: how fast it starts, lists, plans and verifies.

    ./scripts/bench cli [--rounds 7] [--checkpoints 10000] [--megabytes 1024]

Times are of whole processes, measured in turn with what they are compared with; the table has medians and the
range.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from lastgood.format import manifest as codec
from lastgood.format.tensors import Tensor, encode
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo.staging import Staging
from lastgood.store.checksum import Sum

HELLO = "import click\n@click.command()\ndef main(): click.echo('hello')\nmain()\n"
LASTGOOD = [sys.executable, "-m", "lastgood"]
ARGUMENTS = {f"argument_{n}": [None, True, 5e-05, "a value of some length", 1000][n % 5] for n in range(140)}
"""As many as TrainingArguments has, so that manifests have the size of real ones (8 KB)."""


def seconds(command: list[str], **environment: str) -> float:
    begin = time.perf_counter()
    quiet = subprocess.DEVNULL
    subprocess.run(command, stdout=quiet, stderr=quiet, check=True, env={**os.environ, **environment})
    return time.perf_counter() - begin


def rounds(count: int, **tasks: Callable[[], float]) -> dict[str, list[float]]:
    """Each task once per round, in turn: what disturbs one disturbs the others too."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(count):
        for name, task in tasks.items():
            found[name].append(task())
    return found


def said(name: str, values: list[float], unit: str = "ms", scale: float = 1000.0) -> str:
    low, mid, high = (scale * value for value in (min(values), median(values), max(values)))
    return f"{name:<34} {mid:9.1f} {unit}   ({low:.1f} to {high:.1f})"


def start_up(where: Path, count: int) -> None:
    hello = where / "hello.py"
    hello.write_text(HELLO)
    run = managed(where / "small", 12)
    found = rounds(
        count,
        hello=lambda: seconds([sys.executable, str(hello)]),
        version=lambda: seconds([*LASTGOOD, "--version"]),
        help=lambda: seconds([*LASTGOOD, "--help"]),
        log=lambda: seconds([*LASTGOOD, "log", str(run)]),
        resume=lambda: seconds([*LASTGOOD, "resume", str(run)]),
    )
    print("start-up")
    for name, values in found.items():
        ratio = median(values) / median(found["hello"])
        print(said("click hello-world" if name == "hello" else f"lastgood {name}", values), f"  {ratio:.2f}x")


def managed(root: Path, count: int) -> Path:
    """A real managed run with tiny tensors, and metrics for each checkpoint."""
    manager = Manager(root=root, keep=Keep(), on_error="raise")
    manager.open()
    manager.begin_fresh()
    for step in range(1, count + 1):
        manager.save(
            step * 10, stage, estimate=1, environment={"torch": "2.13.0"}, arguments=ARGUMENTS, facts={"loss": 1.0}
        )
        manager.record(step * 10, {"eval_loss": 2.0 - step * 1e-4, "eval_runtime": 1.0})
    manager.close()
    return root


def stage(staging: Staging) -> None:
    data = memoryview(bytes(64))
    staging.tensors("model.safetensors", "model", [Tensor("w", "U8", (64,), data)])
    for name in (
        "config.json",
        "generation_config.json",
        "tensors.json",
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
    ):
        staging.data(name, "model", b"{}")
    staging.tensors("optimizer.safetensors", "optimizer", [Tensor("m", "U8", (64,), data)])
    staging.data("resume.json", "progress", b"{}")


def copies(source: Path, root: Path, count: int) -> Path:
    """`count` checkpoints made from one: writing them one by one, durably, would take minutes."""
    import msgspec

    first = sorted(source.glob("checkpoint-*"))[0]
    base = codec.decode((first / codec.NAME).read_bytes(), "")
    (root / ".lastgood/metrics").mkdir(parents=True)
    for name in ("run.json", "policy.json"):
        shutil.copy(source / ".lastgood" / name, root / ".lastgood" / name)
    files = {name: (first / name).read_bytes() for name in base.files}
    with open(root / ".lastgood/journal.jsonl", "w") as journal:
        for n in range(1, count + 1):
            home, id = root / f"checkpoint-{n * 10}", f"{n:016x}"
            home.mkdir()
            for name, data in files.items():
                (home / name).write_bytes(data)
            created = base.created + 60 * n
            manifest = msgspec.structs.replace(
                base, id=id, step=n * 10, seq=n, lineage=((1, n),), created=created, parent=f"{n - 1:016x}"
            )
            (home / codec.NAME).write_bytes(codec.encode(manifest))
            row = {"step": n * 10, "metrics": {"eval_loss": 2.0 - n * 1e-4, "eval_runtime": 1.0}}
            (root / ".lastgood/metrics" / f"{id}.jsonl").write_text(json.dumps(row) + "\n")
            event = {"time": created, "event": "saved", "step": n * 10, "id": id, "bytes": manifest.size}
            journal.write(json.dumps(event) + "\n")
    return root


def listings(where: Path, count: int, number: int) -> None:
    run = str(copies(managed(where / "one", 1), where / "many", number))
    cache = where / "cache"
    rules = ["--keep-last", "3", "--keep-best", "2", "--monitor", "eval_loss", "--dry-run"]
    seconds([*LASTGOOD, "log", run], XDG_CACHE_HOME=str(cache))
    found = rounds(
        count,
        cold=lambda: seconds([*LASTGOOD, "log", run], LASTGOOD_CACHE="0"),
        warm=lambda: seconds([*LASTGOOD, "log", run], XDG_CACHE_HOME=str(cache)),
        prune=lambda: seconds([*LASTGOOD, "-C", run, "prune", *rules]),
    )
    print(f"a run of {number} checkpoints")
    for name, values in found.items():
        label = {"cold": "log, nothing remembered", "warm": "log, again", "prune": "prune --dry-run"}[name]
        print(said(label, values))


def stock(root: Path, count: int) -> Path:
    """Checkpoints as a stock Trainer leaves them, small, each with the log of the whole run so far: two rows a save."""
    tree, data = io.BytesIO(), memoryview(bytes(64))
    with zipfile.ZipFile(tree, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state": {0: 1}}, protocol=2))
        archive.writestr("archive/version", "3\n")
    weights = b"".join(bytes(part) for part in encode([Tensor("w", "U8", (64,), data)])[1])
    archives = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
    rows: list[dict[str, float]] = []
    for n in range(1, count + 1):
        home, step = root / f"checkpoint-{n * 10}", n * 10
        home.mkdir(parents=True)
        rows.append({"epoch": n / 100, "grad_norm": 1.0 + n, "learning_rate": 1e-5, "loss": 2.0 + 1 / n, "step": step})
        rows.append({"epoch": n / 100, "eval_loss": 2.1 + 1 / n, "eval_runtime": 1.0, "step": step})
        (home / "model.safetensors").write_bytes(weights)
        (home / "config.json").write_text('{"model_type": "gpt2"}')
        for name in archives:
            (home / name).write_bytes(tree.getvalue())
        state = {"epoch": n / 100, "global_step": step, "log_history": rows, "max_steps": 10 * count}
        (home / "trainer_state.json").write_text(json.dumps(state, indent=2))
    return root


def advising(where: Path, count: int) -> None:
    """plan with 1,000 saves under several policies, doctor on 1,000 checkpoints, beside the smallest command."""
    ours, theirs = str(copies(managed(where / "few", 1), where / "ours", 1000)), str(stock(where / "theirs", 1000))
    plan = [*LASTGOOD, "plan", "--model", "13B", "--max-steps", "10000", "--save-steps", "10", "--eval-steps", "10"]
    policies = {
        "everything kept": [],
        "--save-total-limit 3": ["--save-total-limit", "3", "--compare", "stock"],
        "--keep-last 2 --keep-best 3": ["--keep-last", "2", "--keep-best", "3"],
        "--keep-last 2 --keep-every 100": ["--keep-last", "2", "--keep-every", "100"],
        "--keep-full 2": ["--keep-full", "2"],
    }
    tasks = {f"plan {name}": [*plan, *words] for name, words in policies.items()}
    tasks |= {"doctor, managed": [*LASTGOOD, "doctor", ours], "doctor, stock": [*LASTGOOD, "doctor", theirs]}
    found = rounds(
        count,
        version=lambda: seconds([*LASTGOOD, "--version"]),
        **{name: functools.partial(seconds, words) for name, words in tasks.items()},
    )
    print("1,000 saves planned, 1,000 checkpoints examined")
    for name, values in found.items():
        print(said(name, values), f"  {median(values) / median(found['version']):.1f}x of --version")


def verifying(where: Path, count: int, megabytes: int) -> None:
    """verify --full against reading the same files, and against hashing as much from memory."""
    block = os.urandom(1 << 20)
    shards = 4

    def write(staging: Staging) -> None:
        for shard in range(shards):
            data = memoryview(block * (megabytes // shards))
            tensor = Tensor("w", "U8", (len(data),), data)
            staging.tensors(f"model-{shard}.safetensors", "model", [tensor])

    manager = Manager(root=where / "large", keep=Keep(), on_error="raise")
    manager.open()
    manager.begin_fresh()
    record = manager.save(1, write, estimate=1, environment={}, arguments={}, facts={})
    manager.close()
    assert record is not None
    files = sorted((where / "large" / record.name).glob("*.safetensors"))
    run = str(where / "large")
    idle = median([seconds([*LASTGOOD, "verify", run]) for _ in range(5)])

    def verify() -> float:
        return max(1e-6, seconds([*LASTGOOD, "verify", "--full", run]) - idle)

    found = rounds(
        count,
        hash=lambda: hashing(block, record),
        disk=lambda: reading(forgotten(files)),
        verify_disk=lambda: (forgotten(files), verify())[1],
        memory=lambda: reading(files),
        verify_memory=verify,
    )
    rates = {name: [record.size / 1e9 / value for value in values] for name, values in found.items()}
    print(f"{record.size / 1e9:.1f} GB in {shards} files; the start of the command isn't counted")
    names = {
        "hash": "the hash alone, of memory",
        "disk": "reading from the disk",
        "verify_disk": "verify --full from the disk",
        "memory": "reading from the page cache",
        "verify_memory": "verify --full from the page cache",
    }
    for name, values in rates.items():
        print(said(names[name], values, "GB/s", 1.0))
    for place in ("disk", "memory"):
        slower = min(median(rates[place]), median(rates["hash"]))
        print(f"{'  verify / the slower, ' + place:<34} {median(rates['verify_' + place]) / slower:9.2f}")


def forgotten(files: list[Path]) -> list[Path]:
    """The same files, not in memory any more."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return files


def reading(files: list[Path]) -> float:
    buffer = bytearray(4 << 20)
    begin = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def hashing(block: bytes, record: Record) -> float:
    data = block * 16
    begin = time.perf_counter()
    whole = Sum()
    for _ in range(max(1, record.size // len(data))):
        whole.update(memoryview(data))
    return time.perf_counter() - begin


def memory(where: Path) -> None:
    """Peak memory of verbs on a checkpoint of 4 GB (a file with a hole) and on one of 4 KB."""
    peaks: dict[str, list[float]] = {}
    for size in (4 << 10, 4 << 30):
        home = where / f"stock-{size}" / "checkpoint-1"
        home.mkdir(parents=True)
        header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        with open(home / "model.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        (home / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))
        for verb in (["log"], ["show", "1", "--tensors"], ["verify"], ["df"]):
            peaks.setdefault(verb[0], []).append(peak([*LASTGOOD, "-C", str(home.parent), *verb]))
    print("peak memory, tensors of 4 KB and of 4 GB")
    for verb, (small, large) in peaks.items():
        print(f"{'lastgood ' + verb:<34} {small:9.1f} MB  {large:9.1f} MB")


def peak(command: list[str]) -> float:
    code = f"import resource,subprocess; subprocess.run({command!r}, stdout=-3); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(said.stdout) / 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--checkpoints", type=int, default=10_000)
    options.add_argument("--megabytes", type=int, default=1024)
    given = options.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        start_up(where, given.rounds)
        advising(where, given.rounds)
        listings(where, given.rounds, given.checkpoints)
        verifying(where, given.rounds, given.megabytes)
        memory(where)


if __name__ == "__main__":
    main()
