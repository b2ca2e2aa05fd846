"""The plan of a run: what it says is what the policy decides, what a disk has room for, and what real runs keep."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import lastgood
from lastgood import policy, ranking
from lastgood.cli.main import cli
from lastgood.errors import UsageError
from lastgood.planner import managed, measured
from lastgood.planner.history import Schedule, events, until
from lastgood.planner.machine import Machine, how_often
from lastgood.planner.options import asked
from lastgood.planner.plan import Plan
from lastgood.planner.replay import replay
from lastgood.planner.suggest import suggest
from lastgood.policy import Keep, decide
from lastgood.repo import journal
from lastgood.simulate import Metrics, Save, simulate
from lastgood.view import View, look
from test_policy import keeps, record

import cli as command
import forked
from training import Case, train

FULL, WEIGHTS = 140, 20
SHAPES = st.sampled_from(["falling", "overfit", "flat", "noisy", "none"])


def invoke(*words: object) -> Any:
    return CliRunner().invoke(cli, ["plan", *map(str, words)])


@st.composite
def schedules(draw: Any) -> Schedule:
    return Schedule(
        max_steps=draw(st.integers(1, 60)),
        save_strategy=draw(st.sampled_from(["steps", "steps", "best"])),
        save_steps=draw(st.sampled_from([1, 3, 5, 10, 0.1, 100])),
        eval_steps=draw(st.sampled_from([None, 1, 5, 7])),
        metrics=draw(SHAPES),
        monitor="eval_loss",
        mode=draw(st.sampled_from(["min", "max"])),
        seed=draw(st.integers(0, 3)),
    )


def with_metric(keep: Keep, schedule: Schedule) -> Keep:
    return Keep(**{**keep.options(), "monitor": schedule.monitor, "mode": schedule.mode})  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(schedules(), keeps(), st.data())
def test_a_crash_finds_what_the_policy_left(schedule: Schedule, keep: Keep, data: Any) -> None:
    keep = with_metric(keep, schedule)
    history = tuple(events(schedule, FULL, WEIGHTS))
    step = data.draw(st.integers(1, schedule.max_steps))
    found = managed.outcome(history, keep, Machine(), crash_at=step)
    crash = found.crash
    assert crash is not None
    left = [d for m in simulate(until(history, step), keep)[-1:] for d in m.decisions if d.action != "delete"]
    assert [there.step for there in crash.there] == [d.record.step for d in left]
    assert [there.reasons for there in crash.there] == [d.reasons for d in left]
    assert [there.bytes for there in crash.there] == [FULL if d.action == "keep" and d.record.state == "full"
                                                      else WEIGHTS for d in left]  # fmt: skip
    full = [there.step for there in crash.there if there.state == "full"]
    assert crash.resume == max(full, default=None)
    assert crash.lost_steps == step - (crash.resume or 0)
    values = {s: v for s, v in schedule.values().items() if s <= step and s in [t.step for t in crash.there]}
    if values and schedule.save_strategy == "steps":
        better = min if schedule.mode == "min" else max
        assert crash.best is not None and values[crash.best] == better(values.values())
        saved = {e.step for e in history if isinstance(e, Save) and e.step <= step}
        assert values[crash.best] == better(v for s, v in schedule.values().items() if s in saved), "of all saved"
    within = found.crash_in_save
    if within is not None:
        assert within.step not in [there.step for there in within.there]
        assert within.step == max(e.step for e in history if isinstance(e, Save) and e.step <= step)
        assert within.lost_steps > 0 or within.resume is None


@settings(max_examples=100, deadline=None)
@given(schedules(), keeps())
def test_a_disk_of_the_peak_is_enough_and_one_byte_less_is_not(schedule: Schedule, keep: Keep) -> None:
    keep = with_metric(keep, schedule)
    history = tuple(events(schedule, FULL, WEIGHTS))
    found = managed.outcome(history, keep, Machine())
    assert found.peak >= found.steady >= found.end
    assert {life.step for life in found.lives} == {e.step for e in history if isinstance(e, Save)}
    alive = [life for life in found.lives if life.until is None]
    assert found.end == sum(FULL if life.weights_from is None else WEIGHTS for life in alive)
    if not found.peak:
        return
    for used in (0, 1000):
        fits = managed.outcome(history, keep, Machine(disk=used + found.peak, used=used))
        short = managed.outcome(history, keep, Machine(disk=used + found.peak - 1, used=used))
        assert fits.full_at is None
        assert short.full_at == found.peak_at
    for suggestion in suggest(history, keep, found.peak - 1):
        tried = simulate(history, suggestion.keep)
        assert suggestion.peak == max(m.peak for m in tried) < found.peak
        assert (suggestion.count, suggestion.steady) == (len(tried[-1].records), max(m.bytes for m in tried))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 12), keeps(), st.booleans())
def test_where_all_stay_the_policy_keeps_all(count: int, keep: Keep, pinned: bool) -> None:
    records = [record(seq, loss=1.0 / seq, pinned=("x",) if pinned else ()) for seq in range(1, count + 1)]
    if policy.all_stay(records, keep):
        assert [d.action for d in decide(records, keep)] == ["keep"] * count


def test_a_thousand_saves_take_no_time() -> None:
    schedule = Schedule(max_steps=10_000, save_steps=10, eval_steps=10, metrics="noisy", monitor="eval_loss")
    history = tuple(events(schedule, FULL, WEIGHTS))
    for keep in (Keep(), Keep(total=3, monitor="eval_loss"), Keep(last=2, best=3, full=1, monitor="eval_loss")):
        begin = time.process_time()
        found = managed.outcome(history, keep, Machine(), crash_at=3000)
        assert time.process_time() - begin < 10, keep  # the square of the saves would take minutes
        assert len(found.uses) == 1001


# ---- metrics ---------------------------------------------------------------------------------


def test_the_courses_of_a_metric() -> None:
    def values(metrics: Any, **how: Any) -> dict[int, float]:
        return Schedule(max_steps=100, save_steps=10, metrics=metrics, **{"monitor": "eval_loss", **how}).values()

    falling, overfit = values("falling"), values("overfit@30")
    assert list(falling.values()) == sorted(falling.values(), reverse=True)
    assert min(overfit, key=overfit.__getitem__) == 30
    assert len(set(values("flat").values())) == 1 and values("none") == {}
    assert values("noisy") == values("noisy") != values("noisy", seed=1)
    accuracy = values("overfit@70", monitor="eval_accuracy")
    assert max(accuracy, key=accuracy.__getitem__) == 70
    assert values({7: 1.0, 200: 2.0}) == {7: 1.0}
    with pytest.raises(UsageError, match="no evaluation is at step 35") as error:
        values("overfit@35")
    assert error.value.hint in ("metrics='overfit@30'", "metrics='overfit@40'")
    with pytest.raises(UsageError, match="known course"):
        values("sinking")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.json", '{"500": 1.5, "1000": 1.25}', (None, {500: 1.5, 1000: 1.25})),
        ("m.json", '[{"step": 5, "eval_loss": 2}, {"step": 5, "eval_loss": 1}]', ("eval_loss", {5: 1.0})),
        ("t.json", '{"log_history": [{"step": 5, "loss": 3}, {"step": 5, "eval_loss": 1}]}', ("eval_loss", {5: 1.0})),
        ("m.csv", "step,eval_loss\n5,1.5\n10,\n15,nan\n", None),
        ("m.csv", "step,f1\n5,0.5\n", ("f1", {5: 0.5})),
    ],
)
def test_measured_metrics(tmp_path: Path, name: str, content: str, expected: Any) -> None:
    path = tmp_path / name
    path.write_text(content)
    found = measured.read(path, None)
    if expected is None:
        assert found[0] == "eval_loss" and found[1][5] == 1.5 and 10 not in found[1] and found[1][15] != found[1][15]
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "no metrics by step"),
        ("[1, 2]", "no rows with a step"),
        ("step,f1,f2\n5,1,2\n", "has no eval_loss"),
        ('{"5": "x"}', "metrics must be"),
        ("step,eval_loss\n5,abc\n", "metrics must be"),
        ("\xff", "no rows"),
    ],
)
def test_metrics_that_are_none(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "m"
    path.write_text(content)
    with pytest.raises(UsageError, match=said):
        measured.read(path, None)
    with pytest.raises(UsageError, match="can't be read"):
        measured.read(tmp_path, None)


# ---- the options -----------------------------------------------------------------------------


def test_what_was_measured_between_the_evaluations_is_not_known() -> None:
    measured = {step: 1 / step for step in range(1, 11)}
    schedule = Schedule(max_steps=10, save_steps=1, eval_steps=4, metrics=measured, monitor="eval_loss", mode="min")
    assert schedule.values() == {4: 1 / 4, 8: 1 / 8, 10: 1 / 10}
    assert len(msgspec.structs.replace(schedule, eval_steps=None).values()) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_step": 5, "max_steps": 10}, "did you mean save_steps"),
        ({}, "how long is the run"),
        ({"max_steps": 0}, "max_steps must be"),
        ({"max_steps": 10, "save_steps": 2.5}, "save_steps must be"),
        ({"max_steps": 10, "keep_best": 0}, r"Keep\(best\)"),
        ({"max_steps": 10, "keep": Keep(last=1), "keep_last": 2}, "both say what to keep"),
        ({"max_steps": 10, "save_total_limit": 2, "keep_last": 2}, "already says"),
        ({"max_steps": 10, "crash_at": 11}, "crash_at must be a step from 1 to 10"),
        ({"max_steps": 10, "compare": "deepspeed"}, "compare must be"),
        ({"max_steps": 10, "disk": "2TB"}, "disk must be"),
        ({"max_steps": 10, "bandwidth": 0}, "bandwidth must be"),
        ({"max_steps": 10, "eval_steps": 5, "monitor": "novelty"}, "is a lower or a higher novelty better"),
    ],
)
def test_wrong_options_say_what_is_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        asked(options.pop("keep", None), options)


def test_a_metric_is_assumed_only_where_something_ranks() -> None:
    assert asked(None, {"max_steps": 10, "save_total_limit": 3}).keep == Keep(total=3)
    assert asked(None, {"max_steps": 10, "keep_best": 1}).keep == Keep(best=1, monitor="eval_loss")
    wanted = asked(Keep(best=2, monitor="f1"), {"max_steps": 1000, "save_steps": 100, "crash_at": 700})
    assert wanted.schedule.monitor == "f1" and wanted.schedule.metrics == "overfit@400" and "assumed" in wanted.notes[0]


def test_how_often() -> None:
    found = how_often(Machine(bandwidth=1e9, step_time=2.0, mtbf=86400.0), 10_000, 500, 100 * 10**9)
    assert (found.cost, found.redone) == (100.0, 250.0)
    assert found.overhead == pytest.approx(100 / 1100)
    assert found.young == pytest.approx((2 * 100 * 86400) ** 0.5 / 2)
    assert found.failures == pytest.approx((20_000 + 20 * 100) / 86400)
    assert found.waste is not None and found.overhead is not None and found.overhead < found.waste < 0.2
    assert how_often(Machine(), 10, 5, 1).overhead is None


# ---- the question ----------------------------------------------------------------------------


QUESTION: dict[str, Any] = {
    "max_steps": 10_000, "save_steps": 500, "eval_steps": 500, "save_total_limit": 3, "crash_at": 3000,
    "compare": "stock",
}  # fmt: skip


def test_three_checkpoints_and_a_crash_after_step_3000() -> None:
    found = lastgood.plan("13B", metrics="overfit@1500", **QUESTION)
    ours, without, with_best = found.outcomes
    assert [o.system for o in found.outcomes] == ["lastgood", "trainer", "trainer"]
    steps = [[there.step for there in o.crash.there] for o in found.outcomes if o.crash is not None]
    assert steps == [[1500, 2000, 3000], [2000, 2500, 3000], [1500, 2500, 3000]]
    for outcome in found.outcomes:
        assert outcome.crash is not None and outcome.crash.resume == 3000 and outcome.crash.lost_steps == 0
        assert outcome.peak == 4 * outcome.full and outcome.steady == 3 * outcome.full
    best = [o.crash.best for o in found.outcomes if o.crash is not None]
    assert best == [1500, 2000, 1500]
    assert without.crash is not None and "1500 with 1.2 is gone" in without.crash.why_best
    for stock in (without, with_best):
        assert stock.crash_in_save is not None and stock.crash_in_save.resume is None
        assert "checkpoint-3000" in stock.crash_in_save.why_resume and stock.crash_in_save.lost_steps == 500
    assert ours.crash_in_save is not None
    assert (ours.crash_in_save.resume, ours.crash_in_save.best, ours.crash_in_save.lost_steps) == (2500, 1500, 500)


def test_the_whole_command_answers_it_on_one_screen() -> None:
    words = "--model 13B --max-steps 10000 --save-steps 500 --eval-steps 500 --save-total-limit 3 --crash-at 3000"
    code, out, _ = command.run("plan", *words.split(), "--compare", "stock", env={"COLUMNS": "118"})
    assert code == 0
    assert out.startswith("after a crash at step 3000: 3 on disk (1500, 2000, 3000), resume from 3000, deploy 1500")
    assert len(out.splitlines()) <= 45 and max(map(len, out.splitlines())) <= 118
    for sentence in ("resume FAILS (500 steps again)", "step 1500 with 1.2", "do 1500 more steps again"):
        assert sentence in out
    words = "--model 13B --max-steps 10000 --save-steps 10 --eval-steps 10 --compare stock --crash-at 9000 --json"
    code, out, _ = command.run("plan", *words.split())
    assert code == 0 and len(json.loads(out)["outcomes"][0]["lives"]) == 1000


# ---- the command line ------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_a_finding() -> None:
    base = ["--model", "13B", "--max-steps", 1000, "--save-steps", 100, "--eval-steps", 100]
    asked = [*base, "--keep-last", 3, "--keep-best", 3, "--price", 0.02]
    done = invoke(*asked, "--disk", "250GiB", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["fits"] is False and found["suggestions"]
    for suggestion in found["suggestions"]:
        rules = [(f"--keep-{name}", suggestion["keep"][name]) for name in ("last", "best", "full")]
        words = [word for rule in rules if rule[1] for word in rule]
        again = invoke(*base, *words, "--disk", "250GiB", "--json")
        assert again.exit_code == 0 and json.loads(again.stdout)["fits"] is True
        assert json.loads(again.stdout)["outcomes"][0]["peak"] == suggestion["peak"]
    assert invoke(*base, *words, "--disk", "250GiB", "--used", "240GiB").exit_code == 1
    text = invoke(*asked, "--disk", "250GiB").stdout
    assert text.startswith("doesn't fit: the disk is full at step") and "policies that fit:" in text
    assert "no policy fits" in invoke(*asked, "--disk", "1GiB").stdout


def test_a_crash_before_the_first_save_and_evaluations_beside_the_saves() -> None:
    text = invoke("--model", "13B", "--max-steps", 300, "--crash-at", 200, "--compare", "stock").stdout
    assert text.startswith("after a crash at step 200: 0 on disk (none), start afresh")
    assert "lastgood  start afresh (200 steps again)" in text and "Trainer   resume FAILS (200 steps again)" in text
    assert "a save every 300 steps" in text
    words = ["--model", "13B", "--max-steps", 1000, "--save-steps", 100, "--eval-steps", 70, "--save-total-limit", 2]
    found = lastgood.plan("13B", max_steps=1000, save_steps=100, eval_steps=70, save_total_limit=2, compare="stock")
    assert len(found.outcomes) == 2 and "the Trainer refuses load_best_model_at_end" in found.notes[-1]
    assert isinstance(invoke(*words, "--compare", "stock", "--load-best").exception, UsageError)


def test_numbers_with_units_and_files_of_metrics(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("step,eval_f1\n500,0.5\n1000,0.75\n1500,0.25\n")
    words = ["--model", "13B", "--max-steps", 1500, "--bandwidth", "2GB/s", "--step-time", "500ms", "--mtbf", "12h"]
    done = invoke(*words, "--metrics", tmp_path / "m.csv", "--monitor", "f1", "--crash-at", 1500, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["schema"] == "lastgood.plan/1" and found["outcomes"][0]["crash"]["best"] == 1000
    assert found["machine"] | {"price": None} == {
        "disk": None, "used": 0, "bandwidth": 2e9, "step_time": 0.5, "mtbf": 43200.0, "price": None, "restart": 0.0,
    }  # fmt: skip
    assert found["frequency"]["daly"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model 13B --max-steps 10 --disk 2XB", "is not a size"),
        ("--model 13B --max-steps 10 --bandwidth fast", "is not a rate"),
        ("--model 13B --max-steps 10 --mtbf 3", "is not a time"),
        ("--model 13B --max-steps 10 --metrics nowhere.json", "neither a file nor a known course"),
        ("--model 13B --max-steps 10 --plot x.gif", "a picture is one of"),
        ("--max-steps 10", "the plan of which model"),
        ("somewhere --model 13B --max-steps 10", "are two questions"),
        ("--model 13B", "how long is the run"),
        ("--model 13B --max-steps 10 --save-steps nan", "--save-steps nan: must be a number"),
        ("--model 13B --max-steps 10 --eval-steps inf", "--eval-steps inf: must be a number"),
        ("--model 13B --max-steps 10 --step-time 0s", "--step-time 0s: must be a number above 0"),
        ("--model 13B --max-steps 10 --save-total-limit 0", "--save-total-limit 0: must be a whole number of at"),
        ("--model 13B --max-steps 10 --crash-at 11", "--crash-at 11: must be a step from 1 to 10"),
        ("--model 13B --max-steps 10 --dtype int3", "--dtype 'int3' isn't a dtype"),
        ("--model 13B --max-steps 10 --metrics overfit@7", "--metrics overfit@7: no evaluation"),
        ("--model 13B --max-steps 10000000 --save-steps 1", "--save-steps 1 of 10000000 steps: more than"),
        (f"--model {'a' * 5000} --max-steps 10", "neither a file nor a model"),
    ],
)
def test_what_the_command_refuses(words: str, said: str) -> None:
    done = invoke(*words.split())
    assert isinstance(done.exception, UsageError), done.output
    assert said in str(done.exception)
    assert not done.stdout, "a mistake is told before anything is worked out"


def test_what_changes_nothing_is_said() -> None:
    idle = "--lora-r 4 --shard zero3 --load-best --used 1GB --mtbf 1d --restart 5m"
    text = invoke("--model", "13B", "--max-steps", 10, *idle.split()).stdout
    assert [line.split()[1] for line in text.splitlines() if "changes nothing without" in line] == [
        "--lora-r", "--shard", "--load-best", "--used", "--mtbf", "--restart",
    ]  # fmt: skip
    needed = "--train lora --lora-r 4 --shard zero3 --world-size 2 --compare stock --load-best --disk 2TB --used 1GB"
    more = "--step-time 1s --mtbf 1d --restart 5m --eval-steps 5 --save-steps 5"
    text = invoke("--model", "13B", "--max-steps", 10, *needed.split(), *more.split()).stdout
    assert text.startswith("fits: ") and "changes nothing" not in text


def test_a_disk_that_is_full_already_has_no_room() -> None:
    text = invoke("--model", "13B", "--max-steps", 10, "--disk", "1TB", "--used", "2TB").stdout
    assert text.startswith("doesn't fit: the disk is full at step 10; 72.7 GiB of 0 B")


def test_the_charts(tmp_path: Path) -> None:
    words = [str(word) for name, value in QUESTION.items() for word in (f"--{name.replace('_', '-')}", value)]
    call = ["--model", "13B", *words, "--disk", "700GiB", "--plot"]
    for width, encoding in ((60, "utf-8"), (100, "ascii")):
        env = {"COLUMNS": str(width), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        code, out, _ = command.run("plan", *call, "-", env=env)
        drawn = out[out.index("lastgood: keep 3") :].splitlines()
        assert code == 0 and max(map(len, drawn)) <= width
        assert ("█" in out) is (encoding == "utf-8") and "".join(drawn).isascii() is (encoding == "ascii")
        assert sum("^crash 3000" in line for line in drawn) == 3
    pytest.importorskip("matplotlib")
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        done = invoke(*call, tmp_path / f"plan.{kind}")
        assert done.exit_code == 0, done.output
        assert (tmp_path / f"plan.{kind}").read_bytes().startswith(begins)
    assert (svg := (tmp_path / "plan.svg").read_text()) and "<!-- crash at step 3000 -->" in svg


def test_a_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = invoke("--model", "13B", "--max-steps", 1000, "--plot", tmp_path / "p.png")
    assert isinstance(done.exception, UsageError) and "lastgood[plot]" in str(done.exception)


# ---- real runs -------------------------------------------------------------------------------


CASE = Case(
    "plan",
    args={"save_total_limit": None, "learning_rate": 0.3, "max_steps": 16, "metric_for_best_model": "eval_loss"},
    evaluate=True,
    options={"keep": Keep(last=2, best=2, every=6, full=1, monitor="eval_loss")},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A managed run to its end, and the same one killed after step 10."""
    root = tmp_path_factory.mktemp("real")
    for name, kill in (("whole", None), ("killed", 10)):
        status = forked.run(train, CASE, root / name, root / f"{name}.json", kill=kill, log=root / "log")
        assert status == (0 if kill is None else -9), (root / "log").read_text()
    return root


def values_of(result: Path) -> dict[int, float]:
    return {int(step): value for step, value in json.loads(result.read_text())["evals"].items()}


def history_of(root: Path, values: dict[int, float]) -> tuple[Any, ...]:
    """The schedule of CASE with the sizes of each save, which differ by a few bytes."""
    sizes = {line["step"]: line["bytes"] for line in journal.read(root) if line["event"] == "saved"}
    schedule = Schedule(max_steps=16, save_steps=2, metrics=values, monitor="eval_loss", mode="min")
    weights = {r.step: r.manifest.files["model.safetensors"].size for r in look(root).records if r.manifest is not None}
    return tuple(
        Save(e.step, sizes.get(e.step, 1), weights.get(e.step, 1), e.created) if isinstance(e, Save) else e
        for e in events(schedule, 1, 1)
    )


def kept(view: View) -> list[tuple[Any, ...]]:
    why = {d.record.name: d.reasons for d in view.decisions()}
    return [(r.step, r.state, why[r.name]) for r in view.records if r.ours]


def test_the_plan_of_a_run_is_what_it_kept(run: Path) -> None:
    view = look(run / "whole")
    keep = CASE.options["keep"]
    values = values_of(run / "whole.json")
    assert len(values) == 8 and min(values, key=values.__getitem__) != 16, "the newest isn't the best"
    history = history_of(run / "whole", values)
    last = simulate(history, keep)[-1]
    after = {d.record.step: d for d in decide(last.records, keep)}
    assert [(r.step, r.state, after[r.step].reasons) for r in last.records] == kept(view)
    gone = {
        (decision.record.step, decision.reasons)
        for moment in simulate(history, keep)
        for decision in moment.decisions
        if decision.action == "delete"
    }
    lines = [line for line in journal.read(run / "whole") if line["event"] == "deleted"]
    assert gone == {(line["step"], tuple(line["reasons"])) for line in lines} and gone


def test_a_killed_run_has_what_the_plan_says_of_a_crash(run: Path) -> None:
    view = look(run / "killed")
    keep = CASE.options["keep"]
    history = history_of(run / "killed", values_of(run / "whole.json"))
    assert {e.step: e.values["eval_loss"] for e in history if isinstance(e, Metrics) and e.step <= 10}
    crash = managed.crash(history, keep, Machine(), 10)
    assert [(t.step, t.state) for t in crash.there] == [(r.step, r.state) for r in view.records]
    best, newest = ranking.best(view.records, "eval_loss", "min"), policy.latest(view.records)
    assert best is not None and newest is not None
    assert (crash.best, crash.resume) == (best.step, newest.step)


def test_a_runs_own_policy_would_change_nothing(run: Path) -> None:
    view = look(run / "whole")
    assert view.keep is not None
    found = replay(view, view.keep)
    assert not [row for row in found.rows if row.changed]
    assert found.bytes_now == found.bytes_then == sum(record.size for record in view.records)
    assert len(found.rows) == 8
    deleted = {line["step"]: line["reasons"] for line in journal.read(run / "whole") if line["event"] == "deleted"}
    assert {row.step: list(row.reasons) for row in found.rows if row.then == "deleted"} == deleted
    done = invoke(run / "whole")
    assert done.stdout.startswith("nothing would be different")


def test_another_policy_says_what_would_be_different(run: Path) -> None:
    done = invoke(run / "whole", "--keep-last", 1, "--keep-full", 1, "--json")
    found = json.loads(done.stdout)
    assert found["schema"] == "lastgood.replay/1" and found["bytes_then"] < found["bytes_now"]
    assert 1 <= sum(row["then"] != "deleted" for row in found["rows"]) <= 2
    text = invoke(run / "whole", "--keep-last", 8).stdout
    assert text.startswith("8 checkpoints") and "more" in text.splitlines()[0]
    with pytest.raises(UsageError, match="belongs to a plan with --model"):
        raise invoke(run / "whole", "--disk", "1GB").exception
    with pytest.raises(UsageError, match="no checkpoint has a f1"):
        raise invoke(run / "whole", "--keep-best", 1, "--monitor", "f1").exception


def test_a_run_that_went_back_is_replayed_with_its_branch(tmp_path: Path) -> None:
    keep = Keep(last=4, monitor="eval_loss")
    case = Case("back", args={"max_steps": 8}, evaluate=True, options={"keep": keep})
    for resume in ("auto", 4):
        done = forked.run(train, case, tmp_path / "out", tmp_path / "r.json", resume, log=tmp_path / "log")
        assert done == 0, (tmp_path / "log").read_text()
    view = look(tmp_path / "out")
    same = replay(view, keep)
    assert not [row for row in same.rows if row.changed] and len(same.rows) == 6
    fewer = replay(view, Keep(last=1, monitor="eval_loss"))
    assert "went back to step 4" in fewer.notes[0]


def test_a_stock_run_is_replayed_from_what_is_there_and_its_log(tmp_path: Path) -> None:
    out = tmp_path / "stock"
    Case("stock", args={"save_total_limit": 2, "max_steps": 8}, evaluate=True).trainer(out).train()
    found = replay(look(out), Keep(total=2))
    assert [(row.step, row.now) for row in found.rows] == [
        (2, "deleted"), (4, "deleted"), (6, "full"), (8, "full"),
    ] and not [row for row in found.rows if row.changed]  # fmt: skip
    assert "2 saves that are gone" in found.notes[0]
    best = replay(look(out), Keep(last=1, best=1, monitor="eval_loss"))
    values = measured.read(out / "checkpoint-8" / "trainer_state.json", "eval_loss")[1]
    assert {row.step for row in best.rows if row.then != "deleted"} == {8, min(values, key=values.__getitem__)}


def test_the_plan_is_json() -> None:
    import msgspec

    found = lastgood.plan("13B", max_steps=1000, keep_best=2, compare="stock", crash_at=500)
    assert isinstance(found, Plan) and found.fits is None
    data = json.loads(msgspec.json.encode(found))
    assert data["outcomes"][0]["peak"] == found.lastgood.peak
    assert callable(lastgood.plan)


def test_the_targets_of_an_adapter() -> None:
    words = ("plan", "--model", "8B", "--train", "lora", "--max-steps", "1000", "--json")
    some = json.loads(command.call(*words, "--lora-r", "8", "--lora-targets", "q_proj, v_proj").out)
    assert some["sizes"]["trainable"] == 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    every = json.loads(command.call(*words, "--lora-targets", "all-linear").out)
    assert every["sizes"] == json.loads(command.call(*words).out)["sizes"]
    nothing = command.call(*words, "--lora-targets", "c_attn")
    assert nothing.code == 2 and "no linear module called c_attn" in nothing.err and "q_proj" in nothing.err
    assert (
        "--lora-targets changes nothing without --train lora"
        in command.call("plan", "--model", "8B", "--max-steps", "9", "--lora-targets", "q_proj").out
    )
