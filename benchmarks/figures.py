"""What every benchmark does with its numbers: medians and ratios with their spread, a JSON file, a plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SCHEMA = 1
PLOT_HINT = "a plot needs matplotlib: pip install 'lastgood[plot]'"


def options(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--place", type=Path, help="directory on the disk to measure (default: the temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every measurement, for benchmarks/report.py")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="FILE.svg or FILE.png (needs matplotlib)")


def check(args: argparse.Namespace) -> None:
    """What can't be written is found out before an hour of measuring, not behind it; who is told to end cleans up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for file in (args.json, args.plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise SystemExit(f"{file}: there is no such directory")
    if args.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise SystemExit(PLOT_HINT) from None


def apart(place: Path, act: Callable[[], Any]) -> Any:
    """What `act` returns, in a process of its own. place: for what it says, and its result."""
    result, log = place / "result.json", place / "log"
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            silence = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            result.write_text(json.dumps(act()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        status = os.waitpid(pid, 0)[1]
    except BaseException:  # told to end: it goes with us
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    if status:
        raise SystemExit(f"it failed:\n{log.read_text()[-3000:]}")
    return json.loads(result.read_text())


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, width: int) -> None:
    """A table, all but its first column to the right."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def machine() -> dict[str, Any]:
    """What the numbers were measured on, without a name of it."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts["processor"] = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    torch = sys.modules.get("torch")
    return facts | ({"torch": torch.__version__.partition("+")[0]} if torch is not None else {})


def write(file: Path | None, benchmark: str, **facts: Any) -> dict[str, Any]:
    """The document of a run of a benchmark; into `file` if there is to be one."""
    words = [word for word in sys.argv[1:] if not word.startswith(("--json=", "--plot=", "--place="))]
    for option in ("--json", "--plot", "--place"):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    if "--install" in words[:-1]:
        words[words.index("--install") + 1] = "DIRECTORY"
    document = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "command": shlex.join(["scripts/bench", benchmark, *words]),
        "machine": machine(),
        **facts,
    }
    if file is not None:
        file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        print(f"written: {file}")
    return document


def middle(values: Iterable[float]) -> float:
    """The median; 0 of nothing."""
    found = list(values)
    return statistics.median(found) if found else 0.0


def spread(values: Sequence[float], digits: int = 2) -> str:
    """1.23 (1.10-1.31): the median, and from the least to the most where there are several."""
    if not values:
        return "-"
    most = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{middle(values):.{digits}f}{most}"


def seconds(values: Sequence[float]) -> str:
    """12.3 ms (11.0-14.1), or in seconds from one second on."""
    if not values:
        return "-"
    scale, unit = (1.0, "s") if middle(values) >= 1 else (1e3, "ms")
    low, mid, high = (_short(value * scale) for value in (min(values), middle(values), max(values)))
    return f"{mid} {unit}" + (f" ({low}-{high})" if len(values) > 1 else "")


def size(count: float) -> str:
    """1.49 GB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{_short(count / limit)} {unit}"
    return f"{count:.0f} B"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bars(file: Path, title: str, panels: Sequence[tuple[str, dict[str, list[float]], bool]]) -> None:
    """A panel each of horizontal bars, with a line from the least to the most: (caption, values, logarithmic)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(panels[0][1])
    shape = (4.2 * len(panels) + 2, 0.36 * len(names) + 1.4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=shape, sharey=True, squeeze=False)
    for axis, (caption, values, logarithmic) in zip(axes[0], panels, strict=True):
        for place, name in enumerate(names):
            some = values.get(name) or [0.0]
            ours = name.startswith(("lastgood", "managed"))
            axis.barh(place, middle(some), color="#2c7fb8" if ours else "#bbbbbb")
            axis.plot([min(some), max(some)], [place, place], color="black", linewidth=1)
        axis.set_title(caption, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        if logarithmic:
            axis.set_xscale("log")
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    _save(figure, file)


def lines(file: Path, title: str, panels: Sequence[tuple[str, str, dict[str, list[tuple[float, float]]]]]) -> None:
    """A panel each of curves with logarithmic axes. (caption, what is below, name -> points)"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (caption, below, curves) in zip(axes[0], panels, strict=True):
        for name, points in curves.items():
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel=below, ylabel="seconds")
        axis.set_title(caption, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    # Without a date or a random name in it: the same numbers give the same file.
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "lastgood"
    figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
    print(f"drawn: {file}")
