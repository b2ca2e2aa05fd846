"""The command line as people and scripts use it: what every verb says, changes and ends with."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lastgood.errors import UsageError
from lastgood.repo import pins
from lastgood.repo.read import records

import cli
from cli import call, checkpoints, hashes, snapshot

Real = Callable[[str], Path]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """200, 400 (the best) and 600 (the newest), managed."""
    return cli.managed(tmp_path / "run")


@pytest.fixture
def stock(real: Real) -> Path:
    """2, 4 and 6 (the newest and the best) of a Trainer that knew nothing of lastgood."""
    return real("trainer_full")


def said(code: int, *words: Any, **how: Any) -> str:
    """stdout of a call that has to end with this exit code; stderr behind it."""
    found, out, err = call(*words, **how)
    assert found == code, (words, found, out, err)
    assert "Traceback" not in err
    assert code in (0, 1) or "rror: " in err, err
    return out + err


def listed(root: Path, *words: str) -> list[dict[str, Any]]:
    content = json.loads(said(0, "-C", root, "log", "--json", *words))
    assert content["schema"] == "lastgood.log/1"
    return list(content["checkpoints"])


def steps(root: Path, state: str = "full") -> list[int]:
    return [row["step"] for row in listed(root) if row["state"] == state]


# ---- what is seen ------------------------------------------------------------------------


def test_log(root: Path, stock: Path) -> None:
    out = said(0, "-C", root, "log")
    rows = [line.split() for line in out.splitlines()[2:5]]
    assert [row[0] for row in rows] == ["600", "400", "200"]
    assert "latest" in rows[0] and "best" not in rows[0] and "best" in rows[1]
    assert "* best eval_loss (lower is better)" in out
    assert [(r["step"], r["eval"], r["best"], r["state"]) for r in listed(root)] == [
        (600, 1.2, False, "full"), (400, 1.1, True, "full"), (200, 1.5, False, "full"),
    ]  # fmt: skip
    assert [(r["step"], r["best"], r["layout"]) for r in listed(stock)] == [
        (6, True, "trainer"), (4, False, "trainer"), (2, False, "trainer"),
    ]  # fmt: skip
    assert [r["step"] for r in listed(root, "-n", "2")] == [600, 400]
    assert [r["step"] for r in listed(root, "--sort", "eval")] == [400, 600, 200]
    assert [r["step"] for r in listed(root, "--sort", "-step")] == [600, 400, 200]
    said(2, "-C", root, "log", "--sort", "nothing")
    said(2, "-C", root, "log", "-o", "step,nothing")
    said(2, "-C", root, "log", "-n", "0")


def test_the_options_of_every_listing(root: Path) -> None:
    assert said(0, "-C", root, "log", "-H", "-o", "step,eval,size") == "".join(
        f"{row['step']}\t{row['eval']!r}\t{row['size']}\n" for row in listed(root)
    )
    size = listed(root)[0]["size"]
    assert f" {size} " in said(0, "-C", root, "log", "--bytes") + " "
    assert f"{size / 1000:.1f} kB" in said(0, "-C", root, "log", "--si")
    assert f"{size / 1024:.1f} KiB" in said(0, "-C", root, "log")
    for verb, schema, key in (("df", "df", "kinds"), ("du", "du", "checkpoints"), ("verify", "verify", "checkpoints"),
                              ("show", "show", "checkpoint"), ("resume", "resume", "checkpoint")):  # fmt: skip
        content = json.loads(said(0, "-C", root, verb, "--json"))
        assert content["schema"] == f"lastgood.{schema}/1" and content[key]
    content = json.loads(said(0, "-C", root, "diff", "200", "400", "--json"))
    assert content["schema"] == "lastgood.diff/1"
    content = json.loads(call("-C", root, "prune", "--keep-last", "1", "-n", "--json")[1])
    assert content["schema"] == "lastgood.prune/1"
    assert {d["step"]: d["action"] for d in content["decisions"]} == {200: "delete", 400: "keep", 600: "keep"}


@pytest.mark.parametrize("words", [("log",), ("log", "--graph"), ("log", "--all")])
def test_a_narrow_terminal(words: tuple[str, ...], tmp_path: Path) -> None:
    root = cli.branched(tmp_path / ("a-run-with-a-long-name" * 3))
    said(0, "-C", root, "tag", "a-very-long-tag-that-says-a-lot", "400")
    for wide in (40, 60, 100):
        lines = said(0, "-C", root, *words, env={"COLUMNS": str(wide)}).splitlines()
        assert max(map(len, lines)) <= wide
        assert [line for line in lines if "600" in line] and [line for line in lines if "200" in line]


def test_no_colour_in_a_pipe(root: Path) -> None:
    for words in (
        ("log",),
        ("show",),
        ("verify",),
        ("resume",),
        ("prune", "--keep-last", "1", "-n"),
        ("diff", "2~0", "400"),
    ):
        assert "\x1b" not in "".join(map(str, cli.run("-C", root, *words)[1:]))


def test_branches(tmp_path: Path) -> None:
    root = cli.branched(tmp_path / "run")
    out = said(0, "-C", root, "log", "--graph")
    assert re.search(r"^\*.* 600 .*on a branch that was left", out, re.M)
    assert "latest" in next(line for line in out.splitlines() if " 500 " in line)
    assert said(0, "-C", root, "resume", "--print-path").strip() == str(root / "checkpoint-500")
    said(0, "-C", root, "prune", "--keep-last", "9", "--abandoned", "--yes")
    assert steps(root) == [500, 400, 200]
    assert "600" in said(0, "-C", root, "log", "--all")


def test_show(root: Path, stock: Path) -> None:
    out = said(0, "-C", root, "show", "400")
    assert "checkpoint-400" in out and "eval_loss=1.1" in out and "model.safetensors" in out and "max_steps" in out
    assert "layer.w" in said(0, "-C", root, "show", "400", "--tensors") and "U8" in said(
        0, "-C", root, "show", "--tensors"
    )
    assert re.search(r"seed +400", said(0, "-C", root, "show", "400", "--args"))
    assert "best" in said(0, "-C", root, "show", "400", "--why")
    content = json.loads(said(0, "-C", stock, "show", "4", "--json"))
    assert content["checkpoint"]["arguments"]["learning_rate"] == 0.01
    weights = {t["name"]: t["shape"] for t in content["tensors"] if t["file"] == "model.safetensors"}
    assert weights["transformer.wte.weight"] == [64, 16]
    said(3, "-C", root, "show", "500")


def test_diff(root: Path, stock: Path) -> None:
    out = said(0, "-C", root, "diff", "200", "400")
    assert "seed  200 -> 400" in out and "eval_loss  1.5 -> 1.1 (-26.7 %)" in out
    said(1, "-C", root, "diff", "200", "400", "--exit-code")
    said(0, "-C", root, "diff", "400", "400", "--exit-code")
    content = json.loads(said(0, "-C", stock, "diff", "2", "4", "--values", "--json"))
    import torch
    from safetensors.torch import load_file

    old, new = (load_file(stock / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    groups = {row["group"]: row for row in content["values"]["groups"]}
    assert content["values"]["changed"] == sum(not torch.equal(old[n], new[n]) for n in old)
    name = next(g for g in groups if "wte" in g or "embed" in g)
    change = (new["transformer.wte.weight"].double() - old["transformer.wte.weight"].double()).norm()
    expected = change / old["transformer.wte.weight"].double().norm()
    assert groups[name]["relative"] == pytest.approx(expected.item(), rel=1e-6)


def test_df_and_du(root: Path, stock: Path) -> None:
    rows = {row["kind"]: row for row in json.loads(said(0, "-C", root, "df", "--json"))["kinds"]}
    size = sum(row["size"] for row in listed(root))
    assert rows["full"]["count"] == 3 and rows["full"]["logical"] >= size
    said(0, "-C", root, "prune", "--keep-last", "1", "--yes")
    rows = {row["kind"]: row for row in json.loads(said(0, "-C", root, "df", "--json"))["kinds"]}
    assert rows["full"]["count"] == 2 and rows["trash"]["reclaimable"] > 0
    rows = json.loads(said(0, "-C", stock, "du", "--json"))["checkpoints"]
    assert {row["name"] for row in rows} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert all(row["total"] == sum(v for k, v in row.items() if k not in ("total", "name", "state")) for row in rows)


def test_verify_and_resume(root: Path, stock: Path) -> None:
    assert said(0, "-C", root, "verify", "--full").count("every hash") == 3
    assert said(0, "-C", stock, "verify", "--full").count("structure and checksums") == 3
    for run, newest, older in ((root, 600, 400), (stock, 6, 4)):
        assert said(0, "-C", run, "resume", "--print-path").strip() == str(run / f"checkpoint-{newest}")
        cli.flip(run / f"checkpoint-{newest}" / ("optimizer.safetensors" if run is root else "optimizer.pt"))
        out = said(1, "-C", run, "verify", "--full")
        assert f"checkpoint-{newest}  DAMAGED" in out and "optimizer" in out and "1 of 3" in out
        out = said(0, "-C", run, "resume", "--check")
        assert re.search(rf"checkpoint-{newest} +PASSED OVER", out) and re.search(rf"checkpoint-{older} +OK", out)
        for path in run.glob("checkpoint-*"):
            (path / "model.safetensors").unlink()
        said(3, "-C", run, "resume")
        assert call("-C", run, "resume", "--json")[0] == 3
    said(2, "-C", root, "verify", "--subset", "1/2")
    said(2, "-C", root, "verify", "--full", "--subset", "3/2")


def test_the_shares_of_a_scrub_are_everything(root: Path) -> None:
    cli.flip(root / "checkpoint-600" / "model.safetensors")
    codes = [call("-C", root, "verify", "--full", "--subset", f"{part}/5")[0] for part in range(1, 6)]
    assert sorted(codes) == [0, 0, 0, 0, 1]


# ---- which run, which checkpoint ---------------------------------------------------------


def test_where_the_run_is(root: Path, stock: Path, tmp_path: Path) -> None:
    title = "run run "
    (root / "deep" / "er").mkdir(parents=True)
    for words, how in (
        (("-C", root, "log"), {}), (("log", "-C", root), {}), (("log", root), {}), (("log",), {"cwd": root}),
        (("log",), {"cwd": root / "deep" / "er"}), (("log",), {"env": {"LASTGOOD_RUN": str(root)}}),
        (("log", "."), {"cwd": root}), (("log", "run"), {"cwd": tmp_path}), (("log", root / "checkpoint-400"), {}),
        (("-C", root / "checkpoint-400", "log"), {}), (("-C", root, "log"), {"env": {"LASTGOOD_RUN": str(stock)}}),
    ):  # fmt: skip
        assert said(0, *words, **how).startswith(title), (words, how)
    for path in (root / "checkpoint-400", root / "checkpoint-400/"):
        assert "checkpoint-400" in said(0, "show", path)
    assert "checkpoint-400" in said(0, "show", "./checkpoint-400", cwd=root)
    (tmp_path / "empty").mkdir()
    said(10, "log", cwd=tmp_path / "empty")
    said(10, "-C", tmp_path / "empty", "log")
    said(10, "-C", tmp_path / "nothing", "log")
    said(10, "log", env={"LASTGOOD_RUN": str(tmp_path / "nothing")})
    code, out, err = cli.run("log", cwd=tmp_path / "empty")
    assert (code, out) == (10, "") and err.startswith("error: no run here") and "help: " in err


@pytest.mark.parametrize("verb", ["log", "df", "du", "resume", "watch", "adopt", "prune"])
def test_a_directory_that_does_not_exist_is_not_the_run_that_is_here(verb: str, root: Path) -> None:
    more = {"prune": ("--keep-last", "1", "--yes"), "adopt": ("--yes",)}.get(verb, ())
    before = snapshot(root)
    for word in ("ouptut", "../ouptut", "./checkpoint-9"):
        assert "doesn't exist" in said(10, verb, word, *more, cwd=root)
    said(2, "-C", root, verb, root, *more)
    assert snapshot(root) == before


def test_revisions(root: Path) -> None:
    said(0, "-C", root, "tag", "release/1.0", "200")
    said(0, "-C", root, "record", "200", "f1=0.9")
    said(0, "-C", root, "record", "400", "f1=0.5", "odd_quantity=3")
    by_step = {record.step: record for record in records(root)}
    for word, step in {
        "latest": 600, "best": 400, "best:eval_loss": 400, "best:eval_loss:max": 200, "best:f1": 200, "best:f1:min": 400,
        "400": 400, "step:400": 400, "checkpoint-400": 400, "latest~1": 400, "latest~2": 200, "latest~": 400,
        "best~1": 200, "release/1.0": 200, by_step[200].id: 200, by_step[400].id[:5]: 400, "latest~0": 600,
        "best:odd_quantity:max": 400,
    }.items():  # fmt: skip
        content = json.loads(said(0, "-C", root, "show", word, "--json"))
        assert content["checkpoint"]["step"] == step, word
    assert "did you mean 400, 600, 200" in said(3, "-C", root, "show", "401")
    assert "did you mean release/1.0" in said(3, "-C", root, "show", "relese/1.0")
    said(3, "-C", root, "show", "latest~3")
    said(3, "-C", root, "show", "best:nothing:min")
    assert "lower or a higher" in said(2, "-C", root, "show", "best:odd_quantity")
    said(2, "-C", root, "show", "best:f1:sideways")


def test_an_ambiguous_revision(root: Path) -> None:
    for number, record in enumerate(records(root)):
        path = root / record.name
        data = (path / "lastgood.json").read_bytes().replace(record.id.encode(), f"abcd{number:012d}".encode())
        fields = json.loads(data)
        from blake3 import blake3

        fields.pop("digest")
        body = (json.dumps(fields, indent=1).removesuffix("\n}") + ",\n ").encode()
        (path / "lastgood.json").write_bytes(body + f'"digest": "{blake3(body).hexdigest()}"\n}}\n'.encode())
    out = said(2, "-C", root, "show", "abcd")
    assert "3 checkpoints" in out and "abcd000000000001" in out
    said(0, "-C", root, "show", "abcd000000000001")


def test_completion(root: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_LASTGOOD_COMPLETE" in said(0, "completion", shell)
    said(2, "completion", "tcsh")
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=said(0, "completion", "bash"), text=True, check=True)

    def completed(line: str, **more: Any) -> list[str]:
        words = line.split(" ")
        env = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_LASTGOOD_COMPLETE": "bash_complete"}
        code, out, err = cli.run(env=env, **more)
        assert (code, err) == (0, "")
        return [row.partition(",")[2] for row in out.splitlines() if row]

    said(0, "-C", root, "tag", "good-one", "400")
    assert {"latest", "best", "600", "400", "200", "good-one", "best:eval_loss"} <= set(
        completed("lastgood show ", cwd=root)
    )
    assert completed("lastgood show go", cwd=root) == ["good-one"]
    assert "600" in completed(f"lastgood -C {root} diff 2", cwd="/") + completed(f"lastgood -C {root} show 6", cwd="/")
    assert completed("lastgood show ", cwd="/") == []
    assert "verify" in completed("lastgood ver")


def test_wrong_usage(root: Path) -> None:
    assert "did you mean `lastgood log`" in said(2, "lgo")
    said(2, "-C", root, "log", "--nothing")
    said(2, "-C", root, "diff", "200")
    assert said(0, "--version").startswith("lastgood ")
    out = said(0, "--help")
    assert all(f"  {verb} " in out for verb in ("log", "verify", "prune", "tag", "checkout", "completion"))
    assert said(0, "-C", root, "ls") == said(0, "-C", root, "log")
    assert said(0, "-C", root, "fsck").count(" ok ") == 3


# ---- names -------------------------------------------------------------------------------


def test_pins_tags_and_notes(root: Path) -> None:
    for verb in (("pin", "200"), ("tag", "mine", "200")):
        said(0, "-C", root, *verb)
        assert "200" in said(0, "-C", root, "log")
        said(0, "-C", root, "prune", "--keep-last", "1", "--yes")
        assert 200 in steps(root)
        assert "held by" in said(6, "-C", root, "strip", "200", "--yes")
        said(0, "-C", root, *(("unpin", "200") if verb[0] == "pin" else ("untag", "mine")))
    said(2, "-C", root, "unpin", "200")
    said(3, "-C", root, "untag", "mine")
    said(0, "-C", root, "tag", "a", "200")
    assert said(0, "-C", root, "tag") == "a\tcheckpoint-200\n"
    assert "has the tag a already" in said(2, "-C", root, "tag", "a", "400")
    said(0, "-C", root, "tag", "a", "400", "--force")
    assert said(0, "-C", root, "tag") == "a\tcheckpoint-400\n"
    said(0, "-C", root, "note", "400", "the", "one", "for", "Ümlaut", "日本")
    assert said(0, "-C", root, "note", "400") == "the one for Ümlaut 日本\n"
    assert "日本" in said(0, "-C", root, "log", "-o", "step,note")
    said(0, "-C", root, "note", "400", "--clear")
    assert said(0, "-C", root, "note", "400") == "\n"
    said(0, "-C", root, "prune", "--keep-last", "1", "--yes")
    assert steps(root) == [600, 400]


def test_names_need_a_manifest(stock: Path) -> None:
    before = snapshot(stock)
    for words in (("pin", "4"), ("tag", "x", "4"), ("note", "4", "x"), ("record", "4", "a=1")):
        assert "lastgood adopt" in said(2, "-C", stock, *words)
    assert snapshot(stock) == before
    said(6, "-C", stock, "strip", "4", "--yes")


WORDS = st.text(st.sampled_from("ab1/.@{}~^:?*[\\ -_\x7f\tlockä\n"), min_size=1, max_size=12) | st.text(
    min_size=1, max_size=8
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(WORDS)
def test_what_git_refuses_as_a_name_is_refused(name: str) -> None:
    if "\0" in name or (not name.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in name)):
        return
    theirs = subprocess.run(["git", "check-ref-format", f"refs/tags/{name}"], check=False).returncode
    try:
        pins.check_name(name)
        ours = 0
    except UsageError:
        ours = 1
    assert ours >= theirs, name


def test_record_from_another_process_changes_the_best(root: Path) -> None:
    code, _, err = cli.run("-C", root, "record", "200", "eval_loss=0.9", "mmlu=0.61")
    assert code == 0 and "mmlu=0.61" in err
    assert [row["step"] for row in listed(root) if row["best"]] == [200]
    assert json.loads(said(0, "-C", root, "show", "best", "--json"))["checkpoint"]["metrics"]["mmlu"] == 0.61
    for pair in ("mmlu", "=1", "mmlu=x", "mmlu=nan", "mmlu=inf", "a b=1"):
        said(2, "-C", root, "record", "200", pair)


def test_names_that_cannot_be_read_hold_everything(root: Path) -> None:
    (root / ".lastgood" / "pins.json").write_text("{")
    said(0, "-C", root, "log")
    for words in (("pin", "200"), ("unpin", "200"), ("tag", "x", "200"), ("untag", "x")):
        assert call("-C", root, *words)[0] in (2, 4), words
    said(0, "-C", root, "prune", "--keep-last", "1", "--yes")
    assert steps(root) == [600, 400, 200]


# ---- space -------------------------------------------------------------------------------


def test_prune_and_undo(root: Path) -> None:
    before = checkpoints(root)
    out = said(0, "-C", root, "prune", "--keep-last", "1", "--dry-run")
    assert "DELETE  checkpoint-200" in out and "KEEP    checkpoint-400" in out and "Run again" in out
    assert checkpoints(root) == before
    said(0, "-C", root, "prune", "--keep-last", "1", "--yes")
    assert steps(root) == [600, 400]
    assert "no rule keeps it" in said(0, "-C", root, "log", "--all")
    assert "checkpoint-200 is back" in said(0, "-C", root, "undo")
    assert checkpoints(root) == before
    said(3, "-C", root, "undo")
    said(0, "-C", root, "prune", "--keep-last", "1", "--yes", "--now")
    said(3, "-C", root, "undo")
    assert steps(root) == [600, 400]


def test_strip_and_undo(root: Path) -> None:
    before = checkpoints(root)
    said(0, "-C", root, "strip", "200", "checkpoint-200", "latest~2", "--yes")
    assert steps(root, "weights") == [200] and said(0, "-C", root, "verify", "200", "--full")
    said(2, "-C", root, "strip", "200", "--yes")
    assert "last good" in said(6, "-C", root, "strip", "latest", "--yes")
    said(0, "-C", root, "undo")
    assert checkpoints(root) == before
    # Two operations, undone one after the other, the newest first.
    said(0, "-C", root, "strip", "400", "--yes")
    said(0, "-C", root, "prune", "--keep-last", "1", "--yes")
    said(0, "-C", root, "undo")
    said(0, "-C", root, "undo")
    assert checkpoints(root) == before


def test_empty_trash(root: Path) -> None:
    said(0, "-C", root, "prune", "--keep-last", "1", "--yes")
    said(6, "-C", root, "prune", "--empty-trash")
    said(0, "-C", root, "prune", "--empty-trash", "--dry-run")
    said(0, "-C", root, "prune", "--empty-trash", "--yes")
    said(3, "-C", root, "undo")


def test_prune_asks(root: Path) -> None:
    before = checkpoints(root)
    code, out, err = cli.run("-C", root, "prune", "--keep-last", "1")
    assert code == 6 and "DELETE" in out and "--yes" in err
    assert checkpoints(root) == before
    assert "no policy of its own" in said(2, "-C", root, "prune")
    said(2, "-C", root, "prune", "--keep-last", "0")
    said(2, "-C", root, "prune", "--keep-within", "2x")
    said(2, "-C", root, "prune", "--to-free", "much")
    said(5, "-C", root, "prune", "--to-free", "1TB", "--yes")
    assert checkpoints(root) == before
    said(0, "-C", root, "prune", "--to-free", "1", "--yes")
    assert len(steps(root)) == 2


def test_stock_checkpoints_go_only_when_asked(stock: Path) -> None:
    before = checkpoints(stock)
    assert "nothing to remove" in said(0, "-C", stock, "prune", "--keep-last", "1", "--yes")
    assert checkpoints(stock) == before
    said(0, "-C", stock, "prune", "--keep-last", "1", "--stock", "--yes")
    assert steps(stock) == [6]
    said(0, "-C", stock, "undo")
    assert checkpoints(stock) == before


def test_a_damaged_newest_one_does_not_count(root: Path) -> None:
    cli.flip(root / "checkpoint-600" / "optimizer.safetensors")
    out = said(0, "-C", root, "prune", "--keep-last", "1", "--yes", "--monitor", "eval_loss", "--mode", "max")
    assert "is damaged" in out and 400 in steps(root), "the last good one stays"


HOLD = """
import sys, time
from pathlib import Path
from lastgood.repo.lock import RunLock
lock = RunLock(Path(sys.argv[1])); lock.acquire(); print("held", flush=True); time.sleep(60)
"""


def test_a_run_that_somebody_writes_to(root: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, root], stdout=subprocess.PIPE, env=cli.environment())
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        for words in (("prune", "--keep-last", "1", "--yes"), ("strip", "200", "-y"), ("undo",), ("adopt", "-y")):
            assert f"process {holder.pid}" in said(11, "-C", root, *words)
        for words in (("log",), ("verify", "--full"), ("pin", "200"), ("record", "200", "a=1"), ("tag", "x", "200"),
                      ("prune", "--keep-last", "1", "-n"), ("resume",)):  # fmt: skip
            said(0, "-C", root, *words)
        assert f"process {holder.pid}" in said(0, "-C", root, "watch", "--once")
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    said(0, "-C", root, "prune", "--keep-last", "1", "--yes")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], check=False).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("words", [("--now",), ()])
def test_prune_on_a_disk_that_is_full(words: tuple[str, ...], small_disk: Path) -> None:
    root = shutil.copytree(cli.managed(small_disk.parent / "run"), small_disk / "run")
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            pass
    status = os.statvfs(small_disk)
    assert status.f_bavail == 0
    out = said(0, "-C", root, "prune", "--keep-last", "1", "--yes", *words)
    assert "freed" in out and steps(root) == [600, 400]
    assert os.statvfs(small_disk).f_bavail > 0
    said(0, "-C", root, "verify", "--full")


# ---- out and in --------------------------------------------------------------------------


def test_adopt(stock: Path) -> None:
    before = hashes(stock)
    said(6, "-C", stock, "adopt")
    assert {name: h for name, h in hashes(stock).items() if not name.startswith(".lastgood")} == before
    said(0, "-C", stock, "adopt", "--yes")
    after = hashes(stock)
    assert {name: after[name] for name in before} == before
    assert {Path(name).name for name in after.keys() - before.keys() if not name.startswith(".lastgood")} == {
        "lastgood.json"
    }
    assert said(0, "-C", stock, "verify", "--full").count("every hash") == 3
    assert [row["step"] for row in listed(stock) if row["best"]] == [6]
    said(3, "-C", stock, "adopt", "--yes")
    old = checkpoints(stock)
    said(0, "-C", stock, "strip", "2", "--yes")
    assert steps(stock, "weights") == [2]
    said(0, "-C", stock, "undo")
    assert checkpoints(stock) == old
    cli.flip(stock / "checkpoint-4" / "training_args.bin")
    assert "training_args.bin" in said(1, "-C", stock, "verify", "--full")


def test_what_cannot_be_adopted(real: Real) -> None:
    root = real("lightning_run")
    before = checkpoints(root)
    assert "lastgood import" in said(1, "-C", root, "adopt", "--yes")
    assert checkpoints(root) == before


def test_checkout(stock: Path, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    before = snapshot(stock)
    said(0, "-C", stock, "checkout", "best", tmp_path / "copy")
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "copy").config.n_embd == 16
    for path in (tmp_path / "copy").iterdir():
        assert os.lstat(path).st_nlink == 1
        path.write_bytes(b"changed")
    assert snapshot(stock) == before
    said(2, "-C", stock, "checkout", "best", tmp_path / "copy")
    said(0, "-C", stock, "checkout", "best", tmp_path / "no" / "parent")
    said(3, "-C", stock, "checkout", "nothing", tmp_path / "other")
    said(0, "-C", stock, "checkout", "4", tmp_path / "half", "--dtype", "bfloat16")
    from safetensors.torch import load_file

    assert {str(t.dtype) for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {"torch.bfloat16"}


def test_checkout_of_a_damaged_checkpoint(root: Path, stock: Path, tmp_path: Path) -> None:
    cli.flip(root / "checkpoint-600" / "model.safetensors")
    (stock / "checkpoint-6" / "model.safetensors").write_bytes(b"torn")
    for run, rev in ((root, "600"), (stock, "6")):
        said(4, "-C", run, "checkout", rev, tmp_path / "copy")
        assert not [path.name for path in tmp_path.iterdir() if "copy" in path.name]


def test_average(stock: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    sets = [load_file(stock / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4, 6)]
    for words, shares in (
        ((), (1 / 3, 1 / 3, 1 / 3)), (("--weights", "1,2,5"), (0.125, 0.25, 0.625)),
        (("--ema", "0.5"), (1 / 7, 2 / 7, 4 / 7)),
    ):  # fmt: skip
        place = tmp_path / f"mean{len(words)}{words[:1]}".replace("'", "").replace("(", "").replace(")", "").replace(
            ",", ""
        )
        said(0, "-C", stock, "average", "2", "4", "6", "-o", place, *words)
        for name, found in load_file(place / "model.safetensors").items():
            expected = sum(share * weights[name].double() for share, weights in zip(shares, sets, strict=True))
            assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-7), name
    said(2, "-C", stock, "average", "2", "2", "-o", tmp_path / "x")
    said(2, "-C", stock, "average", "2", "4", "-o", tmp_path / "x", "--weights", "1")
    said(2, "-C", stock, "average", "2", "4", "-o", tmp_path / "x", "--weights", "1,-1")
    cli.flip(stock / "checkpoint-4" / "optimizer.pt")
    said(4, "-C", stock, "average", "2", "4", "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- processes and terminals -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["managed", "trainer_full"])
def test_every_verb_as_a_process(kind: str, run_of: Real, tmp_path: Path) -> None:
    """Exit codes and streams of the real thing: data on stdout, chatter on stderr."""
    root = run_of(kind)
    first = {"managed": "200", "trainer_full": "2"}[kind]
    second = str(2 * int(first))
    table: list[tuple[tuple[Any, ...], int, str]] = [
        (("log",), 0, second), (("show",), 0, "parts"), (("diff", first, second), 0, "metrics"), (("df",), 0, "total"),
        (("du",), 0, f"checkpoint-{first}"), (("watch", "--once"), 0, second), (("verify",), 0, "ok"),
        (("resume",), 0, "OK"), (("completion", "bash"), 0, "COMPREPLY"), (("adopt", "--yes"), 0 if kind != "managed" else 3, ""),
        (("pin", first), 0, ""), (("unpin", first), 0, ""), (("tag", "x", first), 0, ""), (("tag",), 0, "x\t"), (("untag", "x"), 0, ""),
        (("note", first, "hm"), 0, ""), (("note", first), 0, "hm"), (("record", first, "a=1"), 0, ""),
        (("strip", first, "--yes"), 0, "STRIP"), (("undo",), 0, "full again"), (("prune", "--keep-last", "1", "-y"), 0, "DELETE"),
        (("undo",), 0, "is back"), (("show", "999"), 3, ""), (("checkout", "latest", tmp_path / "copy"), 0, ""),
        (("run", "--", sys.executable, "-c", "pass"), 0, ""),
    ]  # fmt: skip
    if kind != "managed":
        table.append((("average", first, second, "-o", tmp_path / "mean"), 0, f"checkpoint-{first}\t0.5"))
    for words, code, expected in table:
        found, out, err = cli.run("-C", root, *words)
        assert found == code, (words, out, err)
        assert expected in out and "\x1b" not in out + err, (words, out)
        assert ("Traceback" not in err and bool(out) == bool(expected)) or words[0] in ("adopt", "run"), (words, out)


def test_a_pipe_that_closes_early(tmp_path: Path) -> None:
    root = cli.managed(tmp_path / "run")
    for words in ("log", "log --json", "show --tensors", "verify"):
        done = subprocess.run(
            ["bash", "-c", f"'{sys.executable}' -m lastgood -C '{root}' {words} | head -c 1; echo ${{PIPESTATUS[0]}}"],
            env=cli.environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.endswith("0\n") and done.stderr == "", (words, done)
        end = os.pipe()
        os.close(end[0])
        with os.fdopen(end[1], "wb") as closed:
            child = subprocess.run(
                [sys.executable, "-m", "lastgood", "-C", str(root), *words.split()],
                env=cli.environment(), stdout=closed, stderr=subprocess.PIPE, check=False,
            )  # fmt: skip
        assert (child.returncode, child.stderr) == (0, b""), words


def on_terminal(
    *words: Any, answer: bytes = b"", wait_for: bytes = b"", interrupt: bool = False, **env: str
) -> tuple[int, str]:
    """(exit code, all that is shown) of a process on a terminal of its own."""
    pid, handle = pty.fork()
    if pid == 0:
        try:
            os.execve(
                sys.executable,
                [sys.executable, "-m", "lastgood", *map(str, words)],
                {**cli.environment(env), "TERM": "xterm"},
            )
        finally:
            os._exit(127)
    shown, sent, deadline = b"", False, time.monotonic() + 30
    try:
        while time.monotonic() < deadline:
            if select.select([handle], [], [], 0.1)[0]:
                try:
                    data = os.read(handle, 65536)
                except OSError:  # the other end is closed
                    break
                if not data:
                    break
                shown += data
            if not sent and wait_for and wait_for in shown:
                sent = True
                os.write(handle, b"\x03" if interrupt else answer)
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode(errors="replace")


def test_prune_on_a_terminal(root: Path) -> None:
    words = ("-C", root, "prune", "--keep-last", "1")
    for answer in (b"n\n", b"\n"):
        code, out = on_terminal(*words, answer=answer, wait_for=b"[y/N]")
        assert code == 6 and "nothing was done" in out and steps(root) == [600, 400, 200]
    code, out = on_terminal(*words, interrupt=True, wait_for=b"[y/N]")
    assert code == 130 and "interrupted" in out and steps(root) == [600, 400, 200]
    code, out = on_terminal(*words, LASTGOOD_NO_INPUT="1")
    assert code == 6 and steps(root) == [600, 400, 200]
    code, out = on_terminal(*words, answer=b"y\n", wait_for=b"[y/N]")
    assert code == 0 and "\x1b[31m" in out and steps(root) == [600, 400]


def test_colours_on_a_terminal(root: Path) -> None:
    code, out = on_terminal("-C", root, "verify")
    assert code == 0 and "\x1b[32m" in out
    code, out = on_terminal("-C", root, "verify", NO_COLOR="1")
    assert code == 0 and "\x1b[" not in out
    code, out = on_terminal("-C", root, "show", "nothing", NO_COLOR="1")
    assert code == 3 and "\x1b[" not in out


def test_watch_on_a_terminal(root: Path) -> None:
    code, out = on_terminal(
        "-C", root, "watch", "--interval", "0.1", interrupt=True, wait_for=b"600", COLUMNS="100", LINES="30"
    )
    assert code in (0, 130) and "Traceback" not in out and "400" in out


def test_a_long_listing_is_remembered_until_something_changes(tmp_path: Path) -> None:
    """Of 500 checkpoints and more; the memory must never tell what isn't so any more."""
    root = cli.managed(tmp_path / "run")
    for number in range(600):
        (root / f"other-{number}").mkdir()
    env = {"LASTGOOD_CACHE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def best() -> list[int]:
        rows = json.loads(said(0, "-C", root, "log", "--json", env=env))["checkpoints"]
        assert said(0, "-C", root, "log", "--json", env=env) == said(
            0, "-C", root, "log", "--json", env={"LASTGOOD_CACHE": "0"}
        )
        return [row["step"] for row in rows if row["best"]]

    assert best() == [400] and list((tmp_path / "cache" / "lastgood").iterdir())
    from lastgood.repo import metrics

    ids = {record.step: record.id for record in records(root)}
    metrics.record(root, ids[200], 200, {"eval_loss": 0.5})
    assert best() == [200]
    for words in (("tag", "x", "600"), ("note", "400", "y"), ("pin", "200"), ("strip", "400", "--yes"), ("undo",)):
        said(0, "-C", root, *words)
        best()
    said(0, "-C", root, "prune", "--keep-last", "1", "--keep-best", "1", "--yes")
    best()


@pytest.mark.parametrize("kind", ["dcp_run", "accelerate_run", "lightning_run"])
def test_I11_prune_stock_is_about_the_trainers_checkpoints_alone(kind: str, real: Callable[[str], Path]) -> None:
    root = real(kind)
    before = cli.hashes(root)
    result = cli.call("prune", "-C", root, "--stock", "--keep-last", "1", "--yes")
    assert cli.hashes(root).items() >= before.items() and "DELETE" not in result.out, result
