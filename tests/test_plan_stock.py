"""The model of the stock Trainer against the real one: what is on disk after every save, and what a resume takes."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, trainer, trainer_utils

from lastgood.errors import UsageError
from lastgood.planner.stock import Stock, stock_history, stock_resumes_from

ROWS = 8  # one row a step: the steps of an epoch
SCORES = (-0.5, 0.25, 0.5, 0.5, 0.75, 1.5, 2.0, float("nan"), float("inf"))  # exact in float32, with equals


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Every Trainer collects garbage first: among all that the imports made, that takes ten times as long as a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


class Point(torch.nn.Module):
    """Two numbers that learn; when evaluated its loss is whatever the test prescribes for the step."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
        self.prescribed = 0.0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.line(x)
        loss = ((y - labels) ** 2).mean() if self.training else torch.tensor(float(self.prescribed))
        return {"loss": loss, "logits": y}


class Watched(Trainer):
    """Writes down what is on disk; the directories' times are `pause` seconds apart, whatever the machine's speed."""

    def __init__(self, out: Path, values: dict[int, float], pause: float = 0.0, **args: Any) -> None:
        self.values, self.pause = values, pause
        self.seen: list[tuple[Any, ...]] = []
        settings = {"per_device_train_batch_size": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        super().__init__(
            model=Point(),
            args=TrainingArguments(output_dir=str(out), logging_strategy="no", **settings, **args),
            train_dataset=[{"x": [float(i)], "labels": [1.0]} for i in range(ROWS)],
            eval_dataset=[{"x": [1.0], "labels": [1.0]}],
            compute_metrics=lambda _: dict.fromkeys(("score", "val_loss"), self.now()),
        )

    def now(self) -> float:
        return self.values[self.state.global_step]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.model.prescribed = self.now()
        return super().evaluate(*args, **kwargs)

    def disk(self) -> tuple[int, ...]:
        out = Path(self.args.output_dir)
        return tuple(sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")))

    def best(self) -> int | None:
        path = self.state.best_model_checkpoint
        return None if path is None else int(path.rpartition("-")[2])

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.seen.append((self.state.global_step, self.peak, self.disk(), self.best()))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        rotate = trainer.rotate_checkpoints

        def look(*args: Any, **kwargs: Any) -> None:
            self.peak = self.disk()
            for step in self.peak:
                os.utime(Path(self.args.output_dir, f"checkpoint-{step}"), (1e9 + self.pause * step,) * 2)
            rotate(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "rotate_checkpoints", look)
            return super().train(*args, **kwargs)


def draw(seed: int) -> tuple[dict[str, Any], dict[int, float]]:
    """A set of arguments, most of them of the kind that people use."""
    choose = random.Random(seed)
    values = {step: choose.choice(SCORES) for step in range(1, 40)}
    load = choose.random() < 0.4
    evaluation = choose.choice(["steps", "steps", "steps", "epoch", "epoch", "no"])
    save = evaluation if load and choose.random() < 0.8 else choose.choice(["steps", "steps", "epoch", "best", "no"])
    metric = choose.choice([None, "loss", "eval_loss", "score", "val_loss"])
    if save == "best" and choose.random() < 0.8:
        metric = metric or "score"
    eval_steps = choose.choice([1, 2, 2, 3, 0.1, 0.3])
    save_steps = choose.choice([1, 2, 3, 4, 0.1, 0.3, 50])
    if load and choose.random() < 0.7:
        save_steps = eval_steps * choose.choice([1, 2, 3])
    args = {
        "max_steps": choose.choice([7, 10, 16]),
        "save_strategy": save,
        "save_steps": save_steps,
        "eval_strategy": evaluation,
        "eval_steps": eval_steps,
        "eval_delay": choose.choice([0, 0, 0, 1, 4]),
        "save_total_limit": choose.choice([None, 0, -1, 1, 1, 1, 2, 2, 3, 4]),
        "load_best_model_at_end": load,
        "metric_for_best_model": metric,
        "greater_is_better": choose.choice([None, None, True, False]),
        "save_only_model": choose.random() < 0.8,  # no optimizer state to write: quicker
    }
    return args, values


def compare(out: Path, args: dict[str, Any], values: dict[int, float], pause: float = 0.0) -> str:
    """Run the real Trainer and the model; what became of it."""
    try:
        stock = Stock(**args, steps_per_epoch=ROWS)
    except UsageError as refused:
        with pytest.raises(ValueError, match=r"load_best_model_at_end|metric_for_best_model"):
            Watched(out, values, **args)
        return refused.code
    real = Watched(out, values, pause, **args)
    real.train()
    moments = stock_history(stock, values)
    saves = [moment for moment in moments if not moment.end]
    assert [(m.step, m.during, m.kept, m.best) for m in saves] == real.seen
    before: tuple[int, ...] = ()
    for moment in moments:
        assert moment.during == (before if moment.end else (*before, moment.step))
        assert [step for step in moment.during if step not in moment.kept] == [step for step, _ in moment.removed]
        assert tuple(moment.reasons) == moment.kept
        assert moment.best is None or moment.reasons[moment.best].endswith(moment.why_best)
        before = moment.kept
    assert real.disk() == before
    assert real.best() == (moments[-1].best if moments else None)
    return "end" if len(saves) < len(moments) else "done"


@pytest.mark.parametrize("part", range(2))
def test_the_model_is_the_real_trainer(part: int, tmp_path: Path) -> None:
    became = [
        compare(tmp_path / str(seed), *draw(seed), pause=random.Random(seed).choice([0.01, 10.0]))
        for seed in range(part, 240, 2)
    ]
    assert became.count("done") >= 60 and became.count("end") >= 5, "the sample holds too few runs"


CASES: dict[str, tuple[dict[str, Any], dict[int, float]]] = {
    "the best is spared beside the newest": ({"save_total_limit": 1}, {2: 3, 4: 1, 6: 2, 8: 4}),
    "the newest is the best": ({"save_total_limit": 1}, {2: 4, 4: 3, 6: 2, 8: 1}),
    "all equal": ({"save_total_limit": 2}, {2: 1, 4: 1, 6: 1, 8: 1}),
    "all NaN": ({"save_total_limit": 2}, dict.fromkeys((2, 4, 6, 8), float("nan"))),
    "no metric is named": ({"save_total_limit": 2, "metric_for_best_model": None}, {2: 1, 4: 2, 6: 3, 8: 4}),
    "the best wasn't saved": (
        {"save_total_limit": 1, "eval_steps": 1}, {1: 9, 2: 5, 3: 1, 4: 4, 5: 2, 6: 3, 7: 2, 8: 2}),
    "evaluated after the save": (
        {"save_total_limit": 1, "eval_strategy": "epoch", "max_steps": 16}, {8: 2, 16: 1}),
    "shares of the run whose rounding puts saves beside evaluations": (
        {"load_best_model_at_end": True, "save_total_limit": 1, "save_steps": 0.3, "eval_steps": 0.1, "max_steps": 16},
        dict(zip(range(2, 17, 2), [9, 8, 1, 7, 6, 5, 4, 2], strict=True))),
    "only the best ones are saved": (
        {"save_total_limit": 2, "save_strategy": "best"}, {2: 4, 4: 3, 6: 5, 8: 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cases_that_people_meet(name: str, tmp_path: Path) -> None:
    changes, values = CASES[name]
    common = {"max_steps": 8, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = {**common, "metric_for_best_model": "loss", **changes}
    assert compare(tmp_path, args, values) in ("done", "end")


def test_reasons_are_said_in_words() -> None:
    args = Stock(
        max_steps=5, save_steps=1, save_total_limit=3, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    first, *_, fourth, fifth = stock_history(args, {1: 2.5, 2: 1.3125, 3: 1.5, 4: 1.75, 5: None})
    assert (fourth.during, fourth.removed) == ((1, 2, 3, 4), ((1, "oldest of 4 where 3 may stay"),))
    assert fifth.removed == ((3, "oldest but for the best, of 4 where 3 may stay"),)
    assert first.reasons == {1: "newest, and best: eval_loss 2.5"}
    assert fifth.reasons == {2: "best: eval_loss 1.3125", 4: "one of the 3 newest", 5: "newest"}

    args = Stock(max_steps=3, save_steps=1, save_total_limit=1, metric_for_best_model="f1", eval_strategy="steps",
                 eval_steps=1)  # fmt: skip
    *_, last, end = stock_history(args, {1: 0.5, 2: 0.25, 3: 0.25})
    assert last.removed == ((2, "neither the newest nor the best, and 1 may stay"),)
    assert (end.removed, end.end) == (((3, "training ended: save_total_limit=1 leaves the best alone"),), True)
    assert end.reasons == {1: "best: eval_f1 0.5"}

    args = Stock(max_steps=4, save_steps=2, metric_for_best_model="loss", eval_strategy="steps", eval_steps=1)
    assert stock_history(args, {1: 3, 2: 2, 3: 1, 4: 1.5})[-1].reasons == {
        2: "named best: eval_loss 2, though step 3 had 1",
        4: "newest",
    }
    unlimited = stock_history(Stock(max_steps=2, save_steps=1, save_total_limit=0), {})
    assert unlimited[-1].reasons == {1: "no limit", 2: "newest"}


def test_what_many_believe_of_a_limit_of_three_is_not_so() -> None:
    """10,000 steps, saves and evaluations every 500, a limit of 3: what is there after step 3000?"""
    losses = dict(zip(range(500, 3001, 500), [2.0, 1.5, 1.25, 1.5, 1.75, 2.0], strict=True))
    common: dict[str, Any] = {
        "max_steps": 10_000, "save_steps": 500, "eval_strategy": "steps", "eval_steps": 500, "save_total_limit": 3,
    }  # fmt: skip

    def after(**changes: Any) -> tuple[int, ...]:
        return next(m for m in stock_history(Stock(**common, **changes), losses) if m.step == 3000).kept

    assert after() == (2000, 2500, 3000)
    assert after(load_best_model_at_end=True) == after(metric_for_best_model="loss") == (1500, 2500, 3000)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ({"load_best_model_at_end": True}, "CKB001"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "CKB001"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 300}, "CKB002"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.3}, "CKB002"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.3, "save_steps": 0.4}, "CKB002"),
        ({"save_strategy": "best", "eval_strategy": "steps"}, "CKB003"),
    ],
)
def test_what_the_real_trainer_refuses(args: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the Trainer refuses") as refused:
        Stock(max_steps=10, steps_per_epoch=ROWS, **args)
    assert refused.value.code == code
    with pytest.raises(ValueError, match=r"--load_best_model_at_end requires|metric_for_best_model.*must be provided"):
        Watched(tmp_path, {}, max_steps=10, **args)


@pytest.mark.parametrize(
    "args",
    [
        {"max_steps": 0},
        {"save_strategy": "sometimes"},
        {"eval_strategy": "best"},
        {"save_strategy": "epoch"},
        {"save_steps": 2.5},
        {"eval_strategy": "steps", "eval_steps": -1},
    ],
)
def test_what_the_model_refuses(args: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Stock(**{"max_steps": 10, **args})


class Cut(Exception):
    """The save ends here, as if the process had been killed."""


class Killed(Watched):
    """Stops in the save of step 6: at the first byte of the weights, between two files, or in the last one."""

    def __init__(self, out: Path, where: str, **args: Any) -> None:
        self.where = where
        super().__init__(out, {}, **args)

    def reach(self, where: str) -> None:
        if self.state.global_step == 6 and where == self.where:
            raise Cut

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        os.makedirs(str(output_dir), exist_ok=True)
        self.reach("weights")
        super()._save(output_dir, *args, **kwargs)
        if self.state.global_step == 6 and self.where == "half the weights":
            path = Path(str(output_dir), "model.safetensors")
            path.write_bytes(path.read_bytes()[:-3])
            raise Cut

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.reach("optimizer")
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.reach("state")
        if self.state.global_step == 6 and self.where == "half the state":
            Path(output_dir, "trainer_state.json").write_text('{\n  "best_global_step": null,\n')
            raise Cut


@pytest.mark.parametrize("where", ["weights", "half the weights", "optimizer", "state", "half the state"])
def test_a_resume_takes_the_checkpoint_that_was_cut_off_and_fails(where: str, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        Killed(tmp_path, where, max_steps=8, save_steps=2).train()
    assert trainer_utils.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")
    step, why = stock_resumes_from((2, 4), 6)
    assert stock_resumes_from((2, 4, 6), 6) == (step, why)
    assert step is None
    assert "takes checkpoint-6" in why and "checkpoint-4 is taken" in why
    failing = Watched(tmp_path, {}, max_steps=8, save_steps=2)
    with pytest.raises(Exception, match=r"trainer_state\.json|valid checkpoint|while deserializing|Expecting property"):
        failing.train(resume_from_checkpoint=True)
    assert failing.state.global_step == 0


@pytest.mark.parametrize("save_only_model", [False, True])
def test_a_resume_takes_the_highest_number(save_only_model: bool, tmp_path: Path) -> None:
    """Whatever is the best: and without its optimizer's state the run goes on all the same, silently."""
    common: dict[str, Any] = {"save_steps": 2, "save_only_model": save_only_model, "learning_rate": 0.1}
    Watched(tmp_path, {}, max_steps=6, **common).train()
    step, why = stock_resumes_from((2, 4, 6), None, save_only_model=save_only_model)
    assert (step, "start afresh" in why) == (6, save_only_model)
    assert trainer_utils.get_last_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{step}")
    real = Watched(tmp_path, {}, max_steps=7, **common)
    real.train(resume_from_checkpoint=True)
    assert real.state.global_step == 7
    updates = {int(state["step"]) for state in real.optimizer.state.values()}
    assert updates == ({1} if save_only_model else {7})


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert stock_resumes_from((), None)[0] is None
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        Watched(tmp_path, {}, max_steps=1).train(resume_from_checkpoint=True)
    assert stock_resumes_from((), 2) == (
        None,
        "takes checkpoint-2, the highest number, which the crash cut off, and fails;"
        " once that is deleted by hand, there is none to resume from",
    )


@pytest.mark.parametrize("limit", [None, 3, 500])
def test_a_thousand_saves_are_quick(limit: int | None) -> None:
    args = Stock(max_steps=10_000, save_steps=10, eval_strategy="steps", eval_steps=10, save_total_limit=limit,
                 metric_for_best_model="loss")  # fmt: skip
    metrics = {step: 1 / step for step in range(10, 10_001, 10)}
    start = time.process_time()
    moments = stock_history(args, metrics)
    assert time.process_time() - start < 5  # the square of the saves would take minutes
    assert len(moments) == 1000
    assert len(moments[-1].kept) == (limit or 1000)
