"""The harness, tried out: each step that makes lastgood safe is taken away in turn, and something has to turn red.

    python -m faults.mutants               all of them, side by side
    python -m faults.mutants NAME...       some

A mutant is a copy of the package with one piece of its text replaced. It is caught by a lane of `faults` over one
operation, or by tests; the unchanged package passes both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent.parent
PACKAGE = HERE / "src" / "lastgood"
RED = 3
"""Exit status of a lane that found something: not that of a traceback."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """file: in the package. old: its text, there exactly once; new: what it becomes. red: what has to catch it.

    red: "LANE OPERATION EVERY", or the arguments of pytest in tests/.
    """

    name: str
    file: str
    old: str
    new: str
    red: str


MUTANTS: Sequence[Mutant] = (
    Mutant(
        "no fsync of a small file",
        "store/local.py",
        "            if sync:\n                fs.system.sync(handle)\n        finally:",
        "        finally:",
        "power tag(tagged) 1",
    ),
    Mutant(
        "no fsync of staged files",
        "store/local.py",
        "    handle = reopened(path)\n    try:\n        fs.system.sync(handle)\n",
        "    handle = reopened(path)\n    try:\n        pass\n",
        "power next_save(three) 3",
    ),
    Mutant(
        "no fsync of directories",
        "store/local.py",
        '    if os.name == "nt":\n        return\n',
        "    return\n",
        "power next_save(three) 3",
    ),
    Mutant(
        "no fsync behind a rename",
        "store/local.py",
        "    fs.system.rename(source, target)\n    sync_dir(target.parent)",
        "    fs.system.rename(source, target)",
        "power next_save(three) 3",
    ),
    Mutant(
        "no fsync behind a replacement",
        "store/local.py",
        "        fs.system.unlink(temporary)\n        raise\n    sync_dir(path.parent)\n",
        "        fs.system.unlink(temporary)\n        raise\n",
        "power tag(tagged) 1",
    ),
    Mutant(
        "a replacement in place",
        "store/local.py",
        '    temporary = path.with_name(f".{path.name}.{fs.system.token(4)}")\n    write(temporary, [data])\n',
        '    temporary = path.with_name(f".{path.name}.{fs.system.token(4)}")\n    unlink(path)\n'
        "    write(temporary, [data])\n",
        "crash tag(tagged) 1",
    ),
    Mutant(
        "a short write taken for a whole one",
        "store/local.py",
        "            view = view[fs.system.write(handle, view) :]\n",
        "            fs.system.write(handle, view)\n            view = view[len(view) :]\n"
        "            total = os.fstat(handle).st_size\n",
        "error next_save(three) 3",
    ),
    Mutant(
        "a torn line spoils the next one",
        "store/local.py",
        '            if fs.system.read(handle, 1) != b"\\n":\n',
        "            if False:\n",
        "test_failures.py test_crash_points.py test_trail.py test_review.py test_machine.py",
    ),
    Mutant(
        "a rename over what is there",
        "store/local.py",
        "    if os.path.lexists(target):\n        raise FileExistsError",
        "    if False:\n        raise FileExistsError",
        "test_local.py",
    ),
    Mutant(
        "a limit taken for damage",
        "store/local.py",
        "    return error.errno in _PASSING\n",
        "    return False\n",
        "look next_save(three) 7",
    ),
    Mutant(
        "no second look after EIO",
        "store/local.py",
        "        if error.errno != errno.EIO:\n            raise\n        return act()\n",
        "        raise\n",
        "look next_save(three) 7",
    ),
    Mutant(
        "links are followed",
        "store/local.py",
        '_SAFE = getattr(os, "O_NOFOLLOW", 0) | ',
        "_SAFE = ",
        "test_corruption.py test_security_links.py",
    ),
    Mutant(
        "staged files aren't synced before the manifest",
        "repo/commit.py",
        "    staging.sync()\n",
        "",
        "power next_save(three) 3",
    ),
    Mutant(
        "staged names aren't synced",
        "repo/staging.py",
        "for name in (*self.files, MANIFEST)], self.directories())",
        "for name in (*self.files, MANIFEST)], [])",
        "power next_save(three) 3",
    ),
    Mutant(
        "a save that failed to become durable stays",
        "repo/commit.py",
        "        if not source.exists() and id_at(target) == source.name:\n",
        "        if False:\n",
        "test_crash_points.py",
    ),
    Mutant(
        "a step that is there is in the way",
        "repo/commit.py",
        "    local.rename(root / name, root / aside)\n",
        "    local.remove_tree(root / name)\n",
        "crash save_again(three) 1",
    ),
    Mutant(
        "deleted in place",
        "repo/gc.py",
        "    reserve.spend(root, lambda: local.vanish(root / name, hole))\n",
        "    hole = root / name\n",
        "crash save_and_prune(three) 1",
    ),
    Mutant(
        "a strip begins with the files",
        "repo/gc.py",
        "    reserve.spend(root, lambda: local.replace(directory / codec.NAME, codec.encode(light)))\n",
        "    for name in gone:\n        local.unlink(directory / name)\n"
        "    local.replace(directory / codec.NAME, codec.encode(light))\n",
        "crash save_and_strip(three) 1",
    ),
    Mutant(
        "what is pinned may go",
        "repo/gc.py",
        "not record.ours or record.pinned or theirs",
        "not record.ours or theirs",
        "test_crash_points.py",
    ),
    Mutant(
        "nobody asks who holds it", "repo/gc.py", "            if why:  #", "            if False:  #", "test_leases.py"
    ),
    Mutant(
        "leftovers stay",
        "repo/gc.py",
        '    for place in ("tmp", "trash"):\n',
        "    for place in ():\n",
        "crash next_save(three) 5",
    ),
    Mutant(
        "the sweep follows links",
        "repo/gc.py",
        "        if not hidden(root, place).is_symlink():",
        "        if True:",
        "test_bin.py test_security_links.py",
    ),
    Mutant(
        "damage is resumed from",
        "finding.py",
        'lambda record: verify.problems(root, record, full=check == "full", sure=True, held=held)',
        "lambda record: ()",
        "test_corruption.py test_damage.py",
    ),
    Mutant(
        "sizes alone are compared",
        "repo/verify.py",
        'return "" if found == expected else',
        'return "" if found.size == expected.size else',
        "test_corruption.py test_damage.py",
    ),
    Mutant(
        "missing files are overlooked",
        "repo/read.py",
        '    return "; ".join(faults[:3])\n',
        '    return ""\n',
        "test_crash_points.py -k I6",
    ),
    Mutant(
        "a look that failed is believed",
        "behind.py",
        "        return records(self.root, sure=True)\n",
        "        return records(self.root)\n",
        "look next_save(three) 7",
    ),
    Mutant(
        "going back isn't written down",
        "manager.py",
        "                write_head(self.door, Head(",
        "                (lambda *_: None)(self.door, Head(",
        "crash go_back(three) 4",
    ),
    Mutant(
        "flipped bits in small files are read",
        "repo/sealed.py",
        "    if KEY in value and",
        "    if False and",
        "test_corruption.py",
    ),
    Mutant(
        "two writers",
        "repo/lock.py",
        "            self._lock.acquire()\n",
        "            pass\n",
        "test_crash_points.py test_processes.py test_fenced.py",
    ),
    Mutant(
        "a fence that stays up",
        "repo/lock.py",
        "            if is_fence(name) and name != self._fence.name:\n",
        "            if False:\n",
        "test_fenced.py",
    ),
    Mutant(
        "late metrics aren't synced",
        "repo/metrics.py",
        'f"{line}\\n".encode(), sync=True)',
        'f"{line}\\n".encode(), sync=False)',
        "power record_metric(tagged) 1",
    ),
    Mutant(
        "adopted files aren't synced",
        "repo/adopt.py",
        "    local.sync_tree(item.path, item.files)\n",
        "",
        "test_faults.py -k did_not_sync",
    ),
    Mutant(
        "an undo begins with the manifest",
        "repo/bin.py",
        "    for file, (kept, target) in there.items():\n",
        "    local.replace(directory / codec.NAME, local.read(source / codec.NAME, codec.LIMIT))\n"
        "    for file, (kept, target) in there.items():\n",
        "crash undo(stripped) 1",
    ),
    Mutant(
        "no reserve",
        "repo/reserve.py",
        "        if error.errno not in FULL or not give_up(root):\n",
        "        if True:\n",
        "test_disk_full.py",
    ),
)


def caught(mutant: Mutant) -> str:
    """How it was caught, in one line; "" if it survived. Raises ValueError if the package has changed meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(HERE / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("tests", "faults", "demo", "examples", "docs", "benchmarks"):
            (place / name).symlink_to(HERE / name)
        shutil.copy(HERE / "pyproject.toml", place)
        path = place / "src" / "lastgood" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.name}: {mutant.file} has that text {text.count(mutant.old)} times")
        path.write_text(text.replace(mutant.old, mutant.new))
        return red(mutant, place)


def red(mutant: Mutant, place: Path) -> str:
    """Run what has to catch it against the package in `place`."""
    home = {"PYTHONPATH": f"{place / 'src'}:{place}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m"]
    if mutant.red.startswith("test_"):
        options = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "-c", os.fspath(HERE / "pyproject.toml")]
        command += ["pytest", *options, "--rootdir", os.fspath(HERE), *mutant.red.split()]
        folder, failed = HERE / "tests", 1  # pytest: tests failed; any other status is a mistake in the table
    else:
        lane, operation, every = mutant.red.split()
        command += ["faults.mutants", "--lane", lane, operation, every]
        folder, failed = place, RED
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **home}, capture_output=True, text=True, check=False, timeout=900
    )
    lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    if done.returncode not in (0, failed):
        raise RuntimeError(f"{mutant.name}: {' '.join(command)} ended with {done.returncode}: {lines[-1:]}")
    return (lines[-1] if lines else mutant.red)[:160] if done.returncode else ""


def lane(name: str, operation: str, every: int) -> str:
    """The first bad point of a lane, in words; "" if there is none."""
    from faults import lanes

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as scratch:
        chosen = lanes.named(operation)
        try:
            bench = lanes.Bench(chosen, Path(scratch))
        except Exception as error:  # nothing was broken yet, and it can't even do what it is for
            return f"{operation} fails undisturbed: {type(error).__name__}: {error}"
        for point in lanes.points(name, bench, every):
            if wrong := lanes.run(name, bench, point):
                return f"{name} {operation} {point}: {wrong}"
    return ""


def main(arguments: Sequence[str]) -> int:
    """The number of mutants that survived."""
    if arguments[:1] == ["--lane"]:
        wrong = lane(arguments[1], arguments[2], int(arguments[3]))
        print(wrong)
        return RED if wrong else 0
    chosen = [mutant for mutant in MUTANTS if not arguments or mutant.name in arguments]
    survived = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, how in zip(chosen, pool.map(caught, chosen), strict=True):
            survived += not how
            print(f"{'caught  ' if how else 'SURVIVED'}  {mutant.name}: {how or mutant.red}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutants caught")
    return survived


if __name__ == "__main__":
    sys.exit(min(RED, main(sys.argv[1:])))
