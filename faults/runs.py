"""How a run may look before something is done to it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from lastgood.format.tensors import Tensor, encode
from lastgood.repo import metrics, pins, request
from lastgood.repo.layout import hidden
from lastgood.repo.read import records
from lastgood.store import local

from faults.acts import go_back, prune_mixed, prune_two, strip_two, take_in
from faults.small import content, manager, save


def nothing(root: Path) -> None:
    """An empty directory."""


def three(root: Path) -> None:
    """Steps 1, 2 and 3, and things that aren't ours beside them."""
    made = manager(root)
    for step in (1, 2, 3):
        save(made, step)
    made.close()
    strangers(root)


def strangers(root: Path) -> None:
    """What may lie in any output directory and is none of lastgood's business."""
    (root / "notes.txt").write_text("mine")
    for name in ("checkpoint-best", "checkpoint-77"):
        (root / name).mkdir()
        (root / name / "model.bin").write_bytes(b"mine")


def tagged(root: Path) -> None:
    """One of the three has two names, one a note, one late metrics."""
    three(root)
    found = records(root)
    pins.add(root, found[0].id, "release")
    pins.add(root, found[0].id, "paper")
    pins.write_note(root, found[1].id, "before the spike")
    metrics.record(root, found[1].id, 2, {"mmlu": 0.5})


def branched(root: Path) -> None:
    """The run went back to step 1 and stands there."""
    three(root)
    go_back(root)


def stock(root: Path, steps: Sequence[int] = (10, 20, 30)) -> None:
    """What a Trainer writes without lastgood."""
    rows: list[dict[str, float]] = []
    for step in steps:
        rows.append({"step": step, "eval_loss": 1 / step})
        place = root / f"checkpoint-{step}"
        place.mkdir(parents=True)
        _, chunks = encode([Tensor("w", "U8", (64,), memoryview(bytes([step]) * 64))], {"format": "pt"})
        (place / "model.safetensors").write_bytes(b"".join(bytes(chunk) for chunk in chunks))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (place / name).write_bytes(_archive(name, step))
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": rows}))


def adopted(root: Path) -> None:
    """The same, taken into a run."""
    stock(root)
    take_in(root)


def left_over(root: Path) -> None:
    """What crashes leave: something staged, something half deleted, torn files, a strip and its guards cut short."""
    three(root)
    prune_mixed(root)
    for place in ("tmp/1234567890abcdef", "trash/fedcba0987654321"):
        local.make_dirs(hidden(root, *place.split("/")))
        (hidden(root, place) / "model.safetensors").write_bytes(b"half")
    hidden(root, ".head.json.0123abcd").write_bytes(b"{")
    (root / "checkpoint-2" / "optimizer.safetensors").write_bytes(content(2))
    (root / "checkpoint-3" / ".lastgood.json.0123abcd").write_bytes(b"{")


def nameless(root: Path) -> None:
    """Its run.json is lost."""
    three(root)
    hidden(root, "run.json").unlink()


def asked(root: Path) -> None:
    """Somebody asked for a save."""
    three(root)
    request.ask(root, stop=False)


def pruned(root: Path) -> None:
    """Two were removed by command and can be brought back."""
    three(root)
    prune_two(root)


def stripped(root: Path) -> None:
    """Two were stripped by command and can be made whole again."""
    three(root)
    strip_two(root)


def _archive(name: str, step: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        inside = name.partition(".")[0]
        file.writestr(f"{inside}/data.pkl", b"\x80\x02}q\x00.")
        file.writestr(f"{inside}/data/0", bytes([step]) * 50)
    return buffer.getvalue()
