"""A disk that fails under fsync: at a chosen fsync of a save no block can be written, or from it on.

    python -m faults.blocks               every fsync of a save
    python -m faults.blocks POINT         one again, e.g. "next_save(three) once 3"

nbdkit hands the image on and answers writes with EIO while a file exists, nbdfuse makes a file of it, and ext4 is
mounted from that. ext4 marks pages clean whose write failed, so a second fsync of the same file may succeed although
nothing got to the disk: whoever asks again believes what isn't so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO, EROFS
from functools import cache
from pathlib import Path

from rich.console import Console

from lastgood.errors import SaveFailed
from lastgood.repo.read import records

from faults import cuts, disks, kept, tracer
from faults.operations import Operation

TOOLS = ("nbdkit", "nbdfuse", "losetup", "fusermount3")
NAMES = ("next_save(three)", "first_save(nothing)", "save_and_prune(three)")
HOW = ("sticky", "once")
TYPED, RETURNED = 18, 75
"""Exit status of a save that raised its typed error, and of one that returned."""


@cache
def missing() -> str:
    """Why this can't be tried here; "" if it can."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: nbdkit, libnbd-bin, fuse3)"
    if not os.access("/dev/fuse", os.W_OK):
        return "there is no /dev/fuse to write to"
    why = tracer.missing() or disks.missing("ext4")
    if why:
        return why
    try:
        with tempfile.TemporaryDirectory() as place:
            image = disks.make("ext4", Path(place) / "image")
            with failing(image, Path(place)) as block, disks.mounted(block.device, Path(place) / "at"):
                return ""
    except (OSError, subprocess.CalledProcessError, TimeoutError) as error:
        said = getattr(error, "stderr", None) or error
        return f"a disk that fails can't be made here: {said}"


@dataclass(frozen=True, slots=True)
class Block:
    """device: to mount; trigger: while this file exists, every write to the device fails with EIO."""

    device: Path
    trigger: Path


@contextmanager
def failing(image: Path, place: Path) -> Iterator[Block]:
    """The image as a block device that can be told to fail. Raises CalledProcessError or TimeoutError."""
    disks.private()
    trigger, at = place / "trigger", place / "fuse"
    at.mkdir(exist_ok=True)
    serve = ["nbdkit", "-s", "--exit-with-parent", "--filter=error", "file", os.fspath(image)]
    serve += ["error-pwrite=EIO", "error-pwrite-rate=100%", f"error-file={trigger}"]
    said = place / "nbdfuse.log"
    with said.open("wb") as log:
        words = ["nbdfuse", os.fspath(at / "disk"), "--command", *serve]
        process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _until(lambda: (at / "disk").exists() or process.poll() is not None)
        if process.poll() is not None:
            raise OSError(EIO, f"nbdfuse ended: {said.read_text()[-500:]}")
        device = disks.command("losetup", "--find", "--show", os.fspath(at / "disk")).strip()
        try:
            yield Block(Path(device), trigger)
        finally:
            trigger.unlink(missing_ok=True)
            disks.command("losetup", "--detach", device)
    finally:
        subprocess.run(["fusermount3", "-u", "-z", os.fspath(at)], capture_output=True, check=False)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(done: Callable[[], bool], limit: float = 60.0) -> None:
    deadline = time.monotonic() + limit
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {limit:.0f} s")
        time.sleep(0.01)


@dataclass(slots=True)
class Break:
    """Fails the disk when the `point`-th fsync is about to happen; once: until the same thread's next call."""

    point: int
    block: Block
    once: bool
    seen: int = 0
    thread: int = -1

    def __call__(self, number: int, call: tracer.Call) -> bool:
        if call.thread == self.thread and self.once:
            self.block.trigger.unlink(missing_ok=True)
        if call.name in ("fsync", "fdatasync"):
            self.seen += 1
            if self.seen == self.point:
                self.thread = call.thread
                self.block.trigger.touch()
        return False


def verdict(name: str, how: str, point: int) -> str:
    """What is wrong when the disk fails at this fsync."""
    bench = cuts.bench("ext4", name)
    copy, log = disks.copied(bench.image, bench.place / "copy"), bench.place / "log"
    log.write_text("")
    with failing(copy, bench.place) as block, disks.mounted(block.device, bench.place / "at") as disk:
        root = disk.at / "run"
        breaks = Break(point, block, how == "once")
        done = tracer.trace(lambda: _status(bench.operation, root), root, log, breaks)
    if breaks.seen < point:
        return f"there were only {breaks.seen} fsyncs"
    if done.status not in (RETURNED, TYPED):
        return f"I5, I19: no SaveFailed, but status {done.status}: {log.read_text()[-500:]}"
    with disks.mounted(copy, bench.place / "at") as disk:
        return again(done.calls) or _judged(bench, disk.at / "run", returned=done.status == RETURNED)


def _judged(bench: cuts.Bench, root: Path, *, returned: bool) -> str:
    """The disk works again. A save that failed has published nothing."""
    there = {record.id for record in records(root) if record.ours}
    if not returned and there - bench.before.ours.keys():
        return "I5: a save that failed has published a checkpoint"
    if returned and bench.after.ours.keys() - bench.before.ours.keys() - there:
        return "I2, I5: it returned although nothing got to the disk"
    return bench.judged(root, returned=False)


def _status(operation: Operation, root: Path) -> None:
    try:
        cuts.act(operation, root)
    except SaveFailed as error:
        print(repr(error))
        raise SystemExit(TYPED if error.hint else 1) from error
    raise SystemExit(RETURNED)


def again(calls: list[tracer.Call]) -> str:
    """I5: a file whose fsync failed isn't asked again; what it holds is unknown from then on.

    Another file that gets the name of one that was removed is asked for itself.
    """
    failed: set[tuple[str, ...]] = set()
    for call in calls:
        if call.name in ("unlink", "unlinkat") and call.result == 0:
            failed.discard(call.paths)
        if call.name in ("fsync", "fdatasync"):
            if call.paths in failed and call.paths[0]:
                return f"I5: {call} was tried again after it had failed"
            if call.result in (-EIO, -EROFS):
                failed.add(call.paths)
    return ""


def _syncs(name: str) -> int:
    return sum(call.startswith(("fsync", "fdatasync")) for call in cuts.bench("ext4", name).calls)


def points(*names: str) -> list[str]:
    """OPERATION, HOW, FSYNC of each; none where this can't be tried."""
    return [
        f"{name} {how} {point}"
        for name in (() if missing() else names or NAMES)
        for how in HOW
        for point in range(1, _syncs(name) + 1)
    ]


def run(point: str) -> str:
    """What is wrong after this point; "" if nothing is."""
    name, how, number = point.split(" ")
    return verdict(name, how, int(number))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.blocks", description=__doc__)
    parser.add_argument("point", nargs="?")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has found")
    args = parser.parse_args()
    console = Console()
    if why := missing():
        console.print(f"skipped: {why}")
        return 0
    if args.point:
        fault = run(args.point)
        console.print(fault or "nothing is wrong", highlight=False)
        return bool(fault)
    found = kept.sweep("blocks", points(), run, console, fresh=args.fresh)
    kept.publish("blocks", "python -m faults.blocks", cuts.counted(found))
    console.print(f"{len(found)} points, {sum(map(bool, found.values()))} bad")
    return any(found.values())


if __name__ == "__main__":
    sys.exit(main())
