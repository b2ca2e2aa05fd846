"""The doctor itself: logs taken apart, rules chosen and merged, the command, and what --fix does and doesn't do."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lastgood
from lastgood.doctor.diagnose import case_of, diagnose, examine
from lastgood.doctor.disk import Disk
from lastgood.doctor.fix import execute, steps
from lastgood.doctor.log import read
from lastgood.doctor.rules import GROUPS, RULES
from lastgood.errors import NoRun, Refused, UsageError
from lastgood.layouts import progress

import cli
from realruns import RUNS
from sick import codes, the

Real = Callable[[str], Path]
HERE = Path(__file__).parent

MISMATCH = "ValueError: --load_best_model_at_end requires the save and eval strategy to match, but found"
TRACEBACK = f'Traceback (most recent call last):\n  File "t.py", line 1, in <module>\n    main()\n{MISMATCH}\n'


# ---- logs ------------------------------------------------------------------------------------


def test_the_last_exception_counts() -> None:
    log = read(
        "step 1\n" + TRACEBACK + '\nTraceback (most recent call last):\n  File "x.py", line 7, in go\nEOFError\n'
    )
    assert [raised.kind for raised in log.raised] == ["EOFError", "ValueError"]
    assert log.raised[0].passed("go") and not log.raised[1].passed("go")


@pytest.mark.parametrize(
    "dressed",
    [
        "".join(f"[rank0]: {line}\n" for line in TRACEBACK.splitlines()),
        "".join(f"(train_fn pid=71, ip=10.0.0.1) {line}\n" for line in TRACEBACK.splitlines()),
        "\r 10%|#   | 1/10\r 20%|##  | 2/10\n" + TRACEBACK.replace("\n", "\r\n"),
        "\r  0%|          | 0/8 [00:00<?, ?it/s]" + TRACEBACK + "\r  0%|          | 0/8 [00:00<?, ?it/s]\n",
        TRACEBACK.replace("ValueError:", "\x1b[31mValueError\x1b[0m:"),
        TRACEBACK + "Traceback (most recent call last):\n  File \"run.py\", line 9, in run\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\ntrain.py FAILED\n",
        "Traceback (most recent call last):\n  File \"a.py\", line 1, in f\nKeyError: 'x'\n\n"
        f"During handling of the above exception, another exception occurred:\n\n{TRACEBACK}",
        MISMATCH,
        TRACEBACK.encode() + b"\xff\xfe not text",
    ],
    ids=["torchrun", "ray", "progress", "behind a bar", "colour", "launcher", "chain", "one line", "bytes"],
)  # fmt: skip
def test_a_traceback_is_found_in_any_dress(dressed: str | bytes) -> None:
    assert codes(log=dressed) == ["CKB001"]


def test_what_is_only_said_in_passing_is_not_an_exception() -> None:
    assert codes(log=f"reading the manual: {MISMATCH}\n" + TRACEBACK.replace(MISMATCH, "ZeroDivisionError: 1/0")) == []


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300) | st.binary(max_size=300))
def test_any_text_is_a_log(text: str | bytes) -> None:
    diagnose(log=text)


@pytest.mark.parametrize(
    "text",
    ["x" * (9 << 20), "Traceback (most recent call last):\n" * 30_000, "a: [" * 200_000, "Error " * 300_000,
     "missing keys " * 100_000, "size mismatch for " * 100_000],
    ids=["a long line", "many tracebacks", "brackets", "words", "missing", "mismatch"],
)  # fmt: skip
def test_a_hostile_log_takes_no_time(text: str) -> None:
    started = time.process_time()
    diagnose(log=text)
    assert time.process_time() - started < 20  # a pattern that takes the square of its text would need hours


# ---- rules -----------------------------------------------------------------------------------


def test_every_rule_says_everything() -> None:
    wanted = {"CKR": 15, "CKC": 11, "CKV": 13, "CKP": 11, "CKD": 11, "CKL": 7, "CKS": 8, "CKB": 10}
    for letters, count in wanted.items():
        there = [rule.code for rule in GROUPS[letters][1]]
        assert there[:count] == [f"{letters}{n:03}" for n in range(1, count + 1)]
        assert there == sorted(set(there))
    for rule in RULES:
        assert rule.title and not rule.title.endswith(".") and rule.means and rule.cause, rule.code
        assert rule.fix and rule.source, rule.code
        assert rule.message or rule.warning or rule.run or rule.arguments, rule.code
        assert all(any(other.code == code for other in RULES) for code in rule.over), rule.code
        re.compile(rule.message), re.compile(rule.warning)


def test_every_rule_has_a_test_of_its_own() -> None:
    files = [file.read_text() for file in HERE.glob("test_doctor*.py")]
    names = [name for text in files for name in re.findall(r"def (test_\w+)", text)]
    tested = {code for name in names for code in re.findall(r"CK[A-Z]\d{3}", name)}
    assert {rule.code for rule in RULES} - tested == set()


def test_the_commands_of_every_fix_exist() -> None:
    from lastgood.cli.main import ALIASES, MODULES

    lines = [line for rule in RULES for line in rule.fix]
    verbs = {verb for line in lines for verb in re.findall(r"\blastgood (?:-C \S+ )?([a-z]+)", line)}
    assert verbs <= {*MODULES, *ALIASES}, verbs - {*MODULES, *ALIASES}
    for line in lines:
        words = shlex.split(line, comments=True) if line.startswith("lastgood ") else []
        assert not any(word.endswith((":", ",")) for word in words), f"pasted into a shell this fails: {line}"


def test_a_command_can_be_pasted_whatever_the_directory_is_called(real: Real, tmp_path: Path) -> None:
    root = tmp_path / "my run's; ls (good)"
    shutil.copytree(real("trainer_full"), root)
    (root / "checkpoint-6" / "trainer_state.json").write_text("")
    (root / "checkpoint-4" / "model.safetensors").write_bytes(b"x")
    aged(root)
    lines = {line for f in diagnose(root) for line in f.fix if line.startswith("lastgood ")}
    assert len(lines) >= 2
    for line in lines:
        assert str(root) in shlex.split(line, comments=True), line
        assert cli.run(*shlex.split(line, comments=True)[1:]).code in (0, 1), line


@pytest.mark.parametrize("kind", sorted(RUNS))
def test_healthy_runs_have_no_findings(kind: str, real: Real) -> None:
    root = real(kind)
    assert [f"{f.code} {f.saw}" for f in diagnose(root)] == []
    assert [f"{f.code} {f.saw}" for f in diagnose(root, full=True)] == []


def test_healthy_managed_runs_have_no_findings(tmp_path: Path) -> None:
    root = cli.managed(tmp_path / "run")
    assert [f"{f.code} {f.saw}" for f in diagnose(root, full=True)] == []


def test_select_and_ignore() -> None:
    assert codes(log=TRACEBACK, select=["ckb"]) == ["CKB001"] and codes(log=TRACEBACK, select=["CKR"]) == []
    assert codes(log=TRACEBACK, ignore=["CKB001"]) == []
    with pytest.raises(UsageError, match="no rule begins with 'XYZ'"):
        codes(log=TRACEBACK, select=["XYZ"])


def test_nothing_and_nonsense() -> None:
    with pytest.raises(UsageError, match="nothing to look at"):
        lastgood.diagnose()
    with pytest.raises(UsageError, match="not training arguments"):
        lastgood.diagnose(args=7)
    with pytest.raises(UsageError, match="save_steps must be a number"):
        lastgood.diagnose(args={"save_steps": "often"})
    with pytest.raises(UsageError, match="log must be"):
        lastgood.diagnose(log=7)


def test_arguments_from_files(tmp_path: Path, real: Real) -> None:
    wrong: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 1}
    (tmp_path / "a.json").write_text(json.dumps(wrong))
    (tmp_path / "a.yaml").write_text("model: x\ntraining:\n  save_strategy: epoch\n  num_train_epochs: 1\n")
    assert codes(args=tmp_path / "a.json") == codes(args=str(tmp_path / "a.yaml")) == codes(args=wrong) == ["CKB007"]
    assert codes(args=real("trainer_full") / "checkpoint-6" / "training_args.bin") == []
    for name, text in (("b.json", "{"), ("b.yaml", "a: [\n"), ("c.json", "[1]"), ("d.yaml", "!!python/object:os.x {}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=name):
            codes(args=tmp_path / name)
    with pytest.raises(UsageError, match=r"can't be read"):
        codes(args=tmp_path / "none.json")


# ---- the command -----------------------------------------------------------------------------


def test_the_command_on_a_healthy_run(real: Real) -> None:
    result = cli.call("doctor", real("trainer_full"))
    assert result.code == 0 and "healthy" in result.out and "checkpoint-6" in result.out
    with pytest.raises(AssertionError):
        the("CKB001", log="")


def test_a_log_in_a_pipe_is_shown_and_examined(tmp_path: Path) -> None:
    for word in (["-"], ["--log", "-"]):
        child = subprocess.run(
            [sys.executable, "-m", "lastgood", "doctor", *word], input=TRACEBACK.encode(), capture_output=True,
            cwd=tmp_path, env=cli.environment(), check=False,
        )  # fmt: skip
        assert child.returncode == 1 and child.stdout.decode().startswith(TRACEBACK), child
        assert b"CKB001 error" in child.stdout
    child = subprocess.run(
        [sys.executable, "-m", "lastgood", "doctor", "-", "--json"], input=TRACEBACK.encode(), capture_output=True,
        cwd=tmp_path, env=cli.environment(), check=False,
    )  # fmt: skip
    assert json.loads(child.stdout)["findings"][0]["code"] == "CKB001" and child.stderr.decode() == TRACEBACK


def test_the_log_and_the_run_in_any_order(real: Real) -> None:
    root = real("trainer_full")
    for words in (("-", root), (root, "-"), ("-C", root, "-"), (root, "--log", "-")):
        result = cli.call("doctor", *words, input=TRACEBACK)
        assert result.code == 1 and "in 3 checkpoints in" in result.out and "CKB001 error" in result.out, words
    assert cli.call("doctor", "-", root, "more", input=TRACEBACK).code == 2


def test_an_error_that_no_rule_knows_is_not_health() -> None:
    unknown = cli.call("doctor", "-", input=TRACEBACK.replace(MISMATCH, "ZeroDivisionError: 1/0"))
    assert unknown.code == 0 and "healthy" not in unknown.out
    assert unknown.out.endswith("no rule knows the log's last error: ZeroDivisionError: 1/0\n")
    empty = cli.call("doctor", "-", input="")
    assert "healthy" not in empty.out and "2>&1" in empty.out


def test_the_run_that_a_log_speaks_of_is_looked_at(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    (root / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    log = f"Resuming from {root}/checkpoint-6.\n{TRACEBACK.replace(MISMATCH, 'EOFError')}"
    (tmp_path / "log").write_text(log)
    (tmp_path / "elsewhere").mkdir()
    child = subprocess.run(
        [sys.executable, "-m", "lastgood", "doctor", "--log", str(tmp_path / "log"), "--json"], capture_output=True,
        cwd=tmp_path / "elsewhere", env=cli.environment(), check=False,
    )  # fmt: skip
    assert json.loads(child.stdout)["run"] == str(root), child


def test_wrong_calls(tmp_path: Path, real: Real) -> None:
    root = real("trainer_full")
    for words, code in (
        (("doctor", tmp_path / "nothing"), 10),
        (("doctor", root, "more"), 2),
        (("doctor", root, "--log", tmp_path / "none"), 2),
        (("doctor", root, "--select", "ZZZ"), 2),
        (("doctor", root, "--prove", "4"), 2),
        (("doctor", "--fix", "--args", root / "checkpoint-6" / "training_args.bin", "-C", root), 0),
    ):
        result = cli.call(*words)
        assert result.code == code, (words, result)


def test_the_rules_are_listed_and_explained() -> None:
    everything = cli.call("doctor", "--rules").out
    assert all(rule.code in everything for rule in RULES)
    one = cli.call("doctor", "--rules", "--select", "CKB004").out
    assert "cause" in one and "CKB005" not in one
    assert len(json.loads(cli.call("doctor", "--rules", "--json").out)["rules"]) == len(RULES)


# ---- --fix -----------------------------------------------------------------------------------


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def aged(root: Path) -> Path:
    """As if nothing had been written for an hour."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (time.time() - 3600,) * 2, follow_symlinks=False)
    return root


def test_fix_puts_husks_aside_and_deletes_nothing(real: Real) -> None:
    root = real("trainer_full")
    (root / "checkpoint-6" / "trainer_state.json").unlink()
    before = tree(root)
    fresh = cli.call("doctor", root, "--fix")
    assert fresh.code == 0 and "CKR003 info" in fresh.out and tree(root) == before  # it may be being written
    assert "checkpoint-6 to .lastgood/quarantine: not done, it was written to lately" in fresh.err
    aged(root)
    result = cli.call("doctor", root, "--fix")
    assert result.code == 1 and "fixed" in result.err, result
    assert not (root / "checkpoint-6").exists()
    after = tree(root)
    moved = {
        name.replace("checkpoint-6/", ""): data for name, data in before.items() if name.startswith("checkpoint-6/")
    }
    place = next((root / ".lastgood" / "quarantine").iterdir())
    assert tree(place) == moved
    kept = {name: data for name, data in before.items() if not name.startswith("checkpoint-6/")}
    assert kept.items() <= after.items()
    assert cli.call("doctor", root).code == 0
    assert cli.call("resume", root, "--print-path").out.strip().endswith("checkpoint-4")


def test_fix_waits_for_a_run_that_is_held(real: Real) -> None:
    from lastgood.repo.lock import RunLock

    root = real("trainer_full")
    (root / "checkpoint-6" / "trainer_state.json").unlink()
    aged(root)
    with RunLock(root):
        assert cli.call("doctor", root, "--fix").code == 11
    assert (root / "checkpoint-6").exists()


def test_fix_leaves_links_and_pinned_ones_alone(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    shutil.move(root / "checkpoint-6", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "trainer_state.json").unlink()
    (root / "checkpoint-6").symlink_to(tmp_path / "elsewhere")
    aged(root)
    before = tree(tmp_path / "elsewhere")
    cli.call("doctor", root, "--fix")
    assert (root / "checkpoint-6").is_symlink() and tree(tmp_path / "elsewhere") == before


def test_what_stops_fix_does_not_swallow_the_findings(real: Real) -> None:
    root = real("trainer_full")
    (root / "checkpoint-6" / "trainer_state.json").unlink()
    aged(root)
    (root / ".lastgood").write_text("in the way")
    result = cli.call("doctor", root, "--fix")
    assert "CKR003 error" in result.out and "--fix stopped" in result.err and result.code == 1, result
    assert (root / "checkpoint-6").is_dir()
    lines = json.loads(cli.call("doctor", root, "--fix", "--json").out)
    assert lines["findings"][0]["code"] == "CKR003" and lines["fixed"] == []


@pytest.mark.parametrize("place", [".lastgood", ".lastgood/quarantine"])
def test_fix_moves_nothing_out_of_the_run_by_a_link(place: str, real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    (root / "checkpoint-6" / "trainer_state.json").unlink()
    aged(root)
    (tmp_path / "outside").mkdir()
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to(tmp_path / "outside")
    result = cli.call("doctor", root, "--fix")
    assert result.code == 1 and "not done" in result.err and "link" in result.err, result
    assert (root / "checkpoint-6").is_dir() and list((tmp_path / "outside").iterdir()) == []


def test_a_thousand_checkpoints_need_no_torch(real: Real, tmp_path: Path) -> None:
    root = tmp_path / "many"
    source = real("trainer_full") / "checkpoint-2"
    for step in range(1, 201):
        home = root / f"checkpoint-{step}"
        shutil.copytree(source, home, copy_function=os.link)
        (home / "trainer_state.json").unlink()
        state = json.loads((source / "trainer_state.json").read_text())
        (home / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    code = (
        "import sys, lastgood; found = lastgood.diagnose(sys.argv[1]); print(len(found), 'torch' in sys.modules,"
        " 'numpy' in sys.modules)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, env=cli.environment(), check=True
    )
    assert child.stdout.split() == ["0", "False", "False"], child.stdout


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(NoRun):
        diagnose(tmp_path / "nothing")


@pytest.mark.parametrize("loss", [1.5, float("nan")])
def test_a_log_with_numbers_that_are_none_is_outlined_the_same(loss: float, tmp_path: Path) -> None:
    rows = [{"loss": loss, "step": step} for step in range(1, 4)]
    state = {"epoch": 1.0, "global_step": 3, "log_history": rows, "max_steps": 9, "stateful_callbacks": {"a": [[1]]}}
    for name, log in (("whole", rows), ("begun", rows[:2])):
        (tmp_path / name).mkdir()
        text = json.dumps({**state, "global_step": len(log), "log_history": log}, indent=2, sort_keys=True)
        (tmp_path / name / "trainer_state.json").write_text(text + "\n")
    step, seen, problems = progress.glance(tmp_path / "whole" / "trainer_state.json")
    assert (step, json.dumps(seen), problems) == (3, json.dumps(rows), [])
    assert progress.one_run(tmp_path / "whole", [tmp_path / "begun"])
    assert not progress.one_run(tmp_path / "begun", [tmp_path / "whole"])


@pytest.mark.parametrize("kind", ["trainer_full", "trainer_peft", "fsdp_trainer", "dcp_run"])
def test_a_save_under_way_is_no_alarm(kind: str, real: Real) -> None:
    root = aged(real(kind))
    newest = max((p for p in root.iterdir() if p.name[-1].isdigit()), key=lambda p: int(p.name.rpartition("-")[2]))
    whole = {p: p.read_bytes() for p in sorted(newest.rglob("*")) if p.is_file()}
    for path in whole:
        path.unlink()
    last = ("trainer_state.json", ".metadata")  # as they are written
    for path in sorted(whole, key=lambda p: p.name in last):
        for data in (whole[path][: len(whole[path]) // 2], whole[path]):
            path.write_bytes(data)
            alarms = [f"{f.code} {f.saw}" for f in diagnose(root) if f.severity in ("error", "warning")]
            assert alarms == [], path.name


def test_fix_changes_nothing_that_is_another_than_when_it_was_planned(real: Real) -> None:
    """A stock Trainer holds no lock: its save may be done between the look and the deed."""
    root = real("trainer_full")
    state = (root / "checkpoint-6" / "trainer_state.json").read_bytes()
    (root / "checkpoint-6" / "trainer_state.json").unlink()
    disk = Disk(aged(root))
    todo = steps(disk, examine(case_of(disk, None, None)))
    assert [step.why_not for step in todo] == [""]
    (root / "checkpoint-6" / "trainer_state.json").write_bytes(state)
    before = tree(aged(root))
    with pytest.raises(Refused, match="another state now"):
        list(execute(disk, todo))
    assert {name: data for name, data in tree(root).items() if not name.startswith(".lastgood/")} == before


def test_the_log_of_a_crash_says_nothing_about_who_is_writing_now(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    (root / "checkpoint-6" / "trainer_state.json").unlink()
    (tmp_path / "log").write_text(TRACEBACK.replace(MISMATCH, "ZeroDivisionError: 1/0"))
    result = cli.call("doctor", root, "--log", tmp_path / "log", "--fix")
    assert "written to lately" in result.err and (root / "checkpoint-6").exists(), result
    piped = cli.run("doctor", "-", "-C", root, "--fix", input=(tmp_path / "log").read_text())
    assert "written to lately" in piped.err and (root / "checkpoint-6").exists(), piped  # of before it was read


def test_a_pipe_that_ends_says_that_its_writer_is_gone(real: Real, tmp_path: Path) -> None:
    root = real("trainer_full")
    script = tmp_path / "dies.py"
    script.write_text(
        "import pathlib, sys, time\nsys.stdout.write('saving\\n')\nsys.stdout.flush()\ntime.sleep(3)\n"
        f"pathlib.Path({str(root / 'checkpoint-6')!r}, 'trainer_state.json').unlink()\n1 / 0\n"
    )
    command = f"{sys.executable} {script} 2>&1 | {sys.executable} -m lastgood -C {root} doctor - --fix"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=cli.environment(), check=False)
    assert "fixed" in done.stderr and not (root / "checkpoint-6").exists(), done
