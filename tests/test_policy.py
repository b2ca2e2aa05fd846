"""Retention: properties over any history, and the reasons that people read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood.errors import UsageError
from lastgood.model import Manifest, Record
from lastgood.policy import Decision, Keep, decide, enough, latest
from lastgood.ranking import best, known_mode, metric_of, ranking


def record(
    seq: int,
    state: Any = "full",
    loss: float | None = None,
    current: bool = True,
    pinned: tuple[str, ...] = (),
    created: float = 0.0,
) -> Record:
    manifest = Manifest(
        format=1, id=f"{seq:016x}", run="r" * 16, step=seq * 10, seq=seq, lineage=((1, seq),), created=created,
        parts={"model": ("m",)} | ({"progress": ("r",)} if state == "full" else {}),
    )  # fmt: skip
    return Record(
        name=f"checkpoint-{seq * 10}",
        step=seq * 10,
        state=state,
        manifest=manifest,
        metrics={} if loss is None else {"eval_loss": loss},
        current=current,
        pinned=pinned,
    )


@st.composite
def histories(draw: Any) -> list[Record]:
    count = draw(st.integers(0, 12))
    metric = st.none() | st.sampled_from([math.nan, math.inf, -math.inf, 1.0, 2.0]) | st.floats(0, 10)
    records = [
        record(
            seq,
            state=draw(st.sampled_from(["full"] * 5 + ["weights", "incomplete", "stock", "foreign"])),
            loss=draw(metric),
            current=draw(st.sampled_from([True, True, True, False])),
            pinned=draw(st.sampled_from([(), (), (), ("release",)])),
            created=draw(st.floats(0, 100)),
        )
        for seq in range(1, count + 1)
    ]
    return draw(st.permutations(records))


@st.composite
def keeps(draw: Any) -> Keep:
    monitor = draw(st.sampled_from([None, "eval_loss", "loss"]))
    number = st.none() | st.integers(1, 5)
    if draw(st.booleans()):
        return Keep(total=draw(number), full=draw(number), monitor=monitor)
    return Keep(
        last=draw(number),
        best=None if monitor is None else draw(number),
        every=draw(st.none() | st.sampled_from([20, 30])),
        within=draw(st.none() | st.sampled_from([1, 10.0, 1e9])),
        full=draw(number),
        monitor=monitor,
    )


@given(histories(), keeps())
def test_I10_the_last_the_best_and_the_pinned_always_stay(records: list[Record], keep: Keep) -> None:
    actions = {decision.record.name: decision.action for decision in decide(records, keep)}
    newest = latest(records)
    if newest is not None:
        assert actions[newest.name] == "keep"
    winner = best(records, keep.monitor, keep.mode) if keep.monitor and keep.mode else None
    if winner is not None:
        assert actions[winner.name] in ("keep", "strip")
    assert all(actions[r.name] == "keep" for r in records if r.pinned)


@given(histories(), keeps())
def test_I11_only_our_own_on_the_current_branch_ever_go(records: list[Record], keep: Keep) -> None:
    for decision in decide(records, keep):
        if decision.action != "keep":
            assert decision.record.ours and decision.record.current
        assert decision.reasons and all(reason.strip() for reason in decision.reasons)


@given(histories(), keeps(), st.randoms())
def test_decisions_depend_neither_on_order_nor_on_names(records: list[Record], keep: Keep, random: Any) -> None:
    shuffled = list(records)
    random.shuffle(shuffled)
    first = {d.record.name: (d.action, d.reasons) for d in decide(records, keep)}
    assert {d.record.name: (d.action, d.reasons) for d in decide(shuffled, keep)} == first


@given(histories(), keeps())
def test_deciding_again_on_what_is_left_changes_nothing(records: list[Record], keep: Keep) -> None:
    left = []
    for decision in decide(records, keep):
        if decision.action == "keep":
            left.append(decision.record)
        elif decision.action == "strip":
            r = decision.record
            left.append(record(r.seq, "weights", r.metrics.get("eval_loss"), r.current, r.pinned))
    assert all(decision.action == "keep" for decision in decide(left, keep))


@given(histories(), keeps())
def test_I10_full_state_stays_for_as_many_as_were_asked_for(records: list[Record], keep: Keep) -> None:
    decisions = decide(records, keep)
    staying = [d for d in decisions if d.record.state == "full" and d.record.current and d.action != "delete"]
    still = sum(d.action == "keep" for d in staying)
    asked = min(len(staying), keep.full or len(staying))
    assert still >= asked
    if not any(r.pinned for r in records):
        assert still == asked, "nothing else holds any"
    stripped = [d.record for d in decisions if d.action == "strip"]
    assert all(r.state == "full" and not r.pinned for r in stripped)


@pytest.mark.parametrize("keep", [Keep(last=1, best=2, full=2, monitor="loss"), Keep(total=3, full=2, monitor="loss")])
def test_I10_a_run_getting_worse_keeps_its_second_recovery_point(keep: Keep) -> None:
    records: list[Record] = []
    for seq, loss in enumerate([3.0, 2.0, 1.0, 5.0, 6.0, 7.0], 1):
        decisions = decide([*records, record(seq, loss=loss)], keep)
        records = [
            record(d.record.seq, "weights", d.record.metrics["eval_loss"]) if d.action == "strip" else d.record
            for d in decisions
            if d.action != "delete"
        ]
        assert sum(r.state == "full" for r in records) == min(2, seq)


@given(histories(), st.integers(1, 5), st.sampled_from([None, "eval_loss"]))
def test_a_total_is_a_total(records: list[Record], total: int, monitor: str | None) -> None:
    kept = [
        d.record
        for d in decide(records, Keep(total=total, monitor=monitor))
        if d.action == "keep" and d.record.ours and d.record.current and not d.record.pinned
    ]
    # One more each for the best and for the newest full one, where they aren't among the `total` already.
    assert len(kept) <= total + 2
    full = all(r.state == "full" for r in records) and all(r.current and not r.pinned for r in records)
    if full and records:
        always = {r.name for r in [latest(records), *_best(records, monitor)] if r is not None}
        assert len(kept) == min(len(records), max(total, len(always)))


def _best(records: list[Record], monitor: str | None) -> list[Record]:
    winner = None if monitor is None else best(records, monitor, "min")
    return [] if winner is None else [winner]


@given(histories(), keeps(), st.integers(1, 12))
def test_I10_what_is_in_use_stays_as_it_is(records: list[Record], keep: Keep, seq: int) -> None:
    held = {f"{seq:016x}": "resumed from here"}
    for decision in decide(records, keep, protect=held):
        if decision.record.id in held:
            assert decision.action == "keep"
            if decision.record.ours and decision.record.current:
                assert "resumed from here" in decision.reasons


def gain(decision: Decision) -> int:
    """Bytes that a decision frees: state is the larger part, and some checkpoints are larger than others."""
    record = decision.record
    whole = 30 + record.seq % 3 if record.state == "full" else 10
    return {"keep": 0, "strip": whole - 10, "delete": whole}[decision.action]


@given(histories(), keeps(), st.integers(0, 400))
def test_enough_spares_what_is_held_and_frees_no_more_than_is_needed(
    records: list[Record], keep: Keep, wanted: int
) -> None:
    planned = {d.record.name: d.action for d in decide(records, keep)}
    chosen = enough(decide(records, keep), wanted, gain)
    actions = {d.record.name: d.action for d in chosen}
    assert [d.record for d in chosen] == records
    newest = latest(records)
    winner = best(records, keep.monitor, keep.mode) if keep.monitor and keep.mode else None
    for r in records:
        if r.pinned or not r.ours or not r.current or r is newest:
            assert actions[r.name] == "keep"
        assert actions[r.name] != "delete" or planned[r.name] == "delete", "nothing is deleted that the policy wants"
    if winner is not None:
        assert actions[winner.name] != "delete"
    done = [d for d in chosen if d.action != "keep"]
    freed = sum(map(gain, done))
    may_go = sum(
        gain(Decision(r, "delete" if planned[r.name] == "delete" else "strip", ("",)))
        for r in records
        if r.ours
        and r.current
        and not r.pinned
        and r is not newest
        and (planned[r.name] == "delete" or r.state == "full")
    )
    assert freed >= min(wanted, may_go)
    assert not done or freed - max(map(gain, done)) < wanted, "the last one was still needed"
    if any(d.action == "strip" for d in done):
        assert all(actions[name] == "delete" for name, action in planned.items() if action == "delete"), (
            "deletions first"
        )
    assert all(d.reasons and all(reason.strip() for reason in d.reasons) for d in chosen)


@given(histories(), keeps(), st.integers(0, 400), st.integers(0, 100))
def test_enough_takes_the_same_and_more_if_more_is_wanted(
    records: list[Record], keep: Keep, wanted: int, more: int
) -> None:
    decisions = decide(records, keep)
    less = {(d.record.name, d.action) for d in enough(decisions, wanted, gain) if d.action != "keep"}
    assert less <= {(d.record.name, d.action) for d in enough(decisions, wanted + more, gain) if d.action != "keep"}
    assert wanted or not less


def test_enough_takes_the_oldest_and_says_why() -> None:
    records = [record(seq) for seq in (3, 1, 4, 2)]
    found = {d.record.seq: (d.action, d.reasons[-1]) for d in enough(decide(records, Keep(last=2)), 31, gain)}
    spared = "not needed: enough is freed without it"
    assert found == {
        1: ("delete", "no rule keeps it: 4th newest of 4"), 2: ("keep", spared),
        3: ("keep", "last 2/2"), 4: ("keep", "last 1/2"),
    }  # fmt: skip
    found = {d.record.seq: (d.action, d.reasons[-1]) for d in enough(decide(records, Keep(last=2)), 80, gain)}
    assert found[3] == ("strip", "weights only: the space is needed")
    assert found[4] == ("keep", "last 1/2")


@given(histories(), st.floats(0.5, 120))
def test_what_was_saved_shortly_before_the_newest_stays(records: list[Record], within: float) -> None:
    mine = [r for r in records if r.ours and r.current and r.manifest is not None]
    newest = max((r.manifest.created for r in mine if r.manifest is not None), default=0.0)
    for decision in decide(records, Keep(within=within)):
        r = decision.record
        if r in mine and r.manifest is not None:
            recent = newest - r.manifest.created <= within
            assert (decision.action == "keep") == (recent or bool(r.pinned) or r is latest(records))
            assert (f"saved within {within:g} s of the newest" in decision.reasons) == recent


@given(keeps())
def test_a_policy_is_its_options(keep: Keep) -> None:
    assert Keep(**keep.options()) == keep
    assert None not in keep.options().values()
    assert Keep(**json.loads(json.dumps(keep.options()))) == keep


def test_the_reasons_of_a_plain_case() -> None:
    losses = {1: 1.7, 2: 1.5, 3: 1.6, 4: 1.9, 5: 2.2, 6: 2.5}
    found = {
        d.record.step: (d.action, d.reasons)
        for d in decide(
            [record(n, loss=v) for n, v in losses.items()], Keep(last=2, best=2, full=1, monitor="eval_loss")
        )
    }
    assert found == {
        10: ("delete", ("no rule keeps it: 6th newest of 6, eval_loss 1.7 is 3rd of 6",)),
        20: (
            "strip",
            ("best: eval_loss = 1.5", "best 1/2 by eval_loss", "weights only: full state is kept for the newest 1"),
        ),
        30: ("strip", ("best 2/2 by eval_loss", "weights only: full state is kept for the newest 1")),
        40: ("delete", ("no rule keeps it: 3rd newest of 6, eval_loss 1.9 is 4th of 6",)),
        50: ("strip", ("last 2/2", "weights only: full state is kept for the newest 1")),
        60: ("keep", ("latest: what a recovery resumes from", "last 1/2")),
    }


def test_equal_metrics_prefer_the_newer_and_nan_ranks_nowhere() -> None:
    records = [record(1, loss=1.0), record(2, loss=1.0), record(3, loss=math.nan), record(4)]
    assert [r.seq for r in ranking(records, "loss", "min")] == [2, 1]
    assert metric_of(records[2], "eval_loss") is None


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("loss", "min"), ("eval_loss", "min"), ("eval_de_loss", "min"), ("eval_loss_de", "min"), ("perplexity", "min"),
        ("wer", "min"), ("eval_rmse", "min"), ("accuracy", "max"), ("eval_f1", "max"), ("rewards/mean_reward", "max"),
        ("eval_bits_per_byte", "min"), ("exact_match", "max"), ("pass@1", "max"), ("mystery", None),
        ("loss_accuracy", None), ("lossless", None), ("", None), ("eval_word_error_rate", "min"), ("rouge_1", "max"),
        ("neg_log_loss", None), ("eval_neg_mean_squared_error", None), ("1-wer", None), ("accuracy_drop", None),
        ("eval_rewards/std", None), ("de_accuracy_val_loss", None),
    ],
)  # fmt: skip
def test_the_mode_of_a_metric_is_known_or_asked_for(name: str, mode: str | None) -> None:
    assert known_mode(name) == mode


@pytest.mark.parametrize(
    "options",
    [
        {"last": 0}, {"last": True}, {"last": "2"}, {"best": 2}, {"every": -1}, {"full": 0.5}, {"total": 2, "last": 1},
        {"monitor": "mystery"}, {"monitor": ""}, {"monitor": "loss", "mode": "down"}, {"total": 3, "best": 1, "monitor": "loss"},
        {"within": 0}, {"within": -1.0}, {"within": math.inf}, {"within": math.nan}, {"within": True}, {"within": "2d"},
    ],
)  # fmt: skip
def test_a_wrong_policy_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Keep(**options)


def test_policies_read_as_english() -> None:
    assert Keep().describe() == "keep everything"
    assert Keep(last=2, best=3, monitor="loss", full=1).describe() == (
        "keep the last 2, the best 3 by loss, full state for the newest 1"
    )
    assert Keep(within=5400, every=100).describe() == "keep every 100 steps, all within 5400 s of the newest"
    assert Keep.from_limit(0, None, None).unlimited and Keep.from_limit(None, None, None).unlimited
