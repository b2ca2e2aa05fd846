"""The guard's verdicts: no false alarm on what real training looks like, and every injected poison is found."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lastgood
from lastgood import checkup
from lastgood.health import PERSISTS, STRANGE, Sample, Sick, Watch, periods
from lastgood.repo import trail

import forked
from training import Case

NAN, INF = math.nan, math.inf


def curve(kind: str, count: int, seed: int, scale: float = 1.0) -> list[float]:
    """Losses as trainings have them."""
    rng = random.Random(seed)
    if kind == "fine-tune":  # steep, then flat and noisy
        return [scale * (1.1 + 1.4 * math.exp(-n / 60) + rng.gauss(0, 0.15)) for n in range(count)]
    if kind == "batch of one":  # heavy tails
        return [scale * (0.6 + math.exp(-n / 100)) * rng.lognormvariate(0, 0.6) for n in range(count)]
    if kind == "from scratch":
        return [scale * (3 + 8 * (n + 1) ** -0.3 + rng.gauss(0, 0.05)) for n in range(count)]
    if kind == "curriculum":  # another kind of text every hundred steps, harder or easier
        levels = [rng.uniform(0.8, 2.2) for _ in range(count // 100 + 1)]
        return [scale * (levels[n // 100] + rng.gauss(0, 0.03)) if n >= 20 else scale * 2.5 for n in range(count)]
    if kind == "learnt by heart":  # 1e-5 with bursts
        return [2 * 0.93**n + 1e-5 * rng.lognormvariate(0, 2) for n in range(count)]
    if kind == "policy gradient":  # around zero, growing, exactly zero at first
        return [0.0 if n < 40 else rng.gauss(0.001 * n / 40, 0.004) for n in range(count)]
    if kind == "warm-up":  # up before it goes down
        return [
            scale * (2 + 0.5 * math.exp(-(((n - 50) / 15) ** 2)) - 0.002 * n + rng.gauss(0, 0.05)) for n in range(count)
        ]
    assert kind == "spikes that pass"
    return [1.2 + rng.gauss(0, 0.05) + (6.0 if n % 97 < PERSISTS - 1 and n > 90 else 0.0) for n in range(count)]


KINDS = (
    "fine-tune", "batch of one", "from scratch", "curriculum", "learnt by heart", "policy gradient", "warm-up",
    "spikes that pass",
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10_000), st.sampled_from([0.05, 1.0, 4.0]))
def test_no_false_alarm(kind: str, seed: int, scale: float) -> None:
    losses = curve(kind, 700, seed, scale)
    assert periods(Sample(n + 1, loss, 1.0) for n, loss in enumerate(losses)) == []


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(0, 300), st.sampled_from([NAN, INF]), st.booleans())
def test_every_number_that_is_none_is_found_at_its_step(
    kind: str, seed: int, at: int, what: float, in_the_loss: bool
) -> None:
    losses = curve(kind, 310, seed)
    watch = Watch()
    for n, loss in enumerate(losses[: at + 1]):
        last = n == at
        sick = watch.add([Sample(n + 1, what if last and in_the_loss else loss, what if last else 1.0)])
        assert (sick is not None) == last
    assert watch.sick is not None and watch.sick.first == at + 1 and f"since step {at + 1}" in watch.sick.reason
    for n in range(at + 2, at + 40):  # and it stays: nothing of it is a number any more
        assert watch.add([Sample(n, NAN, NAN)]) is not None
    assert watch.sick.first == at + 1


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["fine-tune", "from scratch", "warm-up"]), st.integers(0, 10_000), st.integers(300, 500))
def test_a_loss_that_blows_up_and_stays_there_is_found(kind: str, seed: int, at: int) -> None:
    losses = curve(kind, 700, seed)
    rng = random.Random(seed)
    broken = [*losses[:at], *(12 + rng.gauss(0, 0.3) for _ in range(600))]
    (found,) = periods(Sample(n + 1, loss, 1.0) for n, loss in enumerate(broken))
    assert found[0] == at, "the loss of a step is that of the weights before it"
    assert found[1] > 10**9, "it doesn't become the new normal"
    assert "at the beginning" in found[2]


def test_what_comes_back_down_is_healthy_again() -> None:
    losses = [1.5] * 20 + [1.0] * 80 + [9.0] * 20 + [1.1] * 50
    (found,) = periods(Sample(n + 1, loss) for n, loss in enumerate(losses))
    assert found[:2] == (100, 120)


def test_a_loss_scaler_that_skips_is_no_poison() -> None:
    """fp16: gradients overflow while the scale is being found, and now and then later; those steps change nothing."""
    watch = Watch()
    for step in range(1, 200):
        skipped = step < 15 or step % 50 == 0
        assert watch.add([Sample(step, 2.0, INF if skipped else 1.0, skipped)]) is None
    assert watch.add([Sample(200, NAN, NAN, True)]) is None
    assert watch.add([Sample(n, NAN, NAN, True) for n in range(201, 200 + STRANGE)]) is not None, "it never comes back"


def test_batches_without_a_label_are_no_poison() -> None:
    """Their loss is nan, their gradients are zero."""
    watch = Watch()
    for step in range(1, 300):
        assert watch.add([Sample(step, NAN if step % 3 else 1.0, 0.0)]) is None
    sick = watch.add([Sample(n, NAN, 0.0) for n in range(300, 300 + STRANGE)])
    assert sick is not None and not sick.spoiled


def test_nothing_known_is_nothing_wrong() -> None:
    assert Watch().add([Sample(n) for n in range(1000)]) is None
    assert Watch().add([]) is None


@pytest.mark.parametrize("gradient", [None, NAN])
def test_a_nan_without_a_gradient_norm_counts(gradient: float | None) -> None:
    assert Watch().add([Sample(1, 1.0), Sample(2, NAN, gradient)]) == Sick(2, "loss is nan since step 2", True)


REAL = (
    Case("lora", lora=True, args={"max_steps": 60, "save_steps": 60, "gradient_accumulation_steps": 2}),
    Case("hot", args={"max_steps": 150, "save_steps": 150, "learning_rate": 5e-2, "lr_scheduler_type": "constant"}),
)


def real(case: Case, out: Path) -> None:
    lastgood.manage(case.trainer(out)).train(resume_from_checkpoint="auto")


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_real_trainings_give_no_alarm(case: Case, tmp_path: Path) -> None:
    assert forked.run(real, case, tmp_path / "run", log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    lives = trail.read(tmp_path / "run")
    assert len(lives[0].entries) == case.args["max_steps"] and all(e.loss is not None for e in lives[0].entries)
    assert checkup.by_trail(tmp_path / "run") == {}
    assert not any(r.poisoned for r in lastgood.open(tmp_path / "run").checkpoints)
