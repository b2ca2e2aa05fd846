"""A damaged checkpoint is found before anything is restored, is named, and the next good one is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lastgood
from lastgood.errors import CorruptCheckpoint

import forked
from training import Case, train

CASES = {"full": Case("full", args={"max_steps": 6}), "lora": Case("lora", lora=True, args={"max_steps": 6})}


@pytest.fixture(scope="module", params=list(CASES))
def run(request: Any, tmp_path_factory: Any) -> tuple[Case, Path, dict[str, Any]]:
    """A finished run of 6 steps with checkpoints 2, 4 and 6, to be copied and damaged."""
    case, base = CASES[request.param], tmp_path_factory.mktemp(request.param)
    assert forked.run(train, case, base / "run", base / "result.json", log=base / "log") == 0, (
        base / "log"
    ).read_text()
    return case, base / "run", json.loads((base / "result.json").read_text())


def truncate(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(data)


def zero(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(len(data[middle : middle + 64]))
    path.write_bytes(data)


def replaced_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replaced_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": truncate(0),
    "cut at 30 %": truncate(0.3),
    "cut at 95 %": truncate(0.95),
    "one bit flipped": flip,
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a link": replaced_by_link,
    "a directory": replaced_by_directory,
}
PARTS = ["weights", "optimizer.safetensors", "resume.json", "trainer_state.json", "tensors.json", "lastgood.json"]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("part", PARTS)
def test_I7_I8_damage_is_found_named_and_passed_over(
    run: tuple[Case, Path, dict[str, Any]], part: str, kind: str, tmp_path: Path
) -> None:
    case, source, expected = run
    weights = "adapter_model.safetensors" if case.lora else "model.safetensors"
    name = weights if part == "weights" else part
    shutil.copytree(source, tmp_path / "run", symlinks=True)
    DAMAGE[kind](tmp_path / "run" / "checkpoint-6" / name)
    again = resumed(case, tmp_path / "run", tmp_path)
    if part == "lastgood.json" and kind == "missing":
        assert again["step"] == 6 and again["from"] == 4, "without its manifest it is not a checkpoint of ours"
    else:
        assert again["from"] == 4, again
        assert any(
            skipped == "checkpoint-6" and (name in why or "lastgood.json" in why) for skipped, why in again["skipped"]
        )
    assert again["weights"] == expected["weights"]
    assert again["losses"] == expected["losses"]


def resumed(case: Case, out: Path, where: Path) -> dict[str, Any]:
    result = where / "again.json"
    assert forked.run(resume, case, out, result, log=where / "log") == 0, (where / "log").read_text()
    return json.loads(result.read_text())  # type: ignore[no-any-return]


def resume(case: Case, out: Path, result: Path) -> None:
    from training import outcome

    trainer = lastgood.manage(case.trainer(out))
    trainer.train(resume_from_checkpoint="auto")
    report = trainer.resume_report  # type: ignore[attr-defined]
    found = {**outcome(trainer), "from": report.step, "skipped": report.skipped}
    result.write_text(json.dumps(found))


@pytest.mark.parametrize("kind", ["an empty directory", "another run's", "newer format", "weights of another step"])
def test_I7_I11_a_higher_number_alone_is_no_reason(
    run: tuple[Case, Path, dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    case, source, expected = run
    shutil.copytree(source, tmp_path / "run")
    out = tmp_path / "run"
    if kind == "an empty directory":
        (out / "checkpoint-100").mkdir()
    elif kind == "another run's":
        shutil.copytree(out / "checkpoint-2", out / "checkpoint-1000")
        text = (out / "checkpoint-1000" / "lastgood.json").read_text()
        run_id = json.loads(text)["run"]
        rewrite(out / "checkpoint-1000" / "lastgood.json", run="f" * len(run_id), step=1000)
    elif kind == "newer format":
        shutil.copytree(out / "checkpoint-2", out / "checkpoint-1000")
        rewrite(out / "checkpoint-1000" / "lastgood.json", format=99)
    else:
        name = "adapter_model.safetensors" if case.lora else "model.safetensors"
        shutil.copy(out / "checkpoint-4" / name, out / "checkpoint-6" / name)
    again = resumed(case, out, tmp_path)
    assert again["from"] == (4 if kind == "weights of another step" else 6)
    assert again["weights"] == expected["weights"]
    assert (
        kind == "weights of another step"
        or (out / ("checkpoint-100" if "empty" in kind else "checkpoint-1000")).is_dir()
    )


def rewrite(path: Path, **changes: Any) -> None:
    """A manifest with other values and a digest that fits."""
    from blake3 import blake3

    fields = {**json.loads(path.read_text()), **changes}
    fields.pop("digest")
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**fields, "digest": blake3(canonical.encode()).hexdigest()}))


def test_I1_all_damaged_is_an_error_and_not_a_fresh_start(
    run: tuple[Case, Path, dict[str, Any]], tmp_path: Path
) -> None:
    case, source, _ = run
    shutil.copytree(source, tmp_path / "run")
    for step in (2, 4, 6):
        flip(tmp_path / "run" / f"checkpoint-{step}" / "resume.json")
    trainer = lastgood.manage(case.trainer(tmp_path / "run"))
    with pytest.raises(lastgood.NoCheckpoint, match=r"checkpoint-2.*hash differs"):
        trainer.train(resume_from_checkpoint="auto")


def test_a_damaged_checkpoint_asked_for_by_path_is_refused(
    run: tuple[Case, Path, dict[str, Any]], tmp_path: Path
) -> None:
    case, source, _ = run
    shutil.copytree(source, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoint-4" / "resume.json")
    for value in (str(tmp_path / "run" / "checkpoint-4"), 4):
        with pytest.raises((CorruptCheckpoint, lastgood.NoCheckpoint), match=r"resume\.json"):
            lastgood.manage(case.trainer(tmp_path / "run")).train(resume_from_checkpoint=value)
