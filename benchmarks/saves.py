"""What saving costs a run: the stock Trainer and a managed one, side by side, interleaved, in one process tree.

Both save the same state in the same way (every step of a short loop), keep three checkpoints, and write the
tokenizer as fine-tunes do. Measured is the wall time inside `_save_checkpoint`, which is what training waits for.

    python benchmarks/saves.py [--saves 200] [--repeat 3] [--full]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table


def run(kind: str, out: Path, saves: int, full: bool) -> dict[str, float]:
    """One run in this process; seconds per save, and of the whole run."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

    import lastgood

    set_seed(0)
    model: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=4096, n_embd=320, n_layer=8, n_head=8, bos_token_id=0, eos_token_id=0)
    )
    if not full:
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=saves,
        save_steps=1,
        save_total_limit=3,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(saves)]
    trainer: Any = Trainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer(PreTrainedTokenizerFast)
    )
    if kind == "managed":
        trainer = lastgood.manage(trainer)
    spent: list[float] = []
    inner = trainer._save_checkpoint

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        inner(*arguments)
        spent.append(time.perf_counter() - start)

    trainer._save_checkpoint = timed
    start = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - start
    return {"total": sum(spent), "median": statistics.median(spent), "worst": max(spent), "run": whole}


def tokenizer(cls: Any) -> Any:
    """A tokenizer of the usual size for such a model, so that its files are part of every save."""
    from tokenizers import Tokenizer, models

    words = models.WordLevel({f"word{n}": n for n in range(4096)}, unk_token="word0")
    return cls(tokenizer_object=Tokenizer(words), pad_token="word1")


def isolated(kind: str, saves: int, full: bool, place: Path) -> dict[str, float]:
    """A run in a child of its own, on an empty directory."""
    out = place / kind
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    result = place / "result.json"
    pid = os.fork()
    if pid == 0:
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            result.write_text(json.dumps(run(kind, out, saves, full)))
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"the {kind} run failed")
    return json.loads(result.read_text())  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--full", action="store_true", help="all weights and their optimizer state instead of an adapter"
    )
    parser.add_argument("--place", type=Path, help="directory on the disk to measure (default: the temporary one)")
    args = parser.parse_args()

    import torch
    import transformers  # noqa: F401 (imported once, before the forks)

    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(dir=args.place))
    found: dict[str, list[dict[str, float]]] = {"stock": [], "managed": []}
    try:
        for _ in track(range(args.repeat), "interleaved runs"):
            for kind, runs in found.items():
                runs.append(isolated(kind, args.saves, args.full, place))
    finally:
        shutil.rmtree(place, ignore_errors=True)

    table = Table(
        title=f"{args.saves} saves of {'all weights' if args.full else 'a LoRA adapter'}, {args.repeat} runs each"
    )
    table.add_column("")
    for column in ("all saves, s", "median save, ms", "worst save, ms", "whole run, s"):
        table.add_column(column, justify="right")
    for kind, runs in found.items():
        cells = [f"{statistics.median(r[key] for r in runs) * scale:.{digits}f}" for key, scale, digits in
                 (("total", 1, 2), ("median", 1e3, 1), ("worst", 1e3, 0), ("run", 1, 1))]  # fmt: skip
        table.add_row(kind, *cells)
    ratios = [m["total"] / s["total"] for m, s in zip(found["managed"], found["stock"], strict=True)]
    Console().print(table)
    Console().print(f"managed / stock, per pair of runs: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    sys.exit(main())
