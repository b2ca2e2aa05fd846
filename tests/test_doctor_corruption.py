"""CKC: files that aren't what was written. Real errors of the real libraries on damaged copies of real runs."""

from __future__ import annotations

import json
import math
import pickle
import random
import shutil
import struct
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from damaged import aged, good, resumed
from lastgood.doctor.disk import Disk
from lastgood.doctor.finding import Finding
from lastgood.format import finite

import cli
from sick import codes, log_of, the

Real = Callable[[str], Path]
SAFE, OPTIMIZER, RNG = "model.safetensors", "optimizer.pt", "rng_state.pth"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0\nsize 35072\n"

PAGE = b"<!DOCTYPE html>\n<html><head><title>Access denied</title></head></html>\n"


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def damage(root: Path, name: str, change: Callable[[bytes], bytes]) -> str:
    """The log of a resume from a run whose newest checkpoint has this file changed."""
    file = root / "checkpoint-6" / name
    file.write_bytes(change(file.read_bytes()))
    log = resumed(root, True, max_steps=9)
    aged(root)
    return log


def check(code: str, root: Path, log: str, name: str, *words: str) -> Finding:
    """The log with the run, the run alone and the log alone lead to the same file and the same way out."""
    found = the(code, root, log=log)
    assert name in found.saw and all(word in found.saw for word in words), found.saw
    assert found.fix[0] == good(root, 4)
    assert found.repair is not None and found.repair.name == "checkpoint-6"
    return found


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


@pytest.mark.parametrize("share", [0, 0.0002])
def test_CKC001(share: float, real: Real) -> None:
    root = real("trainer_full")
    log = damage(root, SAFE, cut(share))
    assert "header too small" in log
    found = check("CKC001", root, log, SAFE, "bytes")
    assert "in checkpoint-4 it has" in "".join(found.evidence)
    assert codes(root) == ["CKC001"]
    the("CKC001", log=log)


@pytest.mark.parametrize("share", [0.003, 0.3, 0.95])
def test_CKC002(share: float, real: Real) -> None:
    root = real("trainer_full")
    log = damage(root, SAFE, cut(share))
    check("CKC002", root, log, SAFE, "cut off")
    assert codes(root) == ["CKC002"]


def test_CKC002_longer(real: Real) -> None:
    root = real("trainer_full")
    check("CKC002", root, damage(root, SAFE, lambda data: data + b"more"), SAFE, "4 bytes more")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (POINTER, "git-LFS"),
        (PAGE, "web page"),
        (pickle.dumps([1] * 99, 2), "pickle"),
        (b"PK\x03\x04" * 9, "zip"),
    ],
)
def test_CKC003(content: bytes, word: str, real: Real) -> None:
    root = real("trainer_full")
    log = damage(root, SAFE, lambda _: content)
    assert "header too large" in log
    check("CKC003", root, log, SAFE, word)
    assert codes(root) == ["CKC003"]


@pytest.mark.parametrize(("content", "word"), [(POINTER, "git-LFS"), (PAGE, "web page")])
def test_CKC003_archive(content: bytes, word: str, real: Real) -> None:
    root = real("trainer_full")
    log = damage(root, OPTIMIZER, lambda _: content)
    check("CKC003", root, log, OPTIMIZER, word)
    shutil.rmtree(root)
    assert "begins with" in the("CKC003", log=log).saw
    old = log_of(lambda: pickle.loads(content))
    the("CKC003", log=old)
    assert codes(log="_pickle.UnpicklingError: invalid load key, '\\x00'.") == ["CKC003"]
    assert codes(log="_pickle.UnpicklingError: invalid load key, '#'.") == []


@pytest.mark.parametrize("content", [b"\0", b"\xff", b"x"])
def test_CKC004(content: bytes, real: Real) -> None:
    root = real("trainer_full")
    keep = 0 if content == b"\0" else 8
    log = damage(root, SAFE, lambda data: data[:keep] + content * (len(data) - keep))
    check("CKC004", root, log, SAFE, "header" if keep else "zero bytes")
    assert codes(root) == ["CKC004"]


def test_CKC004_newer_library(real: Real) -> None:
    root = real("trainer_full")
    log = damage(root, SAFE, lambda data: data.replace(b'"F32"', b'"F99"', 1))
    found = the("CKC004", root, log=log)
    assert "type F99" in found.saw and "safetensors" in found.fix[0]


@pytest.mark.parametrize("share", [0.01, 0.95])
def test_CKC005(share: float, real: Real) -> None:
    root = real("trainer_full")
    log = damage(root, OPTIMIZER, cut(share))
    assert "PytorchStreamReader" in log
    check("CKC005", root, log, OPTIMIZER, "cut off")
    assert codes(root) == ["CKC005"]


def test_CKC005_zeros(real: Real) -> None:
    root = real("trainer_full")
    check("CKC005", root, damage(root, OPTIMIZER, lambda data: bytes(len(data))), OPTIMIZER, "zero bytes")


@pytest.mark.parametrize("name", [OPTIMIZER, "scheduler.pt", RNG])
def test_CKC006(name: str, real: Real) -> None:
    root = real("trainer_full")
    log = damage(root, name, cut(0))
    assert log.rstrip().endswith("EOFError")
    check("CKC006", root, log, name, "0 bytes")
    shutil.rmtree(root)
    assert name.split(".", maxsplit=1)[0] in "".join(the("CKC006", log=log).evidence)


def test_CKC006_other_ends_of_files(real: Real) -> None:
    """A console without input and a worker that died say the same word."""
    root = aged(real("trainer_full"))
    try:
        raise EOFError
    except EOFError:
        assert codes(root, log=traceback.format_exc()) == []
    assert codes(root, log="EOFError: EOF when reading a line") == []
    assert codes(log="EOFError") == []


@pytest.mark.parametrize("name", [OPTIMIZER, RNG])
def test_CKC007(name: str, real: Real) -> None:
    root = real("trainer_full")
    log = damage(root, name, cut(0.4))
    assert "[Errno 22]" in log
    check("CKC007", root, log, name, "cut off")
    assert codes(root, log=log) == ["CKC007"] and codes(root) == ["CKC005"]
    assert codes(log="OSError: [Errno 22] Invalid argument: 'a:b'") == []


def test_CKC007_lightning(real: Real) -> None:
    root = real("lightning_run")
    file = root / "checkpoints/last.ckpt"
    file.write_bytes(file.read_bytes()[:20_000])
    found = the("CKC005", aged(root))
    assert found.where == "checkpoints/last.ckpt" and "ckpt_path" in found.fix[0]


def test_CKC008(tmp_path: Path, real: Real) -> None:
    root = cli.managed(tmp_path / "run")
    cli.flip(root / "checkpoint-600/model.safetensors", -10)
    assert codes(root, select=["CKC"]) == []  # nothing but reading every byte can tell
    found = the("CKC008", root, full=True, select=["CKC"])
    assert found.where == "checkpoint-600" and SAFE in found.saw and "hash" in found.saw
    (aged(root) / "checkpoint-600/resume.json").unlink()
    assert "resume.json is missing" in the("CKC008", root, select=["CKC"]).saw
    (root / "checkpoint-600/lastgood.json").write_bytes(b"{")
    assert "lastgood.json" in the("CKC008", root, select=["CKC"]).saw
    stock = aged(real("trainer_full"))
    cli.flip(stock / "checkpoint-6/optimizer.pt")
    assert codes(stock) == []
    assert "checksum" in the("CKC008", stock, full=True).saw


def test_CKC008_managed_file_cut_off(tmp_path: Path) -> None:
    root = cli.managed(tmp_path / "run")
    file = root / "checkpoint-600/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    assert codes(aged(root), select=["CKC", "CKR"]) == ["CKC002"]
    assert the("CKC002", root).fix[0] == good(root, 400)


def test_CKC009(real: Real) -> None:
    root = real("trainer_full")
    for step in (2, 4, 6):
        file = root / f"checkpoint-{step}" / OPTIMIZER
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    log = damage(root, OPTIMIZER, cut(0.6))
    found = the("CKC009", root, log=log)
    assert "checkpoint-6/optimizer.pt has" in found.saw and "checkpoint-4" in found.saw
    the("CKC009", log="RuntimeError: storage has wrong size: expected 0 got 1024")


def test_CKC010(real: Real) -> None:
    root = aged(real("trainer_full"))
    found = the("CKC010", root, log="OSError: [Errno 116] Stale file handle: 'out/checkpoint-6/optimizer.pt'")
    assert "the newest good one is checkpoint-6" in "".join(found.evidence) and found.severity == "warning"
    the("CKC010", log="safetensors_rust.SafetensorError: I/O error: Input/output error (os error 5)")
    terminal = (
        'Traceback (most recent call last):\n  File "train.py", line 9, in <module>\n'
        '  File "/x/site-packages/tqdm/std.py", line 448, in fp_write\nOSError: [Errno 5] Input/output error\n'
    )
    assert "terminal was closed" in the("CKC010", root, log=terminal).means
    assert codes(log="FileNotFoundError: [Errno 2] No such file or directory: 'a'") == []


def spoiled(root: Path, steps: tuple[int, ...], number: float = math.nan) -> Path:
    for step in steps:
        file = root / f"checkpoint-{step}" / SAFE
        tensors = load_file(file)
        tensors["transformer.h.0.ln_1.weight"].view(-1)[3] = number
        save_file(tensors, file, {"format": "pt"})
    return aged(root)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_CKC011(number: float, real: Real) -> None:
    root = spoiled(real("trainer_full"), (4, 6), number)
    found = the("CKC011", root)
    assert found.where == "checkpoint-6" and found.fix[0] == good(root, 2)
    assert "transformer.h.0.ln_1.weight: 1 of 16" in found.evidence[0]
    assert codes(root, full=True) == ["CKC011", "CKC011"]
    log = log_of(lambda: torch.multinomial(torch.tensor([number, 1.0]), 1))
    assert "checkpoint-6" in the("CKC011", root, log=log).saw
    assert codes(spoiled(real("trainer_full"), (6,), -math.inf)) in ([], ["CKC011"])


def test_CKC011_masks_are_healthy(real: Real) -> None:
    root = real("trainer_full")
    file = root / "checkpoint-6" / SAFE
    mask = torch.full((4, 4), -math.inf).triu(1)
    save_file({**load_file(file), "mask": mask}, file, {"format": "pt"})
    assert codes(aged(root)) == []


def test_CKC011_other_files(real: Real) -> None:
    root = aged(real("trainer_bin"))
    state = load_file(root / "checkpoint-6" / SAFE)
    state["head.bias"][:] = math.nan
    torch.save(state, root / "checkpoint-6/pytorch_model.bin")
    (root / "checkpoint-6" / SAFE).unlink()
    assert "head.bias: 64 of 64" in the("CKC011", root).evidence[0]
    root = aged(real("lightning_run"))
    file = root / "checkpoints/last.ckpt"
    tree = torch.load(file, weights_only=False)
    next(iter(tree["state_dict"].values()))[:] = math.inf
    torch.save(tree, file)
    assert "ckpt_path" in the("CKC011", root).fix[0]


def test_CKC011_losses(real: Real) -> None:
    root = aged(real("trainer_full"))
    file = root / "checkpoint-6/trainer_state.json"
    state = json.loads(file.read_text())
    rows = [{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in range(1, 7)]

    def of(**changes: dict[int, Any]) -> list[str]:
        history = [{**row, **{k: v[i] for k, v in changes.items() if i in v}} for i, row in enumerate(rows)]
        file.write_text(json.dumps({**state, "log_history": history}))
        for older in (2, 4):
            other = root / f"checkpoint-{older}/trainer_state.json"
            other.write_text(json.dumps({**json.loads(other.read_text()), "log_history": history[:older]}))
        return codes(aged(root), select=["CKC", "CKR"])

    nan = math.nan
    assert of() == of(loss={2: nan}) == of(grad_norm={4: nan, 5: math.inf}) == []
    assert of(loss={5: nan}) == of(grad_norm={3: nan, 4: "nan", 5: nan}) == ["CKC011"]
    assert "from step 5 on" in the("CKC011", root).saw or "from step 4 on" in the("CKC011", root).saw
    assert the("CKC011", log="{'loss': 2.0, 'epoch': 0.1}\n{'loss': nan, 'epoch': 0.2}").saw
    assert codes(log="{'loss': nan, 'epoch': 0.1}\n{'loss': 2.0, 'epoch': 0.2}") == []


def test_CKC011_empty_optimizer(real: Real) -> None:
    root = aged(real("trainer_full"))
    file = root / "checkpoint-6" / OPTIMIZER
    state = torch.load(file)
    torch.save({**state, "state": {}}, file)
    assert "holds no state" in the("CKC011", root).saw
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).state_dict()
    torch.save(plain, file)  # it keeps none, and needs none
    assert codes(root) == []


TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(TYPES)), st.integers(0, 1 << 32))
def test_finite_agrees_with_torch(dtype: str, seed: int) -> None:
    """Any bits, many of them with extreme exponents."""
    source = random.Random(seed)
    data = bytearray(source.randbytes(8 * 64))
    for place in range(len(data)):
        if source.random() < 0.3:
            data[place] = source.choice((0x7F, 0xFF, 0x80, 0x7C, 0xF0, 0x00))
    tensor = torch.frombuffer(data, dtype=torch.uint8).view(TYPES[dtype])
    wanted = ~torch.isfinite(tensor.to(torch.float64))
    marks = finite.places(bytes(data), dtype)
    found = torch.tensor(list(marks), dtype=torch.bool) if marks else torch.zeros(len(tensor), dtype=torch.bool)
    assert torch.equal(found, wanted)
    for index in torch.nonzero(wanted).flatten().tolist():
        number = finite.value(data, dtype, index)
        assert math.isnan(number) or number == tensor[index].item()


def test_finite_reads_no_more_than_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    count = 1 << 18
    file.write_bytes(bytes(4 * count - 4) + struct.pack("<f", math.nan))
    stretches = [finite.Stretch(str(n), "F32", n * count, (n + 1) * count) for n in range(4)]
    monkeypatch.setattr(finite, "CHUNK", 1 << 16)
    assert finite.look(file, stretches, 4 << 16) == ([], 4 << 16)
    bad, read = finite.look(file, stretches, None)
    assert read == 4 * count and [(item.name, item.count, item.looked_at) for item in bad] == [("3", 1, count // 4)]


def test_a_file_that_is_no_file(real: Real) -> None:
    root = real("trainer_full")
    (root / "checkpoint-6/model.safetensors").unlink()
    (root / "checkpoint-6/model.safetensors").symlink_to("/dev/zero")
    assert "CKR002" in codes(aged(root))
    assert Disk(root).close
