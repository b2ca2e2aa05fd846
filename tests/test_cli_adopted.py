"""Adopted checkpoints: verified, kept and resumed from like the run's own; not one byte of theirs changes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import lastgood
from lastgood.cli.adopt import candidates
from lastgood.cli.main import cli
from lastgood.repo.read import records
from lastgood.view import look

from training import Case

CASE = Case("adopted", evaluate=True)


def call(run: Path, *arguments: str) -> str:
    result = CliRunner().invoke(cli, ["-C", str(run), *arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("stock") / "run"
    trainer = CASE.trainer(out)
    trainer.train()
    return out, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}  # type: ignore[union-attr]


def copied(stock: Path, to: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(stock / f"checkpoint-{step}", to / f"checkpoint-{step}")
    return to


def test_a_managed_trainer_goes_on_exactly_from_an_adopted_checkpoint(
    stock: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = copied(stock[0], tmp_path / "run", 2, 4)
    call(run, "adopt", "-y")
    trainer = lastgood.manage(CASE.trainer(run))
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.resume_report.source == "checkpoint-4"
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in stock[1].items())
    last = records(run)
    assert [r.step for r in last if r.current] == [2, 4, 6, 8], "one branch, from the adopted ones on"
    assert {r.step: r.layout for r in last} == {2: "trainer", 4: "trainer", 6: "", 8: ""}


def test_I9_a_damaged_adopted_checkpoint_is_passed_over(stock: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = copied(stock[0], tmp_path / "run", 2, 4)
    call(run, "adopt", "-y")
    data = bytearray((run / "checkpoint-4/optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "checkpoint-4/optimizer.pt").write_bytes(data)
    assert CliRunner().invoke(cli, ["-C", str(run), "verify", "--full"]).exit_code == 1
    trainer = lastgood.manage(CASE.trainer(run))
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.resume_report.source == "checkpoint-2"
    assert [name for name, _ in trainer.resume_report.skipped] == ["checkpoint-4"]


def test_what_comes_later_is_adopted_onto_the_same_branch(stock: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = copied(stock[0], tmp_path / "run", 2, 4)
    call(run, "adopt", "-y")
    copied(stock[0], run, 6, 8)
    call(run, "adopt", "-y")
    there = records(run)
    assert [r.step for r in there if r.current] == [2, 4, 6, 8]
    parents = {r.id: r.manifest.parent for r in there if r.manifest is not None}
    assert list(parents.values()) == [None, *list(parents)[:-1]]
    assert json.loads(call(run, "log", "--json"))["checkpoints"][0]["why"] == ["latest", "best"]


def test_another_run_in_the_directory_stays_beside_it(stock: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = copied(stock[0], tmp_path / "run", 2, 4)
    other = Case("other", evaluate=True, args={"seed": 99, "save_steps": 3})
    other.trainer(tmp_path / "other").train()
    copied(tmp_path / "other", run, 6)
    call(run, "adopt", "-y")
    assert [r.step for r in records(run) if r.current] == [6], "the one that came furthest"
    copied(stock[0], run, 8)
    call(run, "adopt", "-y")
    assert [r.step for r in records(run) if r.current] == [6], "where the run is doesn't change by adopting"
    assert {r.step for r in records(run)} == {2, 4, 6, 8}


def test_a_secret_in_the_arguments_stays_out_of_the_manifest(tmp_path: Path) -> None:
    case = Case("secret", args={"hub_token": "hf_canary12345"})
    case.trainer(tmp_path / "run").train()
    call(tmp_path / "run", "adopt", "-y")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("lastgood.json"))
    assert b"canary" not in written
    assert b"learning_rate" in written
    assert "canary" not in call(tmp_path / "run", "show", "--args")


@pytest.mark.parametrize("verb", [("adopt", "-y"), ("prune", "--stock", "--keep-last", "1", "--now", "-y")])
def test_I2_what_stays_is_durable_before_it_gets_a_manifest_or_others_go(
    verb: tuple[str, ...], stock: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stock Trainer syncs nothing: its newest save may be gone after a power cut, and then the older one is too."""
    run = copied(stock[0], tmp_path / "run", 2, 4)
    newest = {path.stat().st_ino for path in (run / "checkpoint-4").iterdir()} | {(run / "checkpoint-4").stat().st_ino}
    synced: set[int] = set()
    early: list[str] = []
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

    def fsync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        originals["fsync"](handle)

    def moved(name: str) -> Any:
        def call(source: Any, target: Any) -> None:
            if str(target).endswith("checkpoint-4/lastgood.json") or str(source).endswith("checkpoint-2"):
                early.extend([] if newest <= synced else [f"{source} -> {target}"])
                early.append("seen")
            originals[name](source, target)

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, moved(name))
    call(run, *verb)
    assert early == ["seen"]


def test_only_what_is_named_is_read_for_an_adoption(stock: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The supervisor looks again and again while a Trainer writes gigabytes into the next one."""
    run = copied(stock[0], tmp_path / "run", 2, 4)
    shutil.copyfile(run / "checkpoint-2/model.safetensors", run / "checkpoint-4/optimizer.pt")  # would be a fault
    chains, skipped = candidates(look(run), {"checkpoint-2"})
    assert [item.path.name for chain in chains for item in chain.items] == ["checkpoint-2"]
    assert skipped == []
