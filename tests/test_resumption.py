"""What `lastgood resume` says beforehand is what a live run then really takes, whatever lies in the directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lastgood
from lastgood.errors import CorruptCheckpoint, NoCheckpoint, NotSupported
from lastgood.format import manifest as codec
from lastgood.manager import Manager
from lastgood.model import Manifest, Record, checkpoint_name, stripped
from lastgood.policy import Keep
from lastgood.recovery import first_good, in_order
from lastgood.repo.layout import HIDDEN, step_of
from lastgood.repo.read import records
from lastgood.target import Fresh, resolve

import realruns
from cli import branched, call, flip, managed, snapshot
from training import Case

CASE = Case("resumption", evaluate=True)
MODEL = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")


def newest(run: Path, back: int = 0) -> Path | None:
    """The checkpoint with the highest number, or one before it."""
    found = sorted((p for p in run.iterdir() if step_of(p.name) is not None), key=lambda p: (step_of(p.name), p.name))
    return found[-1 - back] if back < len(found) else None


def weights(path: Path) -> Path:
    return next((path / name for name in MODEL if (path / name).exists()), path / "config.json")


def flipped(path: Path) -> None:
    """Only a hash, or the checksum of an archive, tells."""
    if weights(path).exists():
        flip(path / "optimizer.pt" if (path / "optimizer.pt").exists() else weights(path))


def cut(path: Path) -> None:
    if weights(path).exists():
        os.truncate(weights(path), max(1, weights(path).stat().st_size // 2))


def lost(path: Path) -> None:
    weights(path).unlink(missing_ok=True)


def manifest(path: Path) -> Manifest | None:
    try:
        return codec.decode((path / codec.NAME).read_bytes(), codec.NAME)
    except (OSError, CorruptCheckpoint):
        return None


def light(path: Path) -> None:
    """As a strip leaves it; of a stock one, as save_only_model writes it."""
    old = manifest(path)
    if old is None:
        for name in ("optimizer.pt", "scheduler.pt"):
            (path / name).unlink(missing_ok=True)
        return
    new = stripped(old)
    (path / codec.NAME).write_bytes(codec.encode(new))
    for name in old.files.keys() - new.files.keys():
        (path / name).unlink(missing_ok=True)


def bare(path: Path) -> None:
    (path / codec.NAME).unlink(missing_ok=True)


def foreign(path: Path) -> None:
    """As it looks that was copied here from another run."""
    old = manifest(path)
    if old is not None:
        (path / codec.NAME).write_bytes(codec.encode(msgspec.structs.replace(old, run="f" * 16)))


def garbled(path: Path) -> None:
    (path / codec.NAME).write_bytes(b'{"format": ')


def husk(path: Path) -> None:
    """A save behind all others that got no further than this."""
    new = path.parent / checkpoint_name(10_000)
    if not new.exists():
        new.mkdir()
        (new / "config.json").write_text("{}")


def again(path: Path) -> None:
    """A copy under a higher number: its name alone says that it is newer."""
    new = path.parent / checkpoint_name(20_000)
    if not new.exists():
        shutil.copytree(path, new)


def nameless(path: Path) -> None:
    (path.parent / HIDDEN / "run.json").unlink(missing_ok=True)


def gone(path: Path) -> None:
    shutil.rmtree(path)


DEEDS: tuple[Callable[[Path], None], ...] = (
    flipped, cut, lost, light, bare, foreign, garbled, husk, again, nameless, gone,
)  # fmt: skip

OWN = (flipped, cut, lost, light, garbled, husk)
"""Those after which a word means the run's own: from outside it may name any other too, to be resumed from by path."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, realruns_cache: Path) -> dict[str, Path]:
    """Runs to start from, each of them intact."""
    home = tmp_path_factory.mktemp("bases")
    found = {"managed": managed(home / "managed"), "branched": branched(home / "branched")}
    stock = found["stock"] = realruns.make("trainer_full", home / "stock", realruns_cache)
    found["adopted"] = Path(shutil.copytree(stock, home / "adopted"))
    assert call("-C", found["adopted"], "adopt", "-y")[0] == 0
    partly = found["partly adopted"] = home / "partly"
    shutil.copytree(stock, partly, ignore=shutil.ignore_patterns("checkpoint-6"))
    assert call("-C", partly, "adopt", "-y")[0] == 0
    shutil.copytree(stock / "checkpoint-6", partly / "checkpoint-6")
    two = found["two runs"] = Path(shutil.copytree(stock, home / "two"))
    other = realruns.make("trainer_peft", home / "peft", realruns_cache)
    shutil.copytree(other / "checkpoint-6", two / "checkpoint-8")
    state = json.loads((two / "checkpoint-8" / "trainer_state.json").read_text())
    (two / "checkpoint-8" / "trainer_state.json").write_text(json.dumps({**state, "global_step": 8}))
    both = found["managed beside stock"] = Path(shutil.copytree(found["managed"], home / "both"))
    for step in (4, 6):
        shutil.copytree(stock / f"checkpoint-{step}", both / f"checkpoint-{step}")
    return found


def said(run: Path, start: Any = "auto") -> str | None:
    """The name of the checkpoint that the command line says a resume takes."""
    before = snapshot(run)
    code, out, err = call("resume", run, "--print-path", "--check", "--from", start)
    # 10: no run at all any more. 2: no metric left to be the best by.
    assert code in (0, 3, 10) or (code == 2 and "best by which metric" in err), (code, out, err)
    assert snapshot(run) == before
    return Path(out.strip()).name if code == 0 else None


def taken(run: Path, start: Any = "auto") -> str | None:
    """The name of the one that a managed Trainer takes."""
    manager = Manager(root=run, keep=Keep(monitor="eval_loss", mode="min"), on_error="raise")
    manager.open()
    try:
        target = resolve(manager, start)
    except NoCheckpoint:
        return None
    finally:
        manager.close()
    return None if isinstance(target, Fresh) else target.path.name


def done(base: Path, deeds: list[tuple[Callable[[Path], None], int]], place: Path) -> Path:
    """A copy of a run to which things were done: each to the newest checkpoint, or to the one so many before it."""
    run = Path(shutil.copytree(base, place / "run"))
    for deed, back in deeds:
        path = newest(run, back)
        if path is not None:
            deed(path)
    return run


BASES = ("managed", "branched", "stock", "adopted", "partly adopted", "two runs", "managed beside stock")
CASES = st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(0, 2)), max_size=4)
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("base", BASES)
@QUICK
@given(deeds=CASES)
def test_what_is_said_is_what_is_taken(
    base: str, deeds: list[tuple[Any, int]], bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = done(bases[base], deeds, tmp_path_factory.mktemp("case"))
    assert said(run) == taken(run)
    shutil.rmtree(run.parent)


@pytest.mark.parametrize("base", ["managed", "branched", "adopted"])
@QUICK
@given(deeds=st.lists(st.tuples(st.sampled_from(OWN), st.integers(0, 2)), max_size=4), best=st.booleans())
def test_and_so_it_is_with_the_best_and_with_a_step(
    base: str,
    deeds: list[tuple[Any, int]],
    best: bool,
    bases: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = done(bases[base], deeds, tmp_path_factory.mktemp("case"))
    start = "best" if best else "4" if base == "adopted" else "400"
    assert said(run, start) == taken(run, start)
    shutil.rmtree(run.parent)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("managed", "checkpoint-600"),
        ("branched", "checkpoint-500"),
        ("stock", "checkpoint-6"),
        ("adopted", "checkpoint-6"),
        ("partly adopted", "checkpoint-4"),
        ("two runs", None),
        ("managed beside stock", "checkpoint-600"),
    ],
)
def test_what_an_intact_run_goes_on_from(base: str, expected: str | None, bases: dict[str, Path]) -> None:
    assert said(bases[base]) == expected


def test_a_husk_of_a_managed_save_hides_no_second_run(bases: dict[str, Path], tmp_path: Path) -> None:
    """The live run refuses to guess between two stock runs; a manifest cut short beside them changes nothing."""
    run = done(bases["two runs"], [(husk, 0), (garbled, 0)], tmp_path)
    code, out, err = call("resume", run, "--print-path", "--check")
    assert (code, out) == (3, "") and "2 runs" in err, err
    assert taken(run) is None
    single = done(bases["stock"], [(husk, 0), (garbled, 0)], tmp_path / "single")
    code, out, _ = call("resume", single)
    assert code == 0 and "checkpoint-10000  PASSED OVER" in out, out


def test_a_number_is_only_a_name(bases: dict[str, Path], tmp_path: Path) -> None:
    """What a stock checkpoint is follows from its content: a renamed one isn't newer, a copied one is a second run."""
    copied = done(bases["stock"], [(again, 1)], tmp_path / "copied")
    assert said(copied) is taken(copied) is None
    renamed = done(bases["stock"], [(again, 1), (gone, 2)], tmp_path / "renamed")
    assert said(renamed) == taken(renamed) == "checkpoint-6"


@pytest.mark.parametrize("kind", ["managed", "stock", "adopted"])
@pytest.mark.parametrize("deed", [flipped, light])
def test_a_real_trainer_takes_it_too(kind: str, deed: Callable[[Path], None], real_runs: Any, tmp_path: Path) -> None:
    run = done(real_runs[kind], [(deed, 0)], tmp_path)
    expected = said(run)
    trainer = lastgood.manage(CASE.trainer(run))
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.resume_report.source == expected == "checkpoint-4"


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six steps of the run that CASE trains to its end, under each kind of management."""
    home = tmp_path_factory.mktemp("real")
    CASE.trainer(home / "stock").train()
    lastgood.manage(CASE.trainer(home / "managed")).train()
    for kind in ("stock", "managed"):
        shutil.rmtree(home / kind / "checkpoint-8")
    shutil.copytree(home / "stock", home / "adopted")
    assert call("-C", home / "adopted", "adopt", "-y")[0] == 0
    return {kind: home / kind for kind in ("stock", "managed", "adopted")}


def test_an_adopted_checkpoint_of_several_ranks_is_shown_and_not_taken(realruns_cache: Path, tmp_path: Path) -> None:
    """The set-up that wrote it can go on from it, a managed Trainer can't: this is where the two differ."""
    run = realruns.make("fsdp_trainer", tmp_path / "run", realruns_cache)
    assert call("-C", run, "adopt", "-y")[0] == 0
    shown = said(run)
    assert shown is not None
    with pytest.raises(NotSupported, match=shown):
        taken(run)


@given(st.lists(st.sampled_from(["good", "damaged", "weights"]), max_size=6), st.booleans(), st.booleans())
def test_the_first_good_one_is_taken_and_those_behind_it_are_not_read(
    kinds: list[str], full: bool, fall_back: bool
) -> None:
    records = [
        Record(name=f"{number}-{kind}", step=number, state="weights" if kind == "weights" else "full")
        for number, kind in enumerate(kinds)
    ]
    read: list[str] = []

    def problems(record: Record) -> tuple[str, ...]:
        read.append(record.name)
        return ("a", "b", "c", "d") if record.name.endswith("damaged") else ()

    choice = first_good(records, problems, weights="light" if full else "", fall_back=fall_back)
    tried = [r.name for r in records if not (full and r.state == "weights")]
    before = tried.index(choice.record.name) + 1 if choice.record is not None else len(read)
    assert read == tried[:before]
    assert choice.record is None or not choice.record.name.endswith("damaged")
    assert choice.damaged == tuple(name for name in read if name.endswith("damaged"))
    assert len(choice.damaged) <= 1 or fall_back
    reasons = dict(choice.skipped)
    assert all(reasons[name] == "a; b; c" for name in choice.damaged)
    if choice.record is None and (fall_back or not choice.damaged):
        assert read == tried and set(reasons) == {r.name for r in records}, "a reason for each that is passed over"


def test_numbers_are_the_order_and_best_needs_a_metric(bases: dict[str, Path]) -> None:
    found = records(bases["branched"])
    assert [r.step for r in in_order(found, "last")] == [500, 400, 200], "not 600: its branch was left"
    assert [r.step for r in in_order(found, "best", monitor="eval_loss", mode="min")] == [400, 200]
    assert [r.step for r in in_order(found, 600)] == [600]
    with pytest.raises(NoCheckpoint, match="no metric"):
        in_order(found, "best")
