"""Verbs that only look change nothing, need no torch, and work on what every tool wrote."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cli
from cli import OTHERS, STOCK, call, snapshot

KINDS = ("managed", *STOCK, *OTHERS)
READ_ONLY: tuple[tuple[str, ...], ...] = (
    ("log",), ("log", "--all"), ("log", "--graph"), ("log", "--json"), ("log", "-H"), ("show",),
    ("show", "--tensors"), ("show", "--args"), ("show", "--why"), ("show", "--json"), ("diff", "latest", "latest~1"),
    ("diff", "latest", "latest", "--json"), ("verify",), ("verify", "--full"), ("verify", "--all", "--json"),
    ("resume",), ("resume", "--check"), ("resume", "--print-path"), ("df",), ("df", "--json"), ("du",),
    ("watch", "--once"), ("prune", "--keep-last", "1", "--dry-run"), ("prune", "--empty-trash", "--dry-run"),
    ("prune", "--keep-last", "1", "--stock", "--incomplete", "--dry-run"), ("strip", "latest~1", "--dry-run"),
    ("adopt", "--dry-run"), ("tag",), ("completion", "bash"),
)  # fmt: skip

Runs = Callable[[str], Path]


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing(kind: str, run_of: Runs) -> None:
    root = run_of(kind)
    before = snapshot(root)
    worked = 0
    for words in READ_ONLY:
        code, out, err = call("-C", root, *words)
        assert code in (0, 1, 2, 3, 6), (words, out, err)
        assert "Traceback" not in err and not cli.raw_controls(out), (words, err)
        assert code == 0 or "rror: " in err or "damaged" in err, (words, code, out, err)
        assert snapshot(root) == before, f"{words} changed something"
        worked += code == 0
    assert worked >= len(READ_ONLY) - 8


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed_by_its_steps(kind: str, run_of: Runs) -> None:
    """Facts, so that a verb that shows nothing doesn't pass for one that changes nothing."""
    import json

    root = run_of(kind)
    code, out, err = call("-C", root, "log", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)["checkpoints"]
    steps = {
        "managed": {200, 400, 600}, "accelerate_run": {0, 1, 2}, "dcp_run": {2, 4}, "deepspeed_layout": {2, 4},
        "fsdp_trainer": {2, 4}, "fsdp_trainer_full": {2, 4},
    }.get(kind, {2, 4, 6})  # fmt: skip
    assert {row["step"] for row in rows} == steps
    assert {row["state"] for row in rows} == {"full"}
    assert all(row["size"] > 0 for row in rows)
    code, out, err = call("-C", root, "verify", "--full", "--json")
    assert code == 0 and not any(item["problems"] for item in json.loads(out)["checkpoints"]), out
    code, out, _ = call("-C", root, "show", "--json", str(max(steps)) if kind != "lightning_run" else "latest")
    assert code == 0
    shown = json.loads(out)
    assert shown["problems"] == [] and shown["tensors"], "the tensors of every tool can be seen without torch"


def without_privileges() -> None:
    """Root writes whatever the modes say; a process without this capability doesn't (capabilities(7))."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP: takes effect at the exec that follows
                raise OSError(ctypes.get_errno(), "prctl")


def as_somebody(root: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "lastgood", "-C", str(root), *words],
        env=cli.environment(), capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=without_privileges,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities")
@pytest.mark.parametrize("kind", ["managed", "trainer_full", "lightning_run", "dcp_run"])
def test_looking_works_in_a_directory_that_cannot_be_written(kind: str, run_of: Runs) -> None:
    root = run_of(kind)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(root)
    try:
        for words in (("log",), ("show",), ("verify", "--full"), ("resume", "--check"), ("df",), ("du",), ("tag",)):
            assert as_somebody(root, *words) == (0, ""), words
        for words in (("prune", "--keep-last", "1", "--stock", "--yes"), ("adopt", "--yes")):
            code, err = as_somebody(root, *words)
            assert code != 0 and err.startswith("error: ") and "Traceback" not in err
        assert snapshot(root) == before
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


PROBE = """
import atexit, sys
def look():
    heavy = {"torch", "numpy", "transformers", "safetensors", "peft", "accelerate", "pandas"} & sys.modules.keys()
    if heavy:
        print("HEAVY", sorted(heavy), file=sys.stderr)
atexit.register(look)
"""

CHANGING: tuple[tuple[str, ...], ...] = (
    ("pin", "400"), ("unpin", "400"), ("tag", "good", "400"), ("untag", "good"), ("note", "400", "a note"),
    ("record", "400", "mmlu=0.5"), ("strip", "400", "--yes"), ("undo",), ("checkout", "400", "out"),
    ("prune", "--keep-last", "1", "--yes"), ("undo",), ("adopt", "--yes"), ("resume", "--print-path"),
    ("run", "--", sys.executable, "-c", ""),
)  # fmt: skip


def test_no_verb_imports_torch_unless_it_computes(real: Runs, tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "sitecustomize.py").write_text(PROBE)
    env = {"PYTHONPATH": f"{tmp_path / 'probe'}{os.pathsep}{cli.SRC}"}
    root = cli.managed(tmp_path / "managed")
    looks = [("diff", "latest", "400"), ("watch", "--once"), *[w for w in READ_ONLY if len(w) == 1]]
    for words in (*looks, *CHANGING):
        code, out, err = cli.run("-C", root, *words, cwd=tmp_path, env=env)
        assert code in (0, 3), (words, out, err)  # 3: there is nothing to adopt
        assert "HEAVY" not in err, (words, err)
    stock = real("trainer_full")
    for words in (("show", "--tensors"), ("verify", "--full"), ("adopt", "--yes"), ("checkout", "4", "copy")):
        code, out, err = cli.run("-C", stock, *words, cwd=tmp_path, env=env)
        assert code == 0 and "HEAVY" not in err, (words, out, err)
    # The probe itself works: this verb computes.
    code, _, err = cli.run("-C", stock, "diff", "2", "4", "--values", env=env)
    assert code == 0 and "'torch'" in err


def test_looking_works_where_torch_does_not(run_of: Runs, tmp_path: Path) -> None:
    """A torch that can't be imported (no CUDA library, another Python) must not take the listing down with it."""
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.12 is missing')\n")
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import sys\n"
        "try:\n    import torch\nexcept ImportError:\n    pass\nelse:\n    sys.exit('torch is there')\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from cli import call\n"
        "from test_cli_readonly import READ_ONLY\n"
        "for root in sys.argv[1:]:\n"
        "    for words in READ_ONLY:\n"
        "        code, out, err = call('-C', root, *words)\n"
        "        assert code in (0, 1, 2, 3, 6) and 'Traceback' not in err, (root, words, code, out, err)\n"
        "        assert words != ('log',) or code == 0, (root, out, err)\n"
        "    print(root)\n"
    )
    roots = [str(run_of(kind)) for kind in KINDS]
    done = subprocess.run(
        [sys.executable, str(runner), *roots],
        env=cli.environment({"PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{cli.SRC}"}),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()) == (0, roots), done.stderr
