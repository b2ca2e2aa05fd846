"""Small files as the real writers write them, for the tests that damage them."""

from __future__ import annotations

import tempfile
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as saver

from lastgood.format import tensors as safetensors
from lastgood.model import FileEntry, Manifest, Record

MANIFEST = Manifest(
    format=1, id="a" * 16, run="b" * 16, step=500, seq=3, lineage=((1, 3),), parent="c" * 16, created=1.5,
    parts={"model": ("model.safetensors",), "progress": ("sub/resume.json",)},
    files={"model.safetensors": FileEntry(10, "0" * 64), "sub/resume.json": FileEntry(2, "1" * 64)},
    environment={"torch": "2.13.0"}, arguments={"learning_rate": 0.1}, facts={"data": {"length": 3}},
)  # fmt: skip
RECORDS = tuple(
    Record(name=f"checkpoint-{n}", step=n, state="full", metrics={"loss": 1 / n}, pinned=("good",) if n == 2 else (),
           manifest=Manifest(format=1, id=f"{n:016x}", run="b" * 16, step=n, seq=n, lineage=((1, n),)))
    for n in (1, 2, 3)
)  # fmt: skip


def _tensors(*names: str) -> bytes:
    some = [safetensors.Tensor(name, "F32", (2, 1), memoryview(bytes(8))) for name in names]
    return b"".join(safetensors.encode(some, {"format": "pt"})[1])


def _archive(value: Any) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _saved(steps: int = 3) -> dict[str, Any]:
    moments = {"step": torch.tensor(float(steps)), "exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)}
    return {"state": {0: moments}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]}


CKPT = {
    "state_dict": {"w": _saved()["state"][0]["exp_avg"]},
    "global_step": 3,
    "epoch": 1,
    "optimizer_states": [_saved()],
}
STATE = b'{\n  "global_step": 2,\n  "epoch": 0.5,\n  "log_history": [\n    {\n      "loss": 1.5,\n      "step": 2\n    },\n' \
    b'    {\n      "eval_loss": 1.25,\n      "step": 2\n    }\n  ],\n  "max_steps": 2\n}\n'  # fmt: skip
LINES = b'{"time": 1.5, "event": "saved", "step": 2, "id": "' + b"a" * 16 + b'", "bytes": 5}\n'
TRAIL = (
    b'{"life":1,"run":"b","from":0,"checkpoint":"","time":1.5}\n'
    b'{"life":1,"step":1,"loss":2.5,"grad_norm":"nan","lr":0.1,"batch":"00"}\n{"life":1,"step":2,"saved":"aa"}\n'
)


def _dcp() -> tuple[bytes, bytes]:
    """(.metadata, data file) that torch.distributed.checkpoint wrote."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saver.save({"model": {"w": torch.ones(2, 3)}, "step": 3}, checkpoint_id=folder, no_dist=True)
        return (Path(folder) / ".metadata").read_bytes(), (Path(folder) / "__0_0.distcp").read_bytes()


METADATA, DATA = _dcp()
TENSORS = _tensors("w", "b")
LORA = _tensors("base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight")
LIGHTNING, OPTIMIZER, PLAIN = _archive(CKPT), _archive(_saved()), _archive({"step": 3, "rng": (1, 2)})


class unchanged:
    """Nothing below a directory is written to by what is inside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _look(self) -> list[tuple[str, int, int]]:
        return [
            (str(p), p.lstat().st_mtime_ns, 0 if p.is_dir() else p.lstat().st_size)
            for p in sorted([self.folder, *self.folder.rglob("*")])
        ]

    def __enter__(self) -> None:
        self.before = self._look()

    def __exit__(self, kind: Any, *_: Any) -> None:
        assert kind is not None or self._look() == self.before, "reading wrote something"
