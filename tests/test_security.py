"""What a run's files never hold: secrets, pickles, modes of their own. Tried with real runs, byte by byte."""

from __future__ import annotations

import gzip
import io
import logging
import os
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer

import lastgood
import loops
from lastgood.redact import holds_secret, masked

import cli
import forked
from training import Bytes, Case, Pad, arguments, tiny_gpt2

CANARY = "cAnArY0123456789abcdef"
NAMES = (
    "hub_token",
    "WANDB_API_KEY",
    "aws_secret_access_key",
    "my_password",
    "db_passwd",
    "credentials",
    "x-signature",
)
ENVIRONMENT = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "COMET_API_KEY", "SOME_SECRET")
TEXTS = (
    f"https://me:{CANARY}@host/path", f"https://{CANARY}@host", f"s3://a:b@{CANARY}@host/x",
    f"https://h/x?token={CANARY}", f"https://h/x?a=1&api_key={CANARY}&b=2", f"https://h/x#access_token={CANARY}",
    f"see https://h/?X-Amz-Signature={CANARY} ok",
    f"hf_{CANARY}", f"sk-{CANARY}", f"ghp_{CANARY}",
)  # fmt: skip


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every byte of every file, of what is packed inside as well, and every name."""
    for path in sorted(root.rglob("*")):
        yield f"name of {path}", os.fsencode(path.relative_to(root))
        if path.is_symlink():
            yield f"target of {path}", os.fsencode(os.readlink(path))
        elif path.is_file():
            yield from unpacked(str(path), path.read_bytes())


def unpacked(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, data
    if data[:2] == b"\x1f\x8b":
        yield from unpacked(f"{name} unpacked", gzip.decompress(data))
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from unpacked(f"{name}/{member}", archive.read(member))
    # Nothing of ours writes zstd; whoever adds it unpacks it here.
    assert data[:4] != b"\x28\xb5\x2f\xfd", f"{name} is compressed in a way that this test can't look into"


def clean(root: Path) -> None:
    found = [name for name, data in contents(root) if CANARY.encode() in data]
    assert not found, found


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(CANARY.encode()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "token"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(NAMES), ANY_VALUE, st.lists(st.sampled_from(["list", "dict", "tuple"]), max_size=4))
def test_I23_what_is_called_a_secret_is_masked_however_deep(name: str, value: Any, around: list[str]) -> None:
    value = {"x": [CANARY, value]}
    for kind in around:
        value = [value] if kind == "list" else (value,) if kind == "tuple" else {"inside": value}
    for key, whole in ((name, value), ("x", {"y": [{name: value}]}), (name.upper(), value)):
        assert CANARY not in repr(masked(key, whole)) and holds_secret(key, whole)


@pytest.mark.parametrize("text", TEXTS)
def test_I23_secrets_inside_a_text_are_masked(text: str) -> None:
    assert CANARY not in masked("run_name", text) and holds_secret("run_name", [text])
    assert CANARY not in repr(masked("a", {"b": [text, {"c": (text,)}]}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 5), ("num_key_value_heads", 2), ("tokenizer_name", "gpt2"),
        ("additional_special_tokens", ["<a>"]), ("output_dir", "out/a@b"),
        ("base_model", "https://huggingface.co/org/model"),
        ("run_name", "disk-" + "a" * 30),
        ("mail", "https://host/?to=a@b"), ("x", "?" * 50_000), ("y", "&token" * 20_000), ("z", "https://" * 20_000),
    ],
    ids=range(11),
)  # fmt: skip
def test_I23_what_is_no_secret_stays_as_it_is(key: str, value: Any) -> None:
    assert masked(key, value) == value and not holds_secret(key, value)


def trainer(root: Path, **changes: Any) -> Trainer:
    secrets = {"hub_token": CANARY, "run_name": TEXTS[0], "hub_model_id": TEXTS[3]}
    args = arguments(root, **{"save_steps": 2, "max_steps": 2, **secrets, **changes})
    data = {"train_dataset": Bytes(64), "eval_dataset": Bytes(8), "data_collator": Pad()}
    return Trainer(model=tiny_gpt2(), args=args, **data)


def loop(root: Path) -> None:
    nested = {"nested": {"tokens_of": {"token": [CANARY]}}}
    settings = {**dict.fromkeys(NAMES, CANARY), **nested, **dict(zip("abcdefghij", TEXTS, strict=True))}
    recipe = loops.simple(loops.Net())
    with lastgood.CheckpointManager(root, save_steps=1, arguments=settings, **recipe.parts) as ckpt:
        for step in range(ckpt.restore(), 2):
            ckpt.step(step + 1, loss=recipe.step(step))
            ckpt.record(step + 1, score=0.5)


def train(root: Path) -> None:
    """A Trainer's run that is resumed, a loop's and a stock one, with secrets wherever settings come from."""
    for name in ENVIRONMENT:
        os.environ[name] = CANARY
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
    logging.getLogger("lastgood").setLevel(logging.DEBUG)
    for max_steps in (2, 4):
        managed = lastgood.manage(trainer(root / "trainer", max_steps=max_steps, eval_strategy="steps", eval_steps=2))
        managed.train(resume_from_checkpoint="auto")
    loop(root / "loop")
    trainer(root / "stock").train()


VERBS: tuple[tuple[str, ...], ...] = (
    ("adopt", "--yes"), ("log", "--all"), ("show",), ("show", "--args"), ("show", "--json"), ("tag", "good", "2"),
    ("record", "2", "mmlu=0.5"), ("strip", "2", "--yes"), ("undo",), ("verify", "--full"), ("resume", "--check"),
    ("doctor",), ("prune", "--keep-last", "1", "--yes"), ("diff", "latest", "latest", "--json"),
)  # fmt: skip


def test_I23_no_secret_reaches_a_byte_on_disk_or_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    root = tmp_path / "runs"
    assert forked.run(train, root, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    told = root / "stock" / "checkpoint-2" / "training_args.bin"
    assert CANARY.encode() in b"".join(data for _, data in unpacked("", told.read_bytes())), "the canary sings"
    told.rename(tmp_path / "training_args.bin")
    clean(root)
    (tmp_path / "training_args.bin").rename(told)
    env = dict.fromkeys(ENVIRONMENT, CANARY)
    said = (tmp_path / "log").read_text()
    for run in ("trainer", "loop", "stock"):
        for words in VERBS:
            code, out, err = cli.call("-C", root / run, *words, env=env)
            assert code in (0, 1, 3, 6), (run, words, err)
            said += out + err
    script = [sys.executable, "-c", "import sys; sys.exit(0 if len(sys.argv) == 5 else 9)"]
    line = ["run", "--", *script, "--hub_token", CANARY, f"--api-key={CANARY}", TEXTS[0]]
    code, out, err = cli.run("-C", root / "trainer", *line, env={**env, "LASTGOOD_LOG": "DEBUG"})
    assert code == 0, err
    assert CANARY not in said + out + err
    for path in root.rglob("training_args.bin"):
        path.unlink()
    clean(root)


def under(mask: int, root: Path) -> None:
    os.umask(mask)
    lastgood.manage(Case("lora", lora=True, evaluate=True, args={"max_steps": 4}).trainer(root / "trainer")).train()
    loop(root / "loop")
    trainer(root / "stock").train()
    for run in ("trainer", "loop", "stock"):
        for words in (*VERBS, ("pin", "2"), ("note", "2", "text"), ("checkout", "2", str(root / f"{run}-copy"))):
            cli.call("-C", root / run, *words)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027], ids=oct)
def test_every_file_has_the_mode_that_the_umask_says(mask: int, tmp_path: Path) -> None:
    """Those that libraries write readable by their owner alone as well: half of a checkpoint is none."""
    root = tmp_path / "runs"
    assert forked.run(under, mask, root, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    theirs = {path for path in root.rglob("*") if "stock/checkpoint" in path.as_posix()}  # adopted: not touched
    wrong = {
        str(path.relative_to(root)): oct(path.stat().st_mode & 0o777)
        for path in root.rglob("*")
        if path not in theirs and path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert not wrong
    assert len(list(root.rglob("*.safetensors"))) > 5


def watched(root: Path) -> None:
    """Python tells a hook of every class that a pickle names; the hook can't be taken away again."""
    seen: list[str] = []
    sys.addaudithook(lambda event, args: seen.append(f"{args}") if event == "pickle.find_class" else None)
    pickle.loads(b"ccollections\nOrderedDict\n.")
    assert seen, "the hook hears"
    seen.clear()
    for max_steps in (2, 4):
        managed = lastgood.manage(trainer(root / "trainer", max_steps=max_steps))
        managed.train(resume_from_checkpoint="auto")
        assert managed.state.global_step == max_steps
    loop(root / "loop")
    for run in ("trainer", "loop"):
        for words in (*VERBS, ("checkout", "latest", str(root / f"{run}-copy"))):
            cli.call("-C", root / run, *words)
        for checkpoint in lastgood.open(root / run).checkpoints:
            checkpoint.load("model")
    if seen:
        raise SystemExit(f"{set(seen)}")


def test_I21_no_pickle_is_read_while_saving_resuming_and_looking(tmp_path: Path) -> None:
    assert forked.run(watched, tmp_path / "runs", log=tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_I25_no_byte_of_a_run_is_a_pickle(tmp_path: Path) -> None:
    """Every file, and every member of an archive, from its beginning: a scanner has nothing to look at."""
    lastgood.manage(trainer(tmp_path / "trainer")).train()
    loop(tmp_path / "loop")
    count = 0
    for name, data in contents(tmp_path):
        assert not name.endswith((".pkl", ".pickle", "training_args.bin")), name
        with pytest.raises(Exception):  # noqa: B017, PT011 (anything but a clean parse)
            list(pickletools.genops(data))
        count += 1
    assert count > 40


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


STOCK_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


@pytest.mark.parametrize("name", STOCK_FILES)
def test_I21_a_stock_run_with_a_weapon_in_it_is_resumed_without_it(name: str, tmp_path: Path) -> None:
    """Whatever becomes of the resume: what is pickled there never runs, and nothing falls back to running it."""
    trainer(tmp_path / "run").train()
    mark = tmp_path / "executed"
    torch.save({"state": Evil(mark), "param_groups": []}, tmp_path / "run" / "checkpoint-2" / name)
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists(), "the weapon works"
    mark.unlink()
    with suppress(Exception):  # what the Trainer's own loader raises
        lastgood.manage(trainer(tmp_path / "run", max_steps=4)).train(resume_from_checkpoint="auto")
    for words in (*VERBS, ("resume", "--print-path"), ("export", "2", str(tmp_path / "out"), "--to", "dcp")):
        cli.call("-C", tmp_path / "run", *words)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["accelerate_run", "lightning_run", "dcp_run"])
def test_I21_an_import_never_executes_what_it_reads(kind: str, real: Callable[[str], Path], tmp_path: Path) -> None:
    run, mark = real(kind), tmp_path / "executed"
    files = [p for p in run.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt", ".distcp")]
    for path in files:
        torch.save({"state_dict": {"w": torch.ones(1)}, "w": Evil(mark)}, path)
    code, out, err = cli.call("-C", tmp_path / "into", "import", run)
    assert code != 0 and "Traceback" not in err and not mark.exists(), (out, err)
    for path in run.rglob(".metadata"):
        path.write_bytes(pickle.dumps(Evil(mark)))
    for place, words in (
        (tmp_path / "into", ("import", run)),
        (run, ("export", "latest", tmp_path / "x", "--to", "dcp")),
    ):
        cli.call("-C", place, *words)
    assert files and not mark.exists()
