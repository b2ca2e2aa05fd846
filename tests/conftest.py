"""Fixtures that several files of tests share."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import cli
import realruns
from faults import space

# A shell that starts the tests in the background makes them ignore Ctrl-C, and nohup a hang-up; every command that they
# start would ignore it too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Whoever changes something learns of what they changed: the gate tries the same examples each time. `scripts/fuzz`
# looks for new ones, and what it finds becomes a test of its own.
settings.register_profile("gate", derandomize=True, database=None)
settings.register_profile("fuzz", suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


def pytest_collection_finish() -> None:
    """What is imported stays: without this each tiny training spends most of its time looking for garbage in torch.

    accelerate collects garbage whenever it prepares or frees something, and so does a Trainer at its end.
    """
    gc.collect()
    gc.freeze()
    # Children are killed at any moment. tqdm's own lock is shared by all that were forked: whoever dies while it draws
    # a progress bar would keep it, and the next training in this process would wait for ever.
    if "tqdm.std" in sys.modules:
        sys.modules["tqdm.std"].tqdm.set_lock(threading.RLock())


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """A failure is told at once as well as at the end: a run that something cuts short has still said what it found."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(_AtOnce(terminal))


class _AtOnce:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.write_line(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.0f} s)")
            self.terminal.write_line(report.longreprtext)


@pytest.fixture(scope="session")
def realruns_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the real runs are made once for all processes of a test run; REALRUNS_CACHE keeps them for the next."""
    kept = os.environ.get("REALRUNS_CACHE")
    base = tmp_path_factory.getbasetemp()
    return Path(kept) if kept else (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "realruns"


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is such a place: for thousands of operations of which a process is killed.

    What survives a kill is the same there as on a disk; only a loss of power would tell them apart.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 1 << 28:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 64 MiB and 1000 inodes."""
    with space.disk(tmp_path / "disk", size=64 << 20) as there:
        if not there:
            pytest.skip("mounting a small tmpfs needs root")
        yield tmp_path / "disk"


@pytest.fixture
def real(realruns_cache: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of its own of the run that a real tool wrote."""
    return lambda name: realruns.make(name, tmp_path / name, realruns_cache)


@pytest.fixture
def run_of(real: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same for every kind, "managed" included."""
    return lambda kind: cli.managed(tmp_path / "managed") if kind == "managed" else real(kind)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a real disk that can be written and read past the page cache."""
    import fcntl  # not everywhere

    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        handle = os.open(folder, os.O_TMPFILE | os.O_WRONLY)
        try:
            fcntl.fcntl(handle, fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            pytest.skip("the file system of the repository has no O_DIRECT")
        finally:
            os.close(handle)
        yield Path(folder)
