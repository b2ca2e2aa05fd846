"""The command line for tests: as a process of its own, or quickly inside this one; and runs to try it on."""

from __future__ import annotations

import gc
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner

from lastgood.cli.main import main
from lastgood.format.tensors import Tensor
from lastgood.manager import Manager
from lastgood.policy import Keep
from lastgood.repo import metrics
from lastgood.repo.layout import HIDDEN
from lastgood.repo.read import records
from lastgood.repo.staging import Staging

SRC = Path(__file__).resolve().parents[1] / "src"


class Output(NamedTuple):
    """The exit code, and both streams."""

    code: int
    out: str
    err: str


STOCK = ("trainer_full", "trainer_peft", "trainer_sharded", "trainer_bin", "fsdp_trainer", "fsdp_trainer_full")
OTHERS = ("deepspeed_layout", "accelerate_run", "lightning_run", "dcp_run")


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """No settings of the person who runs the tests; a cache of listings that nobody else reads."""
    ours = ("LASTGOOD_", "_LASTGOOD")
    dropped = {"NO_COLOR", "COLUMNS", "LINES", "PAGER", "FORCE_COLOR"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours) and key not in dropped}
    path = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONPATH": path, "LASTGOOD_CACHE": "0", "OMP_NUM_THREADS": "1", **(env or {})}


def run(
    *args: Any,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    timeout: float = 60,
) -> Output:
    """(exit code, stdout, stderr) of `python -m lastgood` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lastgood", *map(os.fspath, map(_word, args))],
        cwd=cwd,
        env=environment(env),
        input=(input or "").encode(),
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    return Output(done.returncode, _decoded(done.stdout), _decoded(done.stderr))


def call(*args: Any, cwd: Path | str | None = None, env: Mapping[str, str] | None = None, input: str = "") -> Output:
    """The same in this process: a hundred times as fast, and an error that escapes shows where it came from."""
    before, here = dict(os.environ), Path.cwd()
    try:
        os.environ.clear()
        os.environ.update(environment(env))
        if cwd is not None:
            os.chdir(cwd)
        with CliRunner().isolation(input=input) as (out, err, _):
            try:
                main([str(_word(arg)) for arg in args])
            except SystemExit as leave:
                code = leave.code
            sys.stdout.flush()
            sys.stderr.flush()
            found = Output(int(code or 0), _decoded(out.getvalue()), _decoded(err.getvalue()))
    finally:
        gc.enable()  # which main turns off for its short life
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
    return found


def _word(arg: Any) -> Any:
    return arg if isinstance(arg, (str, bytes, os.PathLike)) else str(arg)


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def snapshot(root: Path, *, times: bool = True) -> dict[str, tuple[Any, ...]]:
    """Everything that can be seen of a tree: names, kinds, sizes, modes, times (of changes), contents."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        content: Any = None
        if stat.S_ISREG(status.st_mode):
            content = hashlib.blake2b(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        entry = (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), size, content)
        found[os.fspath(path.relative_to(root))] = (*entry, status.st_mtime_ns) if times else entry
    return found


def checkpoints(root: Path) -> dict[str, tuple[Any, ...]]:
    """The same without times and without what lastgood keeps beside the checkpoints."""
    found = snapshot(root, times=False)
    return {name: entry for name, entry in found.items() if Path(name).parts[:1] not in ((), (HIDDEN,))}


def hashes(root: Path) -> dict[str, str]:
    """Relative path -> hash of every file."""
    return {
        os.fspath(path.relative_to(root)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def stage(step: int) -> Callable[[Staging], None]:
    """A small full checkpoint whose weights are told from the step."""

    def write(staging: Staging) -> None:
        weights = bytes([step % 251]) * 4096
        staging.tensors("model.safetensors", "model", [Tensor("layer.w", "U8", (4096,), memoryview(weights))])
        staging.tensors("optimizer.safetensors", "optimizer", [Tensor("m", "U8", (4096,), memoryview(weights))])
        staging.data("resume.json", "progress", b'{"progress": {"global_step": %d}}' % step)
        (Path(staging.path) / "config.json").write_text("{}")
        staging.adopt("model")

    return write


LOSSES = {200: 1.5, 400: 1.1, 600: 1.2}


def managed(root: Path, losses: Mapping[int, float | None] = LOSSES, **keep: Any) -> Path:
    """A managed run with a checkpoint per step, each with its eval_loss."""
    root.mkdir(parents=True, exist_ok=True)
    made = Manager(root=root, keep=Keep(**{"monitor": "eval_loss", "mode": "min", **keep}), on_error="raise")
    made.open()
    made.begin_fresh()
    for step, loss in losses.items():
        record = made.save(
            step,
            stage(step),
            estimate=1,
            environment={"torch": "2.10.0"},
            arguments={"learning_rate": 0.01, "max_steps": 600, "seed": step},
            facts={"loss": 2.0 - step / 1000},
        )
        assert record is not None
        if loss is not None:
            metrics.record(root, record.id, step, {"eval_loss": loss})
    made.close()
    return root


def branched(root: Path) -> Path:
    """200, 400, 600, then a resume from 400 and 500: 600 lies on a branch that was left."""
    managed(root)
    made = Manager(root=root, keep=Keep(monitor="eval_loss", mode="min"), on_error="raise")
    made.open()
    made.begin_from(next(record for record in records(root) if record.step == 400))
    made.save(500, stage(500), estimate=1, environment={}, arguments={}, facts={})
    made.close()
    return root


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def raw_controls(out: str) -> list[str]:
    """Characters in an output that act on a terminal; line ends and tabs between columns don't count."""
    import unicodedata

    return [c for c in out if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs")]
