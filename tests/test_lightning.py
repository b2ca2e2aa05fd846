"""Lightning under lastgood: interrupted runs end bit for bit like uninterrupted ones; ModelCheckpoint's words hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lightnings
from lightnings import Case, Model, Stop, StopAt, Two, outcome

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*swapping scheduler.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
]


def with_scheduler(kind: str) -> Any:
    return lambda: Model(scheduler=kind)


CASES = [
    Case("plain"),
    Case("draws", model=lambda: Model(draws=True), stops=(6, 7)),
    Case("noise", data="noise"),
    Case("own generator", loader={"own": True}),
    Case("no validation", validate=False, options={"monitor": "train_loss"}),
    Case("two optimizers", model=Two, every=4, stops=(6, 12, 20)),
    Case("accumulation", trainer={"accumulate_grad_batches": 2}, every=1, stops=(2, 3, 5)),
    Case("validation inside", trainer={"val_check_interval": 3}, every=1, stops=(3, 4, 9)),
    Case("validation by default", options={"every_n_train_steps": None}, trainer={"val_check_interval": 0.5}),
    Case("every epoch", options={"every_n_train_steps": None}, stops=(7, 12, 13)),
    Case("limited", trainer={"limit_train_batches": 4, "limit_val_batches": 1}, stops=(3, 4, 5)),
    Case("max steps", trainer={"max_epochs": -1, "max_steps": 14}),
    Case("ema", callbacks=lightnings.ema),
    Case("swa", callbacks=lightnings.swa, trainer={"max_epochs": 4}, stops=(6, 9, 13, 15)),
    Case("bf16", trainer={"precision": "bf16-mixed"}),
    Case("bf16-true", trainer={"precision": "bf16-true"}),
    Case("plateau", model=with_scheduler("plateau"), stops=(6, 9, 12)),
    Case("plateau by training loss", model=with_scheduler("train-plateau"), stops=(8, 9, 12)),
    Case("several schedulers", model=with_scheduler("several")),
    Case("workers", loader={"num_workers": 2}, stops=(9,)),
    Case("noisy workers", loader={"num_workers": 2}, data="noise", stops=(9,)),
    Case("stream", data="flow"),
    Case("keeps state", data="keeper"),
    Case("two loaders", data="two", model=lightnings.Pair),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_resumed_run_is_the_same(case: Case, tmp_path: Path) -> None:
    trainer, logger, _ = case.fit(tmp_path / "whole")
    whole = outcome(trainer)
    for stop in case.stops:
        root = tmp_path / f"stop{stop}"
        with pytest.raises(Stop):
            case.fit(root, StopAt(stop))
        trainer, rows, callback = case.fit(root)
        assert callback.report is not None, stop
        assert outcome(trainer) == whole, stop
        assert rows.rows == logger.rows[-len(rows.rows) :], stop
