"""Small checkpoints with a content that is known: our own, and those of a Trainer without lastgood."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from lastgood.format.tensors import Tensor, encode
from lastgood.repo.staging import Staging


def _tensors(name: str, seed: int) -> bytes:
    data = memoryview(bytes([seed % 251]) * (64 + seed % 7))
    _, chunks = encode([Tensor(name, "U8", (len(data),), data)], {"format": "pt"})
    return b"".join(bytes(chunk) for chunk in chunks)


def content(seed: int, *, full: bool) -> dict[str, bytes]:
    """File -> bytes; the weights tell one from the other."""
    files = {"model.safetensors": _tensors("w", seed), "config.json": b"{}"}
    if full:
        files |= {"optimizer.safetensors": _tensors("m", seed + 1), "resume.json": b'{"seed": %d}' % seed}
    return files


PART = {"optimizer.safetensors": "optimizer", "resume.json": "progress"}


def writer(seed: int, *, full: bool) -> Callable[[Staging], None]:
    """What `Manager.save` is given."""

    def write(staging: Staging) -> None:
        for name, data in content(seed, full=full).items():
            staging.data(name, PART.get(name, "model"), data)

    return write


def stock(root: Path, step: int) -> dict[str, bytes | str | None]:
    """Write a checkpoint as a Trainer does, of one long run; relative name -> content of what was written."""
    place = root / f"checkpoint-{step}"
    place.mkdir()
    rows = [{"step": row, "eval_loss": 1 / row} for row in range(10, step + 1, 10)]
    files = {"model.safetensors": _tensors("w", step)}
    files |= {name: _archive(name, step) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")}
    files["trainer_state.json"] = json.dumps({"global_step": step, "log_history": rows}).encode()
    for name, data in files.items():
        (place / name).write_bytes(data)
    return {place.name: None, **{f"{place.name}/{name}": data for name, data in files.items()}}


def _archive(name: str, step: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        inside = name.partition(".")[0]
        file.writestr(f"{inside}/data.pkl", b"\x80\x02}q\x00.")
        file.writestr(f"{inside}/data/0", bytes([step % 251]) * 50)
    return buffer.getvalue()
