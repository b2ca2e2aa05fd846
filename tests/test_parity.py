"""The live run, `prune` on its directory and the simulation decide the same, checkpoint by checkpoint."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lastgood import policy, pruning, ranking
from lastgood.cli import prune
from lastgood.errors import NoCheckpoint
from lastgood.format.tensors import Tensor
from lastgood.manager import Manager
from lastgood.model import Record
from lastgood.policy import Decision, Keep
from lastgood.repo import pins, poison
from lastgood.repo.read import records
from lastgood.repo.staging import Staging
from lastgood.simulate import Event, Mark, Metrics, Moment, Pin, Resume, Retain, Save, simulate
from lastgood.view import look

FORMULA = "0.5*eval_loss - log(mmlu + 1)"
VALUES = st.sampled_from([math.nan, math.inf, 1.0, 1.0, 2.0, 3.0]) | st.floats(0, 9)


@st.composite
def keeps(draw: Any) -> Keep:
    number = st.none() | st.integers(1, 4)
    monitor = draw(
        st.sampled_from([None, "eval_loss", "loss", "eval_accuracy", FORMULA, ("eval_loss", "mmlu"), ("mmlu", FORMULA)])
    )
    ways = st.sampled_from(["min", "max"])
    common = {
        "full": draw(number),
        "monitor": monitor,
        "mode": (draw(ways), draw(ways)) if isinstance(monitor, tuple) else draw(ways) if monitor else None,
    }
    if draw(st.booleans()):
        return Keep(total=draw(number), **common)
    return Keep(
        last=draw(number),
        best=draw(number) if monitor else None,
        every=draw(st.none() | st.sampled_from([2, 3])),
        within=draw(st.none() | st.sampled_from([5.0, 60.0])),
        **common,
    )


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.integers(1, 3), st.none() | VALUES, st.floats(-2, 40)),
        st.tuples(st.just("save"), st.integers(0, 2), st.none() | VALUES, st.floats(-2, 40)),
        st.tuples(st.just("weights"), st.integers(1, 3), st.none() | VALUES, st.floats(-2, 40)),
        st.tuples(st.just("metrics"), st.integers(0, 20), VALUES),
        st.tuples(st.just("resume"), st.integers(0, 20)),
        st.tuples(st.just("pin"), st.integers(0, 20)),
        st.tuples(st.just("sick"), st.integers(1, 3), st.none() | VALUES, st.floats(-2, 40)),
        st.tuples(st.just("mark"), st.integers(0, 20), st.booleans()),
        st.tuples(st.just("retain")),
    ),
    min_size=3,
    max_size=16,
)


def stage(seed: int, full: bool) -> Any:
    def write(staging: Staging) -> None:
        data = memoryview(bytes([seed % 251]) * (100 + seed % 7))
        staging.tensors("model.safetensors", "model", [Tensor("w", "U8", (len(data),), data)])
        if full:
            staging.data("resume.json", "progress", b"{}" + b" " * (seed % 5))

    return write


def both(value: float) -> dict[str, float]:
    """What an evaluation yields; not every one has an mmlu."""
    late = {} if value == 2.0 else {"mmlu": value * 7 % 3 if math.isfinite(value) else value}
    return {"eval_loss": value, "eval_accuracy": -value, **late}


class Live:
    """A real run on a real directory, with a clock of its own; it notes its history for the simulation."""

    def __init__(self, root: Path, keep: Keep, *, by_rules: bool, by_command: bool) -> None:
        self.root, self.keep, self.by_rules, self.by_command = root, keep, by_rules, by_command
        self.now, self.step, self.seed = 1e9, 0, 0
        self.history: list[Event] = []
        self.decided: list[tuple[Decision, ...]] = []
        self.left: list[tuple[Record, ...]] = []
        self.made = Manager(root=root, keep=keep, on_error="raise")
        self.made.open()
        self.made.begin_fresh()

    def act(self, what: str, *args: Any) -> None:
        own = [r for r in records(self.root) if r.ours]
        if what in ("save", "weights", "sick"):
            self.save(*args, full=what != "weights", sick="loss is nan" if what == "sick" else "")
        elif what == "mark" and own:  # later than the save, of whatever is there; and healthy after all
            step, reason = own[args[0] % len(own)].step, "found out later" if args[1] else ""
            self.history.append(Mark(step, reason))
            poison.mark(self.root, {policy.at_step(own, step)[0].id: reason})
        elif what == "retain":
            self.history.append(Retain())
            self.retain()
        elif what == "metrics" and self.made.saved:  # also of a checkpoint that is gone, or was left
            at = sorted(self.made.saved)
            self.note(at[args[0] % len(at)], args[1])
        elif what == "pin" and own:
            step = own[args[0] % len(own)].step
            self.history.append(Pin(step))
            pins.add(self.root, policy.at_step(own, step)[0].id, "pinned")
        elif what == "resume":
            # Not one that a branch left behind under a step where this branch has the weights alone: a step means
            # the branch's own.
            full = [r.step for r in own if policy.at_step(own, r.step)[0].state == "full"]
            if full:
                self.resume(full[args[0] % len(full)])

    def save(self, further: int, value: float | None, pause: float, *, full: bool, sick: str = "") -> None:
        self.step, self.now, self.seed = max(1, self.step + further), self.now + pause, self.seed + 1
        with mock.patch("lastgood.manager.time.time", return_value=self.now):
            record = self.made.save(
                self.step,
                stage(self.seed, full),
                estimate=1,
                environment={},
                arguments={},
                facts={poison.FACT: sick} if sick else {},
            )
        assert record is not None and record.manifest is not None
        weights = sum(record.manifest.files[name].size for name in record.manifest.parts["model"])
        first = self.seed % 2 and value is not None  # evaluated before the save, as with save_strategy="best"
        known = both(value) if first and value is not None else {}
        self.history.append(Save(self.step, record.size if full else None, weights, self.now, known, sick))
        if known:
            self.made.record(self.step, known)
        self.retain()
        if value is not None and not known:
            self.note(self.step, value)

    def note(self, step: int, value: float) -> None:
        self.history.append(Metrics(step, both(value)))
        self.made.record(step, both(value))

    def resume(self, step: int) -> None:
        self.history.append(Resume(step))
        self.made.close()
        self.made = Manager(root=self.root, keep=self.keep, on_error="raise")
        self.made.open()
        record = self.made.find(step).record
        self.made.begin_from(record)
        self.made.saved[step] = record  # as an integration does, for an evaluation that was due
        self.step = step

    def retain(self) -> None:
        """Retention, after `prune --dry-run` has said what it would do."""
        expected = self.pruned()
        why = {d.record.name: d.reasons for d in look(self.root).decisions()}
        decisions = self.made.retain()
        if expected is not None:
            assert expected == [(d.record.name, d.action, d.reasons) for d in decisions]
        if self.keep.options():  # of a policy that says nothing, `log` shows which one is the best all the same
            assert why == {d.record.name: d.reasons for d in decisions}, "what `log` says of each"
        self.decided.append(decisions)
        self.left.append(records(self.root))

    def pruned(self) -> list[tuple[str, str, tuple[str, ...]]] | None:
        """What prune says; None where it has to be told more than the run's policy."""
        view = look(self.root)
        rules: dict[str, Any] = dict.fromkeys(policy.OPTIONS)
        if self.keep.options().keys() <= {"monitor", "mode"}:
            return None
        # Rules that name no metric get the one that the run recorded, so that its best is safe: other rules, then.
        if self.by_rules and (self.keep.monitor is not None or view.monitor is None):
            rules |= self.keep.options()
        said = [(d.record.name, d.action, d.reasons) for d in pruning.plan(view, rules)]
        if self.by_command and self.measured():
            assert self.commanded(rules) == said
        return said

    def measured(self) -> bool:
        """Whether each metric was recorded, or none: `prune --monitor` refuses what no checkpoint has."""
        known = {name for record in records(self.root) if record.ours for name in record.metrics}
        wanted = [ranking.also_called(m) for name, _ in self.keep.monitors for m in ranking.needs(name)]
        return not known or all(known & set(names) for names in wanted)

    def commanded(self, rules: dict[str, Any]) -> list[tuple[str, str, tuple[str, ...]]]:
        words = {"full": "--full", "monitor": "--monitor", "mode": "--mode"}
        several = [(name, way) for name, way in self.keep.monitors if isinstance(rules["monitor"], tuple)]
        options = [word for name, way in several for word in ("--monitor", f"{name}:{way}")]
        options += [
            str(word) for name, value in rules.items() if value is not None and not isinstance(value, tuple)
            for word in (words.get(name, f"--keep-{name}"), f"{value}s" if name == "within" else value)
        ]  # fmt: skip
        done = CliRunner().invoke(prune.prune, [str(self.root), "--dry-run", "--json", *options])
        assert done.exit_code == 0, done.output
        rows = json.loads(done.stdout)["decisions"]
        return [(row["name"], row["action"], tuple(row["reasons"])) for row in reversed(rows)]


def key(record: Record) -> tuple[int, int, bool]:
    """Names of checkpoints that moved aside hold a random id in the live run: step, number, and whether it did."""
    return record.step, record.seq, "." in record.name


def seen(record: Record) -> tuple[Any, ...]:
    metrics = {name: repr(value) for name, value in record.metrics.items()}
    lineage = record.manifest.lineage if record.manifest is not None else ()
    return (*key(record), record.state, record.size, record.current, record.pinned, record.poisoned, lineage, metrics)


def parents(found: Sequence[Record], numbers: dict[str, int]) -> list[int | None]:
    numbers |= {record.id: record.seq for record in found}
    return [numbers.get(r.manifest.parent or "") for r in found if r.manifest is not None]


def compare(live: Live, moments: Sequence[Moment]) -> None:
    assert len(moments) == len(live.decided)
    here: dict[str, int] = {}
    there: dict[str, int] = {}
    for moment, decisions, left in zip(moments, live.decided, live.left, strict=True):
        assert [(key(d.record), d.action, d.reasons) for d in moment.decisions] == [
            (key(d.record), d.action, d.reasons) for d in decisions
        ]
        before = [d.record for d in decisions]
        assert list(map(seen, (d.record for d in moment.decisions))) == list(map(seen, before))
        assert list(map(seen, moment.records)) == list(map(seen, left))
        assert parents([d.record for d in moment.decisions], here) == parents(before, there)
        assert moment.peak == sum(record.size for record in before)
        assert moment.bytes == sum(record.size for record in left)
        newest = policy.latest(left)
        assert (moment.latest and key(moment.latest)) == (newest and key(newest))
        monitor, mode = live.keep.primary
        if monitor is not None and mode is not None:
            best = ranking.best(left, monitor, mode)
            assert (moment.best and key(moment.best)) == (best and key(best))


@pytest.fixture(scope="module", autouse=True)
def _nothing_durable() -> Iterator[None]:
    """Thousands of saves: what counts here is what is there, not whether it survives a power cut."""
    with mock.patch("os.fsync", return_value=None):
        yield


def memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def play(keep: Keep, actions: Sequence[tuple[Any, ...]], *, by_rules: bool = False, by_command: bool = False) -> Live:
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        live = Live(Path(folder), keep, by_rules=by_rules, by_command=by_command)
        for what, *args in actions:
            live.act(what, *args)
        live.made.close()
        compare(live, simulate(live.history, keep))
        return live


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(keeps(), ACTIONS, st.booleans(), st.sampled_from([True, False, False, False, False]))
def test_the_live_run_prune_and_the_simulation_agree(
    keep: Keep, actions: list[tuple[Any, ...]], by_rules: bool, by_command: bool
) -> None:
    play(keep, actions, by_rules=by_rules, by_command=by_command)


SICK, SAVE = ("sick", 1, 0.5, 1.0), ("save", 1, 1.0, 1.0)


def test_a_poisoned_one_takes_no_place_and_costs_no_healthy_one() -> None:
    keep = Keep(last=1, best=1, full=1, monitor="eval_loss")
    live = play(keep, [SAVE, SAVE, SICK, SICK, SICK])
    names = [[r.name for r in left] for left in live.left]
    assert names[-3:] == [["checkpoint-2", f"checkpoint-{n}"] for n in (3, 4, 5)], "the newest of them, for a look"
    healthy = live.left[-1][0]
    assert healthy.state == "full" and policy.latest(live.left[-1]) == ranking.best(live.left[-1], "eval_loss", "min")
    assert policy.latest(live.left[-1]) == healthy
    live = play(keep, [SAVE, SAVE, SICK, SICK, SAVE])
    assert [r.name for r in live.left[-1]] == ["checkpoint-5"], "a newer healthy one is there: they go"
    (said,) = (d.reasons for d in live.decided[-1] if d.record.step == 4)
    assert said == ("poisoned: loss is nan", "checkpoint-5 is newer and healthy")


def test_a_policy_without_limits_deletes_no_poisoned_one_either_and_a_pinned_one_stays() -> None:
    assert len(play(Keep(), [SAVE, SICK, SAVE, SICK, SAVE]).left[-1]) == 5
    live = play(Keep(last=1), [SAVE, SICK, ("pin", 1), SAVE, SAVE])
    assert [r.step for r in live.left[-1]] == [2, 4]


def test_what_a_resume_from_before_it_left_behind_goes_with_the_next_healthy_save() -> None:
    live = play(Keep(last=2), [SAVE, SICK, ("resume", 0), SAVE])
    assert [(r.step, r.poisoned) for r in live.left[-1]] == [(1, ""), (2, "")]


def test_marks_later_and_taken_back_count_from_the_next_retention_on() -> None:
    save = ("save", 1, 1.0, 1.0)
    live = play(Keep(last=1), [save, ("pin", 0), save, ("mark", 1, True), ("retain",), ("mark", 1, False), ("retain",)])
    newest = [policy.latest(left) for left in live.left]
    assert [record and record.step for record in newest] == [1, 2, 1, 2]


def test_where_a_run_went_back_to_stays_until_something_newer_is_saved() -> None:
    save = ("save", 1, 1.0, 1.0)
    live = play(Keep(last=1, full=1), [save, ("pin", 0), save, save, ("resume", 0), ("retain",), save, ("retain",)])
    reasons = [[r for d in decisions for r in d.reasons if r.startswith("the run")] for decisions in live.decided]
    assert reasons == [[], [], [], ["the run goes on from here"], [], []]


def test_the_same_step_on_another_branch_moves_the_older_one_aside() -> None:
    moments = simulate([Save(1, 9, 5), Save(2, 9, 5), Resume(1), Save(2, 8, 5), Save(3, None, 5)], Keep(last=9))
    assert [(r.name, r.current, r.state) for r in moments[-1].records] == [
        ("checkpoint-1", True, "full"),
        (f"checkpoint-2.{2:08x}", False, "full"),
        ("checkpoint-2", True, "full"),
        ("checkpoint-3", True, "weights"),
    ]
    assert (moments[-1].peak, moments[-1].bytes) == (9 + 9 + 8 + 5, 9 + 9 + 8 + 5)
    assert moments[-1].latest is not None and moments[-1].latest.seq == 3


def test_a_step_means_this_branch_even_where_only_another_has_its_full_state(tmp_path: Path) -> None:
    live = Live(tmp_path, Keep(), by_rules=False, by_command=False)
    for act in (("save", 1, None, 0.0), ("save", 3, None, 0.0), ("resume", 0), ("weights", 3, None, 0.0)):
        live.act(*act)
    (aside,) = (r for r in records(tmp_path) if r.step == 4 and not r.current)
    assert aside.state == "full"
    with pytest.raises(NoCheckpoint, match=f"(?s)weights alone.*another branch left {aside.name}"):
        live.made.find(4)
    live.made.close()


def test_a_new_checkpoint_exists_before_an_old_one_goes() -> None:
    moments = simulate([Save(1, 10, 4), Save(2, 10, 4), Metrics(2, {"loss": 1.0}), Save(3, 10, 4)], Keep(last=1))
    assert [(m.step, m.peak, m.bytes) for m in moments] == [(1, 10, 10), (2, 20, 10), (3, 20, 10)]


@pytest.mark.parametrize("event", [Resume(1), Pin(1), Resume(7)])
def test_nobody_goes_back_to_what_is_gone(event: Event) -> None:
    with pytest.raises(NoCheckpoint, match="at that moment"):
        simulate([Save(1, 10, 4), Save(2, 10, 4), event], Keep(last=1))
