"""Which checkpoint is better: formulas against Python's arithmetic, several metrics, what no other one beats."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood.errors import UsageError
from lastgood.formula import DEEPEST, LONGEST, Formula, parse
from lastgood.model import Record
from lastgood.policy import Keep, decide
from lastgood.ranking import known_mode, metric_of, pareto, ranking
from test_policy import record

NAMES = ("mmlu", "eval_gap", "a-b", "train/x", "pass@1", "v1.2")
NUMBERS = ("0", "1", "0.5", ".25", "2.", "1e-3", "1E+2", "3.5e2")
VALUES = st.none() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0]) | st.floats(-1e3, 1e3)


def named(values: dict[str, Any], seq: int = 1) -> Record:
    known = {name: value for name, value in values.items() if value is not None}
    return msgspec.structs.replace(record(seq), metrics=known)


@st.composite
def formulas(draw: Any, depth: int = 4) -> tuple[str, str]:
    """(as lastgood has it, as Python has it): the names are looked up in `v`."""
    kind = draw(
        st.sampled_from(["name", "name", "number"] + ["sign", "two", "two", "two", "call", "brackets"] * (depth > 0))
    )
    if kind == "name":
        name = draw(st.sampled_from(NAMES))
        return name, f"v[{name!r}]"
    if kind == "number":
        number = draw(st.sampled_from(NUMBERS))
        return number, f"float({number!r})"
    inner = formulas(depth - 1)
    gap = draw(st.sampled_from(["", " "]))
    if kind == "sign":
        sign, (ours, python) = draw(st.sampled_from("+-")), draw(inner)
        return f"{sign}{gap}({ours})", f"{sign}({python})"
    if kind == "brackets":
        ours, python = draw(inner)
        return f"({gap}{ours})", f"({python})"
    if kind == "call":
        name = draw(st.sampled_from(["min", "max", "abs", "log"]))
        some = draw(st.lists(inner, min_size=1, max_size=1 if name in ("abs", "log") else 3))
        ours, python = zip(*some, strict=True)
        call = f"[{', '.join(python)}]" if name in ("min", "max") else python[0]
        return f"{name}{gap}({','.join(ours)})", f"{'math.log' if name == 'log' else name}({call})"
    sign, left, right = draw(st.sampled_from("+-*/")), draw(inner), draw(inner)
    # Without brackets: what binds more strongly, and from left to right, is Python's business too.
    return f"{left[0]} {sign} {right[0]}", f"{left[1]} {sign} {right[1]}"


def parsed(text: str) -> Formula | None:
    with contextlib.suppress(UsageError):
        return parse(text)
    return None


@given(formulas(), st.lists(VALUES, min_size=len(NAMES), max_size=len(NAMES)))
def test_a_formula_is_worth_what_python_says(texts: tuple[str, str], values: list[Any]) -> None:
    ours, python = texts
    known = dict(zip(NAMES, values, strict=True))
    formula = parsed(ours)
    if formula is None:
        assert ours in NAMES or len(ours) > LONGEST or not any(name in ours for name in NAMES)
        return
    used = [known[name] for name in formula.names]
    try:
        # The reference is evaluated on what the strategy above made, never on what anybody typed.
        expected = eval(python, {"math": math, "v": known, "min": min, "max": max, "abs": abs, "float": float})
    except (TypeError, ZeroDivisionError, ValueError, OverflowError):
        expected = None
    if any(value is None or not math.isfinite(value) for value in used):
        expected = None
    found = metric_of(named(known), ours)
    if expected is None or not math.isfinite(expected):
        assert found is None
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5*mmlu + ", "missing at the end"),
        ("0.5 * * mmlu", "is not expected"),
        ("(a + b", "isn't closed"),
        ("a + b)", "not expected"),
        ("abss(gap) + 1", "no function 'abss'"),
        ("abs(a, b) + 1", "takes 1 value, not 2"),
        ("min() + 1", "not expected"),
        ("2 * 3", "no metric"),
        ("a + __import__('os')", "no function '__import__'|character"),
        ("a ** b", "not expected"),
        ("a + b[0]", "character"),
        ("a + 'x'", "character"),
        ("-" * (DEEPEST + 1) + "a", "inside one another"),
        ("(" * 5000 + "a + a" + ")" * 5000, "characters"),
        ("+".join(["metric"] * 100), "characters"),
        ("a + 5shot", "character"),
    ],
)  # fmt: skip
def test_a_formula_with_a_slip_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Keep(best=1, monitor=text, mode="max")
    assert metric_of(named({"a": 1.0, "b": 2.0}), text) is None, "what somebody recorded never raises"
    assert known_mode(text) is None or "loss" in text


@pytest.mark.parametrize(
    "name",
    ["eval_loss", "1-wer", "train/loss", "f1(macro)", "rouge-l", "pass@1", "5shot acc", "ünïcode",
     "a.b-c/d", "x:y"],
)  # fmt: skip
def test_the_names_that_metrics_have_are_no_formulas(name: str) -> None:
    assert parse(name) is None
    assert metric_of(named({name: 0.25}), name) == 0.25
    assert Keep(best=1, monitor=name, mode="max").monitor == name


def test_what_was_recorded_under_the_very_name_comes_first() -> None:
    assert metric_of(named({"a + b": 7.0, "a": 1.0, "b": 1.0}), "a + b") == 7.0
    assert metric_of(named({"a + b": math.nan, "a": 1.0, "b": 1.0}), "a + b") is None
    assert metric_of(named({"eval_loss": 1.0, "x": 2.0}), "loss + x") == 3.0


def test_a_formula_needs_a_direction() -> None:
    for text in ("eval_loss + 0.1*abs(eval_gap)", "0.5*mmlu + 0.5*accuracy", "f1 / wer_loss", "log(loss)"):
        assert known_mode(text) is None
        with pytest.raises(UsageError, match="lower or a higher"):
            Keep(best=1, monitor=text)


METRICS = st.fixed_dictionaries({}, optional={"a": VALUES, "b": VALUES})


@given(
    st.lists(METRICS, max_size=8), st.sampled_from(["a", "b", "a - 2*b", "max(a,b)"]), st.sampled_from(["min", "max"])
)
def test_a_ranking_is_a_total_order_over_those_with_a_value(found: list[Any], monitor: str, mode: Any) -> None:
    records = [named(values, seq) for seq, values in enumerate(found, 1)]
    order = ranking(records, monitor, mode)
    assert {r.seq for r in order} == {r.seq for r in records if metric_of(r, monitor) is not None}
    keys = [((1 if mode == "min" else -1) * (metric_of(r, monitor) or 0.0), -r.seq) for r in order]
    assert keys == sorted(keys)
    assert ranking(list(reversed(records)), monitor, mode) == order


@given(st.lists(METRICS, max_size=8), st.sampled_from(["min", "max"]), st.sampled_from(["min", "max"]))
def test_the_front_is_what_nothing_beats(found: list[Any], first: Any, second: Any) -> None:
    records = [named(values, seq) for seq, values in enumerate(found, 1)]
    ways = {"a": 1 if first == "min" else -1, "b": 1 if second == "min" else -1}
    points = {
        r.seq: tuple(way * value for name, way in ways.items() if (value := metric_of(r, name)) is not None)
        for r in records
    }
    points = {seq: point for seq, point in points.items() if len(point) == 2}
    expected = {
        seq
        for seq, point in points.items()
        if not any(o[0] <= point[0] and o[1] <= point[1] and o != point for o in points.values())
    }
    front = pareto(records, {"a": first, "b": second})
    assert {r.seq for r in front} == expected
    assert [points[r.seq] for r in front] == sorted(points[r.seq] for r in front)


@given(st.lists(METRICS, max_size=8), st.integers(1, 3))
def test_I10_the_best_by_each_metric_stay(found: list[Any], best: int) -> None:
    records = [named(values, seq) for seq, values in enumerate(found, 1)]
    keep = Keep(last=1, best=best, monitor=("a", "b"), mode=("min", "max"))
    decisions = {d.record.seq: d for d in decide(records, keep)}
    for name, mode in keep.monitors:
        for place, winner in enumerate(ranking(records, name, mode)[:best], 1):
            decision = decisions[winner.seq]
            assert decision.action == "keep"
            assert f"best {place}/{best} by {name}" in decision.reasons
            assert place > 1 or any(reason.startswith(f"best: {name} = ") for reason in decision.reasons)


def test_several_metrics_are_one_policy() -> None:
    keep = Keep(best=2, monitor=["eval_loss", "mmlu"], mode=("min", "max"))  # type: ignore[arg-type]
    assert keep.monitors == (("eval_loss", "min"), ("mmlu", "max")) and keep.primary == ("eval_loss", "min")
    assert keep.describe() == "keep the best 2 by eval_loss and by mmlu"
    assert Keep(**keep.options()) == keep == msgspec.structs.replace(keep)  # type: ignore[arg-type]
    assert Keep(best=1, monitor=("loss", "f1")).mode == ("min", "max")
    assert Keep(best=1, monitor=("loss",)) == Keep(best=1, monitor="loss")
    assert Keep(best=1, monitor=("loss", "mmlu"), mode=(None, "max")).mode == ("min", "max")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"monitor": ("a", "a"), "mode": ("min", "min")}, "twice"),
        ({"monitor": ("loss", "f1"), "mode": "min"}, "2 metrics and mode 1"),
        ({"monitor": ("loss",), "mode": ("min", "max")}, "1 metrics and mode 2"),
        ({"monitor": ("loss", "mmlu")}, "lower or a higher mmlu"),
        ({"monitor": ()}, "the name of a metric"),
        ({"monitor": ("loss", "")}, "the name of a metric"),
        ({"monitor": ("loss", 3)}, "the name of a metric"),
        ({"monitor": ("loss", "f1"), "mode": ("min", "up")}, "'min' or 'max'"),
    ],
)  # fmt: skip
def test_a_policy_of_several_metrics_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Keep(best=1, **options)
