"""The trail of real runs: what it holds, that it changes nothing, and what is read out of it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

import lastgood
from lastgood.doctor.divergence import equal, first_divergence, following, relived
from lastgood.repo import trail
from lastgood.repo.layout import hidden
from lastgood.repo.trail import Entry, Life
from lastgood.state.batch import WHOLE, Batches, digest

import forked
from training import Case, KillAt, outcome, train

CASES = [
    Case("plain"),
    Case("gradient accumulation with a remainder", rows=10, args={"gradient_accumulation_steps": 3}),
    Case("workers", args={"dataloader_num_workers": 2}, noise="torch python"),
    Case("a stream", stream=True),
    Case("a stream and a worker", stream=True, args={"dataloader_num_workers": 1}),
    Case("evaluation in between, noisy data", evaluate=True, noise="torch", args={"eval_steps": 1}),
    Case("second epoch, logged seldom", rows=10, args={"logging_steps": 3}),
    Case("batches that are replayed", options={"data_skip": "replay"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_killed_run_and_its_relaunch_agree_on_the_steps_that_both_trained(case: Case, tmp_path: Path) -> None:
    """Killed after step 7, saved at 4; what was not logged yet by then is not in the trail."""
    out, log = tmp_path / "out", tmp_path / "log"
    case = replace(case, args={**case.args, "save_steps": 4})
    assert forked.run(train, case, out, tmp_path / "a", kill=7, log=log) == -9, log.read_text()
    assert forked.run(train, case, out, tmp_path / "a", log=log) == 0, log.read_text()
    first, second = trail.read(out)
    upto = 6 if case.args.get("logging_steps") == 3 else 7
    assert [entry.step for entry in first.entries] == list(range(1, upto + 1))
    assert [entry.step for entry in second.entries] == [5, 6, 7, 8]
    assert (first.start, second.start, second.run) == (0, 4, first.run)
    assert first.saves == {second.checkpoint: 4}
    assert all(len(entry.batch) == 16 for entry in (*first.entries, *second.entries))
    assert len({entry.batch for entry in first.entries[:3]}) == 3, "other data, other hashes"
    (again,) = relived((first, second))
    assert (again.life, again.start, again.compared, again.divergence) == (2, 4, upto - 4, None)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_holds_what_the_trainer_logs_and_changes_nothing(accumulate: int, tmp_path: Path) -> None:
    case = Case("t", noise="torch", evaluate=True, args={"gradient_accumulation_steps": accumulate})
    found = {}
    for name, on in (("on", True), ("off", False)):
        trainer = lastgood.manage(case.trainer(tmp_path / name), trail=on)
        trainer.train()
        found[name] = outcome(trainer)
    assert found["on"] == found["off"]
    assert trail.read(tmp_path / "off") == ()
    assert not hidden(tmp_path / "off", trail.NAME).exists()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    (life,) = trail.read(tmp_path / "on")
    told = [(e.step, e.loss, e.grad_norm, e.lr) for e in life.entries]
    assert told == [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows]


def test_a_trail_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: Any) -> None:
    case = Case("t")
    hidden(tmp_path / "b", trail.NAME).mkdir(parents=True)
    results = []
    for name in ("a", "b"):
        trainer = lastgood.manage(case.trainer(tmp_path / name))
        trainer.train()
        results.append(outcome(trainer))
    assert results[0] == results[1]
    assert [record.step for record in lastgood.open(tmp_path / "b").checkpoints] == [2, 4, 6, 8]
    assert caplog.text.count("the trail of this run can't be written") == 1


class Obstructed(TrainerCallback):
    """From step 4 to 6 the trail is out of reach."""

    def __init__(self, path: Path) -> None:
        self.path, self.aside = path, path.with_name("aside")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            self.path.rename(self.aside)
            self.path.mkdir()
        if state.global_step == 7:
            self.path.rmdir()
            self.aside.rename(self.path)


def test_what_could_not_be_written_is_a_gap_and_said_once(tmp_path: Path, caplog: Any) -> None:
    trainer = lastgood.manage(Case("t").trainer(tmp_path, Obstructed(hidden(tmp_path, trail.NAME))))
    trainer.train()
    (life,) = trail.read(tmp_path)
    assert [entry.step for entry in life.entries] == [1, 2, 3, 7, 8]
    assert [record.step for record in lastgood.open(tmp_path).checkpoints] == [2, 4, 6, 8]
    assert caplog.text.count("the trail of this run can't be written") == 1


def test_packed_sft_has_its_data_in_the_trail(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from test_trainers import sentences, words

    from training import tiny_gpt2

    def packed(*callbacks: Any) -> Any:
        torch.set_num_threads(1)
        config = SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, logging_steps=1, save_steps=2,
            packing=True, max_length=16, padding_free=False, report_to=[], use_cpu=True, disable_tqdm=True, seed=7,
            packing_strategy="wrapped",
        )  # fmt: skip
        rows = Dataset.from_list([{"text": text} for text in sentences(40)])
        model = tiny_gpt2(vocab_size=300)
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=rows, processing_class=words(), callbacks=list(callbacks)
        )
        lastgood.manage(trainer).train(resume_from_checkpoint="auto")

    assert forked.run(packed, KillAt(3), log=tmp_path / "log") == -9, (tmp_path / "log").read_text()
    assert forked.run(packed, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    lives = trail.read(tmp_path / "out")
    assert [[entry.step for entry in life.entries] for life in lives] == [[1, 2, 3], [3, 4]]
    assert all(entry.batch for life in lives for entry in life.entries)
    assert [(again.compared, again.divergence) for again in relived(lives)] == [(1, None)]


VALUES = st.one_of(st.none(), st.floats())
ENTRIES = st.lists(
    st.builds(Entry, st.integers(0, 50), st.just(1), VALUES, VALUES, st.sampled_from(["", "0" * 16, "a" * 16]), VALUES),
    min_size=1,
    max_size=12,
    unique_by=lambda entry: entry.step,
)


@given(ENTRIES, st.integers(0, 4000))
@settings(max_examples=60, deadline=None)
def test_a_trail_torn_anywhere_keeps_its_whole_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Entry], cut: int
) -> None:
    root = tmp_path_factory.mktemp("r")
    hidden(root).mkdir()
    assert trail.begin(root, run="f" * 16, start=0, checkpoint="") == 1
    trail.append(root, entries)
    path = hidden(root, trail.NAME)
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    cut = min(len(data), start + cut)
    path.write_bytes(data[:cut])
    whole = data[start:cut].count(b"\n") + (data[cut : cut + 1] == b"\n")
    kept = sorted(entries[:whole], key=lambda entry: entry.step)
    assert [repr(entry) for entry in trail.read(root)[0].entries] == [repr(entry) for entry in kept]
    assert trail.begin(root, run="f" * 16, start=3, checkpoint="c") == 2
    trail.append(root, [Entry(4, 2, 1.0)])
    assert trail.read(root)[1].entries == (Entry(4, 2, 1.0),)


def test_a_long_trail_loses_its_oldest_steps_and_no_life(tmp_path: Path) -> None:
    hidden(tmp_path).mkdir()
    life = trail.begin(tmp_path, run="f" * 16, start=0, checkpoint="")
    trail.append(tmp_path, [Entry(step, life, 1.0, 1.0, "0" * 16, 1e-4) for step in range(1, 101)])
    trail.saved(tmp_path, life, 10, "c" * 16)
    path = hidden(tmp_path, trail.NAME)
    for _ in range(3):
        trail.shorten(path)
    (found,) = trail.read(tmp_path)
    assert found.saves == {"c" * 16: 10}
    assert [entry.step for entry in found.entries] == list(range(101 - len(found.entries), 101))
    assert 5 < len(found.entries) < 20
    assert trail.begin(tmp_path, run="f" * 16, start=0, checkpoint="") == 2


@pytest.mark.parametrize("line", [b'"run"' * (8 << 20), b'{"life":1,"run":"a"}\n' * (2 << 20)])
def test_a_trail_that_grew_too_long_is_made_short_once(tmp_path: Path, line: bytes) -> None:
    """One line without an end, and lines that all have to stay: it isn't written anew with every step."""
    hidden(tmp_path).mkdir()
    path = hidden(tmp_path, trail.NAME)
    path.write_bytes(line)
    trail.append(tmp_path, [Entry(1, 2, 1.0)])
    assert path.stat().st_size <= trail.LIMIT * 3 // 4
    before = path.stat().st_ino
    trail.append(tmp_path, [Entry(2, 2, 1.0)])
    assert path.stat().st_ino == before
    assert [entry.step for entry in trail.read(tmp_path)[-1].entries] == [1, 2]


def test_lines_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    hidden(tmp_path).mkdir()
    lines = [
        "[]", '{"life": -1, "step": 3}', '{"life": 1, "step": true}', '{"life": "1"}',
        '{"life": 1, "step": 2, "saved": 3}',
        '{"life": 1, "step": 5, "loss": "high", "grad_norm": [1], "batch": 7, "lr": true}', "\x00\x00", "{" * 5000,
    ]  # fmt: skip
    hidden(tmp_path, trail.NAME).write_text("\n".join(lines))
    (life,) = trail.read(tmp_path)
    assert life.entries == (Entry(2, 1), Entry(5, 1))


# ---- batches ---------------------------------------------------------------------------------


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_every_byte_name_shape_and_dtype_of_a_batch_counts(size: int, data: st.DataObject) -> None:
    ids = torch.arange(size)
    same = digest({"a": ids, "b": [1, "x", None]})
    assert len(same) == 16
    assert digest({"b": [1, "x", None], "a": ids.clone()}) == same, "not the order of the names"
    other = ids.clone()
    other[data.draw(st.integers(0, size - 1))] += 1
    different = [
        {"a": other, "b": [1, "x", None]},
        {"c": ids, "b": [1, "x", None]},
        {"a": ids.int(), "b": [1, "x", None]},
        {"a": ids.reshape(1, -1), "b": [1, "x", None]},
        {"a": ids, "b": [1, "y", None]},
        {"a": ids, "b": [1, ["x"], None]},
    ]
    assert len({same, *map(digest, different)}) == 7


def test_a_batch_that_cannot_be_known_is_not_guessed_at() -> None:
    assert digest({"a": torch.ones(3, device="meta")}) == ""
    assert digest({"a": object()}) == ""
    assert digest([[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]) == ""
    assert digest({"a": torch.ones(2, dtype=torch.bfloat16), "n": np.float32(1)}) != ""
    frozen = np.ones((2, 3), dtype=np.int32)
    frozen.flags.writeable = False
    assert digest([frozen[:, ::2]]) != digest([frozen])
    large = torch.zeros(WHOLE, dtype=torch.float32)
    assert digest(large) != digest(large + 1)


def test_a_batch_costs_milliseconds_whatever_it_is() -> None:
    text, ring = "x" * (64 << 20), list[Any]()
    ring.extend([ring] * 9)
    batches: dict[str, Any] = {
        "ragged token ids": [list(range(n % 7, 1000)) for n in range(300)],
        "a long text": text,
        "long bytes": text.encode(),
        "a transposed tensor": torch.zeros(4096, 8192).t(),
        "every second number": np.zeros((4096, 16384), dtype=np.float32)[:, ::2],
        "bfloat16": torch.zeros(4096, 16384, dtype=torch.bfloat16)[:, ::2],
        "more than there is memory for": torch.zeros(1, 1).expand(1 << 20, 1 << 20),
        "a list in itself": ring,
        "a million words": ["word"] * 1_000_000,
    }
    for name, batch in batches.items():
        begin = time.process_time()
        known = digest(batch)
        assert time.process_time() - begin < 10, name
        assert bool(known) == (name not in ("a list in itself", "a million words")), name
    assert digest([*range(99), 1]) != digest([*range(99), True]) != digest([*range(99), 1.0])
    assert digest(text) != digest(text.encode()) != digest(text + "x")
    large = torch.arange(1 << 20).reshape(1024, 1024)
    assert digest(large.t()) == digest(large.t().contiguous()) != digest(large)


def test_batches_come_out_step_by_step() -> None:
    batches = Batches()
    batches.begin(skip=1)
    for value in range(6):
        batches.add(value)
    one, two, rest = batches.take(1), batches.take(2), batches.take(3)
    assert one == digest(1) and len(two) == 16 and two != digest(2)
    assert rest == "", "more than were fetched"
    batches.begin(skip=0)
    assert batches.take(1) == "", "what was fetched ahead in the last epoch is forgotten"


# ---- divergence ------------------------------------------------------------------------------


def steps(first: int, last: int, life: int = 1, **changed: dict[int, Any]) -> tuple[Entry, ...]:
    def value(name: str, step: int, plain: Any) -> Any:
        return changed.get(name, {}).get(step, plain)

    return tuple(
        Entry(
            step,
            life,
            value("loss", step, 1 / step),
            value("grad_norm", step, 2 / step),
            value("batch", step, f"{step:016x}"),
            value("lr", step, 0.1),
        )
        for step in range(first, last + 1)
    )


@pytest.mark.parametrize(
    ("changed", "step", "what", "agreed", "word"),
    [
        ({"batch": {5: "x" * 16}, "loss": {5: 9.0}}, 5, "batch", 0, "order"),
        ({"loss": {5: 9.0, 6: 9.0}, "grad_norm": {5: 8.0}}, 5, "loss", 0, "weights"),
        ({"loss": {6: 9.0}}, 6, "loss", 1, "optimizer's state"),
        ({"lr": {5: 0.2}, "loss": {6: 9.0}}, 5, "lr", 0, "scheduler"),
        ({"grad_norm": {5: 9.0}}, 5, "grad_norm", 0, "backward"),
        ({"loss": {8: 9.0}}, 8, "loss", 3, "after 3 equal steps"),
        ({"loss": {5: 9.0}, "batch": {5: ""}}, 5, "loss", 0, "isn't recorded"),
        ({"loss": {6: math.nan}}, 6, "loss", 1, "optimizer's state"),
    ],
)
def test_what_differs_first_says_what_is_wrong(
    changed: dict[str, dict[int, Any]], step: int, what: str, agreed: int, word: str
) -> None:
    found = first_divergence(steps(1, 10), steps(5, 9, 2, **changed), after=4)
    assert found is not None
    assert (found.step, found.what, found.agreed) == (step, what, agreed)
    assert word in found.means
    assert str(step) in str(found)


@given(ENTRIES, st.floats(0, 0.5))
@settings(max_examples=60, deadline=None)
def test_a_recording_never_differs_from_itself_nor_from_a_part_of_it(entries: list[Entry], rtol: float) -> None:
    assert first_divergence(entries, list(reversed(entries)), rtol=rtol) is None
    assert first_divergence(entries, entries[::2]) is None
    assert first_divergence([], entries) is None


@given(st.floats(1e-30, 1e30), st.floats(1e-6, 0.5), st.sampled_from([1, -1]))
def test_the_tolerance_is_relative(value: float, rtol: float, sign: int) -> None:
    value *= sign
    assert equal(value, value * (1 + rtol / 2), rtol)
    assert not equal(value, value * (1 + 3 * rtol), rtol)
    assert not equal(value, -value, rtol)


def test_the_reference_follows_the_lives_that_went_on_and_no_branch() -> None:
    lives = (
        Life(number=1, entries=steps(1, 6), saves={"a": 2, "b": 4}),
        Life(number=2, start=4, checkpoint="b", entries=steps(5, 8, 2), saves={"c": 8}),
        Life(number=3, start=2, checkpoint="a", entries=steps(3, 5, 3, loss={3: 7.0}), saves={"d": 4}),
        Life(number=4, start=8, checkpoint="c", entries=steps(9, 9, 4)),
        Life(number=5, start=0, entries=steps(1, 9, 5)),
    )
    assert [(e.step, e.life) for e in following(lives, "b")] == [(5, 1), (6, 1), (7, 2), (8, 2), (9, 4)]
    assert [(e.step, e.life) for e in following(lives, "d")] == [(5, 3)]
    assert following(lives, "nobody") == ()
    found = {again.life: again for again in relived(lives)}
    assert sorted(found) == [2, 3], "nobody had trained step 9 before, and a fresh run repeats nothing"
    assert (found[2].compared, found[2].divergence) == (2, None)
    assert found[3].divergence is not None and (found[3].divergence.step, found[3].divergence.was) == (3, 1 / 3)


def test_the_line_of_a_step_is_short(tmp_path: Path) -> None:
    hidden(tmp_path).mkdir()
    trail.append(tmp_path, [Entry(123456, 12, 1.2345000505447388, 0.9876000285148621, "0" * 16, 1e-4)])
    (line,) = hidden(tmp_path, trail.NAME).read_text().splitlines()
    assert len(line) < 128
    assert json.loads(line)["step"] == 123456
