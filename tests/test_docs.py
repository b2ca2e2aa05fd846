"""Every code block of the documentation runs, top to bottom, as a reader would run it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lastgood
from test_trainers import sentences, words

import forked
from training import Case, tiny_gpt2

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def given() -> dict[str, Any]:
    """The names that blocks use and a reader has: a model, data, a tokenizer, a trainer to build."""
    from datasets import Dataset
    from peft import LoraConfig

    rows = [{"prompt": text[:6], "completion": text[6:] + "."} for text in sentences(48)]

    def make_trainer(out: str, **args: Any) -> Any:
        return Case("docs", args={"save_total_limit": None, **args}, evaluate=True).trainer(Path(out))

    return {
        "lastgood": lastgood,
        "model": tiny_gpt2(vocab_size=300),
        "tokenizer": words(),
        "train": Dataset.from_list(rows[:40]),
        "evals": Dataset.from_list(rows[40:]),
        "lora": LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        "make_trainer": make_trainer,
    }


def execute(page: Path, place: Path) -> None:
    os.chdir(place)
    names = given()
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_code_runs(page: Path, tmp_path: Path) -> None:
    assert forked.run(execute, page, tmp_path, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_only_known_kinds_of_blocks() -> None:
    for page in PAGES:
        assert {kind for kind, _ in BLOCK.findall(page.read_text())} <= {"python", "sh", "text", "console"}, page


def test_the_commands_exist() -> None:
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                command = ROOT / line.split()[0]
                assert os.access(command, os.X_OK), f"{page.name}: {line}"
                subprocess.run(["bash", "-n", command], check=True)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_options_are_documented() -> None:
    from lastgood.integrations.lightning.options import KNOWN
    from lastgood.integrations.transformers.options import Options
    from lastgood.policy import OPTIONS

    text = "\n".join(page.read_text() for page in PAGES)
    assert not [name for name in [*Options.__dataclass_fields__, *OPTIONS, *KNOWN] if name not in text]
