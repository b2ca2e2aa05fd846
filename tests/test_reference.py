"""The pages about the command line are true: the reference, the JSON schemas and the recorded sessions."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from docs import reference, rulebook, runs, sessions
from lastgood.cli.main import cli
from lastgood.format.tensors import Tensor, encode

ROOT = Path(__file__).parent.parent
JSON_PAGE = (ROOT / "docs" / "json.md").read_text()


def test_the_reference_page_is_what_the_commands_say() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == reference.page(), "./scripts/record writes it anew"


def test_every_exit_status_and_verb_is_explained() -> None:
    from lastgood.cli.main import EXITS, MODULES

    page = reference.page()
    assert {kind.__name__ for kind, _ in EXITS} == reference.MEANINGS.keys()
    assert all(f"### {verb}\n" in page for verb in MODULES)


# ---- json.md ---------------------------------------------------------------------------------

Tree = dict[str, Any]
FREE = ("NAME", "PART")
"""Stand for any key."""


def documented() -> dict[str, Tree]:
    """schema -> its fields as a tree of keys; a list is the key []."""
    found: dict[str, Tree] = {}
    for section in re.split(r"^## ", JSON_PAGE, flags=re.MULTILINE)[1:]:
        tree = found.setdefault(section.split()[0], {})
        for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
            for path in re.findall(r"`([^`]+)`", cell):
                at = tree
                for key in re.findall(r"\[\]|[^.\[\]]+", path):
                    at = at.setdefault(key, {})
    return found


def seen(value: Any, tree: Tree, where: str, used: set[int]) -> None:
    """Marks what appears in the documentation; fails on what isn't in it."""
    used.add(id(tree))
    if not tree:
        return  # a leaf: what is below it is described in words
    if value is None:
        used.update(map(id, below(tree)))  # nothing there to document
    elif isinstance(value, list):
        for item in value:
            seen(item, tree["[]"], f"{where}[]", used)
    else:
        assert isinstance(value, dict), f"{where} is {value!r}"
        for key, item in value.items():
            free = next((name for name in FREE if name in tree), None)
            assert key in tree or free, f"{where}.{key} isn't documented"
            seen(item, tree[key if key in tree else str(free)], f"{where}.{key}", used)


def below(tree: Tree) -> Iterator[Tree]:
    for child in tree.values():
        yield child
        yield from below(child)


def stock_run(root: Path) -> Path:
    """As small as a stock Trainer's checkpoints can be: two with other tensors, and one that was cut off."""
    for step, names in ((2, ("a", "b")), (4, ("b", "c")), (6, ("b",))):
        home = root / f"checkpoint-{step}"
        home.mkdir(parents=True)
        tensors = [Tensor(name, "U8", (step,), memoryview(bytes(step))) for name in names]
        (home / "model.safetensors").write_bytes(b"".join(bytes(part) for part in encode(tensors, {})[1]))
        (home / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": step}))
        if step < 6:
            history = [{"step": step, "eval_loss": 1 / step}, {"step": step, "loss": 2.0}]
            (home / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    return root


def cut(source: Path, root: Path, age: float) -> Path:
    """The run, with a newest checkpoint whose save was interrupted so many seconds ago."""
    shutil.copytree(source, root)
    (root / "checkpoint-6" / "trainer_state.json").unlink()
    for path in [root, *root.rglob("*")]:
        os.utime(path, (time.time() - age,) * 2)
    return root


AGAIN = """
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
rows = [*state["log_history"], {"step": 5, "loss": 3.0, "grad_norm": 1.0}, {"step": 6, "loss": 3.0, "grad_norm": 1.0}]
home = run / "checkpoint-6"
home.mkdir()
real = pathlib.Path(sys.argv[2]) / "checkpoint-2" / "config.json"
real.write_text(real.read_text() + " ")  # as a script does that doesn't work where it was told to
print("trained")
(home / "trainer_state.json").write_text(json.dumps({"global_step": 6, "log_history": rows}))
"""
"""A training that comes to another loss."""


def test_every_field_is_documented_and_every_documented_field_exists(
    tmp_path: Path, real: Callable[[str], Path]
) -> None:
    managed, stock = tmp_path / "managed", stock_run(tmp_path / "stock")
    shutil.copytree(ROOT / "tests" / "data" / "run-format-1", managed)
    empty = stock_run(tmp_path / "none")
    for step in (2, 4):
        shutil.rmtree(empty / f"checkpoint-{step}")
    again, home = tmp_path / "again.py", shutil.copytree(real("trainer_full"), tmp_path / "home")
    again.write_text(AGAIN)
    broken, old = (cut(real("trainer_full"), tmp_path / name, age) for name, age in (("broken", 90), ("old", 3600)))
    calls = [
        f"doctor {broken}",
        *(f"doctor {run} --fix" for run in (broken, old)),
        "doctor --rules",
        f"doctor {home} --json --prove 4 -- {sys.executable} {again} {{run}} {home}",
        *(f"-C {run} {verb}" for run in (managed, stock) for verb in ("log", "verify", "verify --full", "df", "du")),
        *(f"-C {run} {verb}" for run in (managed, stock) for verb in ("resume", "resume --check")),
        *(f"-C {run} prune -n --keep-last 1" for run in (managed, stock)),
        *(f"-C {managed} {verb}" for verb in ("show 4", "diff 2 4", "diff 2 4 --values", "prune --keep-last 1 --yes")),
        *(f"-C {stock} {verb}" for verb in ("show 4", "diff 2 4", "prune --stock -n --keep-last 1")),
        f"diff {tmp_path}/stock/checkpoint-4 {ROOT}/tests/data/run-format-1/checkpoint-4",
        "plan --model 13B --max-steps 1000 --save-steps 100 --keep-best 2 --crash-at 500 --compare stock --disk 250GB",
        f"plan {managed} --keep-last 1",
        f"plan {stock} --keep-last 1",
        f"-C {managed} bisect --mark",
        f"-C {managed} log --all",
        f"-C {empty} resume",
    ]
    pages, used = documented(), set[int]()
    for call in calls:
        words = call.split()
        result = CliRunner().invoke(cli, words if "--json" in words else [*words, "--json"])
        assert isinstance(result.exception, (SystemExit, type(None))), f"{call}: {result.exception!r}"
        found = json.loads(result.stdout)
        assert found["schema"] in pages, call
        seen(found, pages[found["schema"]], found["schema"], used)
    for schema, tree in pages.items():
        unused = [key for parent in [tree, *below(tree)] for key, child in parent.items() if id(child) not in used]
        assert not unused, f"{schema}: never seen: {unused}"


# ---- the sessions ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    runs.prepare(place)
    return place


@pytest.mark.parametrize("page", sessions.PAGES, ids=lambda page: page.stem)
def test_the_recorded_sessions_are_still_what_happens(page: Path, made: Path) -> None:
    text = page.read_text()
    assert len(sessions.BLOCK.findall(text)) >= 1, page.name
    now = sessions.replay(text, made)
    assert sessions.shape(now) == sessions.shape(text), f"{page.name}: ./scripts/record writes it anew"


def test_shapes_leave_out_what_differs_from_run_to_run() -> None:
    a = "checkpoint-400.ea7a893f   33s  1.49578  full   1.4 MiB  3rd newest"
    assert sessions.shape(a) == sessions.shape("checkpoint-50.0123abcd  2m  0.5  full  471.0 KiB  4th newest")
    assert sessions.shape(a) != sessions.shape(a.replace("full", "weights"))
    assert sessions.shape("451  1.38799345  10786f18") == sessions.shape("9  2.1037066  d5310d05") == ["N N ID"]


def test_the_pages_of_the_rules_are_what_the_rules_say() -> None:
    wanted = rulebook.pages()
    there = {file.name: file.read_text() for file in rulebook.HOME.glob("*.md")}
    assert there == wanted, "./scripts/record writes them anew"
