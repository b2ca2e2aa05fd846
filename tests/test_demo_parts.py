"""The demo's parts: its corpus, tokenizer and base model, what it sees on disk, what it draws and what it proves."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from demo import base, show
from demo.__main__ import newest, said, staging
from demo.corpus import ANSWER_LIMIT, pairs
from demo.train import digest

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "data" / "run-format-1"
RESULT: dict[str, Any] = {
    "weights": "ab" * 32,
    "loss": {str(step): 8 - step / 10 for step in range(1, 13)},
    "eval_loss": {str(step): 7.5 - step / 10 for step in range(2, 13, 2)},
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return pairs(quiet=True)


@pytest.fixture(scope="module")
def words(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer as the training script gets it: trained, saved and loaded again."""
    from transformers import AutoTokenizer

    place = tmp_path_factory.mktemp("words")
    base.tokenizer(row["prompt"] + row["completion"] for row in rows).save_pretrained(place)
    return AutoTokenizer.from_pretrained(place)


def test_the_corpus_is_thousands_of_usable_pairs(rows: list[dict[str, str]]) -> None:
    assert len(rows) > 2000
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(0 < len(row["completion"]) <= ANSWER_LIMIT for row in rows)
    # The answer isn't in the question.
    assert sum(row["completion"] in row["prompt"] for row in rows) < len(rows) / 100


def test_the_corpus_is_the_same_in_another_process(rows: list[dict[str, str]]) -> None:
    code = "import json; from demo.corpus import pairs; print(json.dumps(pairs(quiet=True)))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert json.loads(other.stdout) == rows


def test_the_tokenizer_knows_padding_and_end(words: Any) -> None:
    assert len(words) == base.VOCABULARY
    assert (words.pad_token, words.eos_token) == ("<pad>", "<eos>")
    assert words.pad_token_id != words.eos_token_id


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(words: Any, text: str) -> None:
    assert words.decode(words(text)["input_ids"]) == text


def test_the_tokenizer_learned_the_corpus(words: Any, rows: list[dict[str, str]]) -> None:
    text = "".join(row["prompt"] + row["completion"] for row in rows[:50])
    assert len(words(text)["input_ids"]) < len(text) / 2


def test_a_base_model_that_was_interrupted_is_made_again(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # What a kill leaves behind while the weights are being written.
    (tmp_path / "base.part").mkdir()
    (tmp_path / "base.part" / "config.json").write_text("{")
    (tmp_path / "base.part" / "half.safetensors").touch()
    done = base.prepare(tmp_path, steps=1)
    net = AutoModelForCausalLM.from_pretrained(done)
    assert 10e6 < net.num_parameters() < 30e6
    assert not (tmp_path / "base.part").exists()
    assert not (done / "half.safetensors").exists()

    before = (done / "model.safetensors").stat().st_mtime_ns
    assert base.prepare(tmp_path, steps=1) == done
    assert (done / "model.safetensors").stat().st_mtime_ns == before


def test_one_changed_bit_changes_the_digest() -> None:
    import torch

    net = torch.nn.Linear(3, 2)
    other = copy.deepcopy(net)
    assert digest(net) == digest(other)
    with torch.no_grad():
        other.weight.view(torch.int32)[1, 2] ^= 1
    assert digest(net) != digest(other)


def test_a_save_is_under_way_when_a_file_is_staged(tmp_path: Path) -> None:
    assert not staging(tmp_path)
    (tmp_path / ".lastgood" / "tmp" / "1").mkdir(parents=True)
    assert not staging(tmp_path)
    (tmp_path / ".lastgood" / "tmp" / "1" / "model.safetensors").touch()
    assert staging(tmp_path)


def test_the_newest_step_is_the_highest_number(tmp_path: Path) -> None:
    assert newest(tmp_path) == 0
    for name in ("checkpoint-8", "checkpoint-12", "checkpoint-100.damaged", "runs"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path) == 12


def test_reports_are_found_between_progress_bars(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("10%|# | 1/9\rlastgood: resuming from checkpoint-4 at step 4\n{'loss': 1}\n")
    assert said(tmp_path / "log") == ["lastgood: resuming from checkpoint-4 at step 4"]


def test_the_table_gives_steps_values_and_reasons() -> None:
    output = io.StringIO()
    Console(file=output, width=160).print(show.checkpoints(GOLDEN, 3))
    lines = {line.split("│")[1].strip(): line for line in output.getvalue().splitlines() if line.startswith("│")}
    assert {"2", "4"} <= set(lines)
    assert "latest" in lines["4"]
    assert "best" in lines["4"]


def test_the_plot_shows_the_kill_and_the_resume(tmp_path: Path) -> None:
    from matplotlib import image

    path = tmp_path / "loss.png"
    show.plot(path, RESULT, kept=[8, 10, 12], deleted=[2, 4, 6], killed=6, resumed=4)
    picture = image.imread(path)
    assert picture.shape[:2] == (540, 1080)
    for colour in ((214, 39, 40), (255, 127, 14)):  # the red and the orange line
        assert (abs(picture[..., :3] * 255 - colour).max(axis=-1) < 1).sum() > 50


@pytest.mark.parametrize("key", ["weights", "loss", "eval_loss"])
def test_the_proof_fails_on_any_difference(key: str) -> None:
    output = io.StringIO()
    console = Console(file=output, width=100)
    assert show.proof(console, RESULT, copy.deepcopy(RESULT))
    assert "DIFFERENT" not in output.getvalue()
    broken = copy.deepcopy(RESULT)
    broken[key] = "cd" * 32 if key == "weights" else {**RESULT[key], "2": RESULT[key]["2"] + 1e-12}
    assert not show.proof(console, RESULT, broken)
    assert output.getvalue().count("DIFFERENT") == 1
