"""`lastgood.open`: a run and its checkpoints for any program, without torch until tensors are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lastgood
from lastgood.errors import Conflict, CorruptCheckpoint, NoCheckpoint, NotSupported, UsageError
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Keep
from lastgood.repo import metrics
from lastgood.repo.read import records
from lastgood.repo.staging import Staging
from lastgood.state.tensors import named
from test_leases import saved

import forked

TENSORS = {"wte.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7), "half": torch.ones(2).bfloat16()}


def parts(**files: dict[str, torch.Tensor]) -> Callable[[Staging], None]:
    """A writer of these models, one file each, with a tied name and an optimizer."""

    def write(staging: Staging) -> None:
        for name, tensors in files.items():
            staging.tensors(f"{name}.safetensors", "model", named(tensors))
        told = {"format": 1, "tensors": {}, "aliases": {"lm_head.weight": "wte.weight"}}
        told["modules"] = {"gan": {"tensors": {}, "aliases": {"head": "wte.weight"}}}
        staging.data("tensors.json", "model", json.dumps(told).encode())
        staging.tensors("optimizer.safetensors", "optimizer", named({"state.wte.weight.exp_avg": torch.ones(2, 3)}))
        staging.data("resume.json", "progress", b"{}")

    return write


def commit(root: Path, write: Callable[[Staging], None], step: int = 1) -> lastgood.Checkpoint:
    made = Manager(root=root, on_error="raise")
    made.open()
    made.begin_fresh()
    made.save(step, write, estimate=1, environment={"torch": "2"}, arguments={"lr": 1.0}, facts={"loss": 0.5})
    made.close()
    return lastgood.open(root).at(step)


def test_a_checkpoint_says_everything_that_its_record_says(tmp_path: Path) -> None:
    checkpoint = commit(tmp_path, parts(model=TENSORS))
    (record,) = records(tmp_path)
    names = [*Record.__struct_fields__, "ours", "seq", "id", "size"]
    assert {name: getattr(checkpoint, name) for name in names} == {name: getattr(record, name) for name in names}
    assert record.manifest is not None
    for name in ("files", "parts", "arguments", "environment", "facts", "lineage", "parent", "created"):
        assert getattr(checkpoint, name) == getattr(record.manifest, name)
    assert checkpoint.path == tmp_path / "checkpoint-1" and checkpoint.problems() == ()
    assert str(checkpoint.path) in repr(checkpoint)
    assert {checkpoint, lastgood.open(tmp_path).latest()} == {checkpoint} and checkpoint != record


def test_a_part_comes_back_bit_for_bit_under_every_name(tmp_path: Path) -> None:
    found = commit(tmp_path, parts(model=TENSORS)).load("model")
    assert list(found) == [*sorted(TENSORS, key=list(found).index), "lm_head.weight"]
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert found["lm_head.weight"] is found["wte.weight"]
    found["wte.weight"].add_(1)  # it is the caller's


def test_a_part_in_another_dtype_and_on_another_device(tmp_path: Path) -> None:
    checkpoint = commit(tmp_path, parts(model=TENSORS))
    found = checkpoint.load(dtype="float64", device="meta")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "wte.weight": torch.float64, "half": torch.float64, "steps": torch.int64, "lm_head.weight": torch.float64,
    }  # fmt: skip
    assert found["half"].is_meta
    assert checkpoint.load(dtype=torch.float16)["wte.weight"].dtype == torch.float16
    for wrong in ("int64", "nonsense", 16):
        with pytest.raises(UsageError, match="floating type"):
            checkpoint.load(dtype=wrong)


def test_several_models_are_parts_by_their_names(tmp_path: Path) -> None:
    checkpoint = commit(tmp_path, parts(gan=TENSORS, critic={"w": torch.zeros(2)}))
    assert set(checkpoint.load("gan")) == {*TENSORS, "head"}
    assert set(checkpoint.load("critic")) == {"w"}
    with pytest.raises(UsageError, match=r"(?s)no part 'model'.*critic, gan"):
        checkpoint.load()


def test_an_optimizer_is_no_state_dict_but_its_tensors_can_be_had(tmp_path: Path) -> None:
    checkpoint = commit(tmp_path, parts(model=TENSORS))
    with pytest.raises(NotSupported, match="a live run restores the optimizer"):
        checkpoint.load("optimizer")
    assert torch.equal(checkpoint.tensor("state.wte.weight.exp_avg"), torch.ones(2, 3))
    assert torch.equal(checkpoint.tensor("lm_head.weight"), TENSORS["wte.weight"])
    with pytest.raises(UsageError, match="no tensor 'nothing'"):
        checkpoint.tensor("nothing")


def test_some_tensors_by_a_pattern(tmp_path: Path) -> None:
    checkpoint = commit(tmp_path, parts(model=TENSORS))
    both = checkpoint.tensors("*.weight")
    assert set(both) == {"wte.weight", "lm_head.weight"}, "a tied one under each of its names"
    assert both["wte.weight"] is both["lm_head.weight"]
    assert all(torch.equal(tensor, TENSORS["wte.weight"]) for tensor in both.values())
    moments = checkpoint.tensors("state.wte.weight.*", verify=False)
    assert all(torch.equal(tensor, checkpoint.tensor(name)) for name, tensor in moments.items()) and moments
    with pytest.raises(UsageError, match=r"no tensor that matches 'h\.3\.\*'"):
        checkpoint.tensors("h.3.*")


def test_I5_not_one_tensor_of_a_damaged_file_is_handed_out(tmp_path: Path) -> None:
    checkpoint = commit(tmp_path, parts(model=TENSORS))
    for name in ("model.safetensors", "tensors.json"):
        file = checkpoint.path / name
        data = file.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 40)):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(CorruptCheckpoint):
                checkpoint.load()
        file.write_bytes(data)
    checkpoint.load()
    (checkpoint.path / "model.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match="can't be read"):
        checkpoint.load()
    with pytest.raises(CorruptCheckpoint, match="incomplete"):
        lastgood.open(tmp_path).checkpoints[0].load()


def test_what_has_no_manifest_is_shown_and_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (stock,) = lastgood.open(tmp_path).checkpoints
    assert (stock.state, stock.id, stock.size, stock.files, stock.metrics) == ("stock", "", 0, {}, {})
    with pytest.raises(NotSupported, match="no manifest"):
        stock.load()
    for change in (lambda: stock.record(a=1.0), stock.pin, lambda: stock.tag("x"), lambda: stock.note("x")):
        with pytest.raises(UsageError, match="no manifest of this run"):
            change()


WITHOUT_TORCH = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "transformers", "safetensors", "pydantic"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import lastgood

run = lastgood.open(sys.argv[1])
best = run.best("eval_loss")
best.record(mmlu=0.5)
best.tag("release")
assert run["release"].step == run["best:mmlu:max"].step == best.step == run.at(best.step).step
assert run.best("mmlu - eval_loss", "max").metrics["mmlu"] == 0.5
assert [c.step for c in run.pareto({"eval_loss": "min", "mmlu": "max"})] == [best.step]
assert best.problems() == () and best.manifest.files and run.history and run.lineage and run.branches
for checkpoint in lastgood.watch(sys.argv[1], poll=0, missing="seen"):
    checkpoint.record(seen=1.0)
assert all(c.metrics["seen"] for c in run.checkpoints)
try:
    best.load()
except lastgood.NotSupported as error:
    print(error.message)
"""


def test_no_torch_is_needed_until_tensors_are(tmp_path: Path) -> None:
    saved(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0})
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, tmp_path], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "tensors need torch, which isn't installed\n"), done.stderr


# ---- the run ---------------------------------------------------------------------------------


def test_best_goes_by_the_metric_that_is_asked_for_or_by_the_runs_own(tmp_path: Path) -> None:
    saved(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0}, Keep(monitor=("loss", "speed"), mode=("min", "max")))
    run = lastgood.open(tmp_path)
    run.at(3).record(speed=9, other=1)
    assert run.policy is not None and run.policy.primary == ("loss", "min")
    assert (run.best().step, run.best("speed").step, run.best("loss", "max").step) == (2, 3, 1)
    assert (run["best"].step, run["best:speed"].step, run["latest~1"].step, run[1].step) == (2, 3, 2, 1)
    with pytest.raises(UsageError, match="lower or a higher other"):
        run.best("other")
    with pytest.raises(UsageError, match="neither"):
        run.best("other", "up")  # type: ignore[arg-type]
    with pytest.raises(NoCheckpoint, match=r"(?s)no checkpoint with a bleu.*recorded metrics: eval_loss, other, speed"):
        run.best("bleu")
    with pytest.raises(NoCheckpoint, match="no checkpoint of step 4"):
        run.at(4)


def test_I15_what_a_branch_left_behind_is_shown_as_such_and_mixed_into_nothing(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: 3.0, 2: 0.1, 3: 0.2})
    run = lastgood.open(tmp_path)
    assert [[c.step for c in branch] for branch in run.branches] == [[1, 2, 3]]
    made.open()
    made.begin_from(run.at(1).found)
    assert [[c.step for c in branch] for branch in run.branches] == [[1], [2, 3]]
    assert (run.latest().step, run.best("eval_loss").step) == (1, 1)
    made.close()
    saved(tmp_path, {2: 2.0, 4: 2.5}, go_on=True)
    assert [[(c.step, c.current) for c in branch] for branch in run.branches] == [
        [(1, True), (2, True), (4, True)],
        [(2, False), (3, False)],
    ]
    assert run.best("eval_loss").step == 2 and run.best("eval_loss").current
    assert run.lineage == ((1, 1), (4, 5)) == run.latest().lineage
    assert run.latest().parent == run.at(2).id
    assert [c.step for c in run.pareto({"eval_loss": "min"})] == [2]


# ---- metrics that arrive late ----------------------------------------------------------------


def recorder(root: Path, number: int, count: int) -> None:
    checkpoint = lastgood.open(root).at(1)
    for turn in range(count):
        checkpoint.record({f"m{number}_{turn}": turn, "last": number})


def test_many_processes_record_at_once_and_no_value_is_lost(tmp_path: Path) -> None:
    saved(tmp_path, {1: 3.0})
    children = [forked.start(recorder, tmp_path, number, 25, log=tmp_path / "log") for number in range(6)]
    assert [forked.wait(child) for child in children] == [0] * 6, (tmp_path / "log").read_text()
    found = lastgood.open(tmp_path).at(1).metrics
    assert {name: value for name, value in found.items() if name[0] == "m"} == {
        f"m{number}_{turn}": turn for number in range(6) for turn in range(25)
    }
    assert found["last"] in range(6)


def test_a_line_that_a_killed_writer_tore_does_not_eat_the_next_ones(tmp_path: Path) -> None:
    saved(tmp_path, {1: 3.0})
    checkpoint = lastgood.open(tmp_path).at(1)
    file = tmp_path / ".lastgood" / "metrics" / f"{checkpoint.id}.jsonl"
    for cut in (1, 5, 20):
        with file.open("ab") as torn:
            torn.write(b'{"step": 1, "metrics": {"lost": 1.0}}\n'[:cut])
        checkpoint.record({f"after{cut}": cut})
    assert {name: value for name, value in checkpoint.metrics.items() if name != "eval_loss"} == {
        "after1": 1.0, "after5": 5.0, "after20": 20.0,
    }  # fmt: skip


def late(root: Path) -> None:
    lastgood.open(root).at(1).record(mmlu=0.9)


def test_the_live_run_goes_by_what_another_process_recorded(tmp_path: Path) -> None:
    keep = Keep(last=1, best=1, monitor=("loss", "mmlu"), mode=("min", "max"))
    made = saved(tmp_path, {1: 3.0}, keep, close=False)
    made.save(2, parts(model=TENSORS), estimate=1, environment={}, arguments={}, facts={})
    assert forked.run(late, tmp_path, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    made.record(2, {"eval_loss": 1.0})
    made.save(3, parts(model=TENSORS), estimate=1, environment={}, arguments={}, facts={})
    decisions = {d.record.step: (d.action, d.reasons) for d in made.retain()}
    assert decisions[1] == ("keep", ("best: mmlu = 0.9", "best 1/1 by mmlu"))
    assert decisions[2] == ("keep", ("best: loss = 1", "best 1/1 by loss"))
    assert made._lock is not None and made._lock.still_held()
    made.close()


def test_what_was_measured_of_a_deleted_checkpoint_stays_in_the_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = saved(tmp_path, {1: 3.0, 2: 2.0}, Keep(last=1), close=False)
    gone = lastgood.open(tmp_path).at(1)
    made.retain()
    made.close()
    gone.record(mmlu=0.5)
    assert metrics.read(tmp_path, gone.id)["mmlu"] == 0.5
    assert lastgood.open(tmp_path).history[-1]["event"] == "recorded"
    assert [c.step for c in lastgood.open(tmp_path).checkpoints] == [2]


def test_a_value_is_not_recorded_for_another_checkpoint_at_the_same_place(tmp_path: Path) -> None:
    made = saved(tmp_path, {1: 3.0, 2: 2.0})
    before = lastgood.open(tmp_path).at(2)
    made.open()
    made.begin_from(lastgood.open(tmp_path).at(1).found)
    made.close()
    saved(tmp_path, {2: 2.5}, go_on=True)
    with pytest.raises(Conflict, match="saved step 2 again"):
        before.record(mmlu=0.5)
    assert not any("mmlu" in c.metrics for c in lastgood.open(tmp_path).checkpoints)


@pytest.mark.parametrize(
    "values", [{}, {"a": "0.5"}, {"a": True}, {"a b": 1.0}, {"": 1.0}, {"a": None}, {"a": 10**400}, {"x" * 201: 1.0}]
)  # fmt: skip
def test_what_is_no_metric_is_not_recorded(tmp_path: Path, values: dict[str, Any]) -> None:
    saved(tmp_path, {1: 3.0})
    checkpoint = lastgood.open(tmp_path).at(1)
    with pytest.raises(UsageError):
        checkpoint.record(values)
    assert checkpoint.metrics == {"eval_loss": 3.0}
    checkpoint.record(tensor=torch.tensor(0.5), nan=float("nan"))
    assert checkpoint.metrics["tensor"] == 0.5 and checkpoint.metrics["nan"] != checkpoint.metrics["nan"]


def test_names_and_notes(tmp_path: Path) -> None:
    saved(tmp_path, {1: 3.0, 2: 2.0})
    run = lastgood.open(tmp_path)
    one, two = run.at(1), run.at(2)
    one.pin()
    one.tag("release")
    assert one.pinned == ("pinned", "release") == run["release"].pinned
    two.tag("release")
    one.unpin()
    assert (one.pinned, two.pinned) == ((), ("release",))
    two.untag("release")
    assert two.pinned == () and two.note() == "" and two.note("went to the customer") == "went to the customer"
    assert two.note("") == ""
    for bad in ("latest", "a b", ""):
        with pytest.raises(UsageError):
            two.tag(bad)
    with pytest.raises(UsageError, match="one line"):
        two.note("a\nb")


def test_I6_looking_at_checkpoints_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path, {1: 3.0, 2: 2.0})

    def seen() -> dict[str, tuple[int, bytes]]:
        return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in tmp_path.rglob("*") if f.is_file()}

    before = seen()
    run = lastgood.open(tmp_path)
    for checkpoint in (*run.checkpoints, run.latest(), run.best("eval_loss"), *run.pareto({"eval_loss": "min"})):
        checkpoint.load()
        checkpoint.problems()
        assert (checkpoint.metrics, checkpoint.pinned, checkpoint.note()) is not None
    assert (run.history, run.branches, run.lineage, run.trail, run.policy) is not None
    assert seen() == before
