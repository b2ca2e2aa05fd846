"""Each benchmark runs, says what it measured, and its file makes the table of the page. No number is judged."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import figures, report, scaling
from benchmarks.states import NAMES, State, gpt2, made
from benchmarks.ways import WAYS

import forked


def go(name: str, words: list[str]) -> None:
    """A benchmark in a process that has imported everything already."""
    warnings.simplefilter("default")
    sys.argv = [name, *words]
    importlib.import_module(f"benchmarks.{name}").main()


def bench(name: str, out: Path, *words: str, plot: bool = False) -> dict[str, Any]:
    """The document that a run of a benchmark writes; its table is printed."""
    file, log = out / f"{name}.json", out / "log"
    more = ["--json", str(file), "--place", str(out), *(["--plot", str(out / f"{name}.svg")] if plot else [])]
    assert forked.run(go, name, [*words, *more], log=log, timeout=280) == 0, log.read_text()
    assert not [path for path in out.iterdir() if path.is_dir()], "nothing is left behind"
    document = json.loads(file.read_text())
    assert document["benchmark"] == name and document["machine"]["cores"] >= 1
    assert str(out) not in file.read_text(), "where it was measured is nobody's business"
    return document  # type: ignore[no-any-return]


def test_stall(tmp_path: Path) -> None:
    words = ["--state", "tiny", "--every", "1", "--saves", "2", "--repeat", "1", "--threads", "1"]
    document = bench("stall", tmp_path, *words, "--only", "orbax", "lastgood background")
    assert document["command"].startswith("scripts/bench stall --state tiny --every 1")
    assert set(document["runs"]) == {"nothing", "lastgood background"}
    assert list(document["missing"]) == ["orbax"]
    for way, (run,) in document["runs"].items():
        assert run["loop"] > 0 and run["bytes"] > 1e6
        if way != "nothing":
            assert len(run["stalls"]) == len(run["durable"]) == 2
            assert run["written"] >= run["bytes"]
            assert all(whole >= stall * 0.5 > 0 for whole, stall in zip(run["durable"], run["stalls"], strict=True))
    assert "| lastgood background |" in report.told(document)


def test_a_benchmark_that_is_told_to_end_leaves_nothing_behind(tmp_path: Path) -> None:
    words = ["--state", "tiny", "--repeat", "9", "--place", str(tmp_path)]
    pid = forked.start(go, "stall", words, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert forked.wait(pid) == 143, (tmp_path / "log").read_text()
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_scaling(tmp_path: Path) -> None:
    document = bench("scaling", tmp_path, "--most", "1e7", "--tensors", "100", "--repeat", "1")
    assert list(document["bytes"]) == ["10000000"] and list(document["tensors"]) == ["10", "100"]
    assert all(run[cost] > 0 for axis in ("bytes", "tensors") for (run,) in document[axis].values() for cost in run)
    assert "^" in report.told(document)


def test_durable(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot of a benchmark needs matplotlib")
    document = bench("durable", tmp_path, "--state", "tiny", "small-20", "--repeat", "1", plot=True)
    assert list(document["runs"]) == ["tiny", "small-20"]
    assert all(len(runs) == 2 for kinds in document["runs"].values() for runs in kinds.values())
    assert (tmp_path / "durable.svg").read_text().startswith("<?xml")
    assert "raw O_DIRECT" in report.told(document)


def test_saves(tmp_path: Path) -> None:
    words = ["--state", "tiny", "--words", "300", "--every", "1", "--saves", "3", "--repeat", "1", "--threads", "1"]
    document = bench("saves", tmp_path, *words, plot=True)
    assert list(document["runs"]) == ["nothing", "stock", "managed", "managed, background"]
    for way, (found,) in document["runs"].items():
        assert found["train"] > 0
        assert len(found["stalls"]) == (0 if way == "nothing" else 3)
        assert (found["bytes"] > 1e6) == (way != "nothing")
    assert "| managed, background |" in report.told(document)
    assert (tmp_path / "saves.svg").exists()


def test_restore(tmp_path: Path) -> None:
    document = bench("restore", tmp_path, "--size", "1M", "--repeat", "1", "--only", "lastgood")
    assert set(document["runs"]) == {"read", "lastgood"}
    assert "| lastgood |" in report.told(document)


def test_a_file_that_can_not_be_written_is_refused_before_the_measuring(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.run(go, "durable", ["--json", str(tmp_path / "none" / "file.json")], log=log) != 0
    assert "no such directory" in log.read_text()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    "way", ["torch.save", "safetensors + fsync", "stock Trainer + fsync", "dcp.save", "Lightning", "lastgood"]
)
def test_every_way_writes_the_whole_state(way: str, tmp_path: Path) -> None:
    """A way that left something out would be fast."""
    state = made("tiny", length=4)
    made_so = WAYS[way](state, tmp_path)
    made_so.step(1)
    made_so.save(1)
    made_so.finish()
    found = made_so.path(1)
    files = [found] if found.is_file() else [path for path in found.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) >= state.bytes


def test_an_adapter_is_saved_without_its_base() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(gpt2(64, 2, 1000), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    state = State("lora", model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(state.weights()) == names and all("lora_" in name for name in names)
    assert "small-3000" in NAMES


@settings(deadline=None)
@given(st.floats(0.1, 3), st.floats(1e-9, 1e3), st.lists(st.integers(1, 10**9), min_size=2, max_size=6, unique=True))
def test_the_exponent_is_that_of_a_power(power: float, scale: float, sizes: list[int]) -> None:
    points = [(float(size), scale * float(size) ** power) for size in sorted(sizes)]
    assert scaling.exponents(points) == pytest.approx([power] * (len(points) - 1), rel=1e-4)


def test_what_is_steep_is_told() -> None:
    costs = dict.fromkeys(scaling.COSTS, 1.0)
    quadratic = {"10": [costs], "100": [{**costs, "save": 100.0}]}
    linear = {"10": [costs], "100": [dict.fromkeys(scaling.COSTS, 10.0)]}
    assert scaling.steep({"bytes": linear, "tensors": quadratic}) == [
        "save by tensors: exponent 2.00 over the last decade"
    ]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), max_size=5))
def test_a_number_is_written_with_its_spread(values: list[float]) -> None:
    assert figures.seconds(values) and figures.spread(values)
    assert ("(" in figures.seconds(values)) == (len(values) > 1)
    assert not values or min(values) <= figures.middle(values) <= max(values)
    assert math.isfinite(figures.middle(values))


def test_the_page_has_the_figures_that_are_there() -> None:
    page = report.PAGE.read_text()
    assert report.written(page, report.FIGURES) == page, "scripts/bench report writes it anew"
    asked = {name for _, name, _ in report.BLOCK.findall(page)}
    assert {file.stem for file in report.FIGURES.glob("*.json")} <= asked, "each has its place in the page"
